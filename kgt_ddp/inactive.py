"""What stands in the place of `Freezing` where a wrapper is a plain DDP.

Its state has the keys of `Freezing.state_dict`, because torch.distributed.checkpoint loads key by key into the state of
the fresh job: so either kind of job loads a checkpoint of the other. A state that came from a job with freezing is kept
and saved again, with the reason why freezing was off meanwhile; frozen blocks train again until then.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from kgt_ddp.freezing import STATE_VERSION

logger = logging.getLogger(__name__)

_NOTHING: dict[str, Any] = {
    "version": STATE_VERSION,
    "step": 0,
    "frontier": 0,
    "generation": 0,
    "policy_spec": "",
    "shared": (
        {
            **{"blocks": None, "agreement": None, "advanced": -1},
            **{"freezes": [], "reduced_bytes": [], "dropped_bytes": []},
        },
    ),
    "rank_0": ({"policy": {}, "job_length": {}},),
}
"""The state of a job in which nothing has happened."""


class Inactive:
    """Freezes nothing, answers the same questions as `Freezing`, and knows why: `reason`."""

    active = False
    frontier = 0

    def __init__(self, reason: str) -> None:
        self.reason = reason
        self._kept: Mapping[str, Any] = _NOTHING

    def describe(self) -> str:
        return f"freezing is off: {self.reason}"

    def summary(self) -> dict[str, Any]:
        return {"active": False, "reason": self.reason, "frontier": 0, "freezes": [], "dropped_bytes": 0}

    def observe_loss(self, loss: object) -> None:
        """Nobody decides by it."""

    def state_dict(self) -> dict[str, Any]:
        """What was loaded, or that of a job in which nothing has happened; marked as saved with freezing off."""
        (shared,) = self._kept["shared"]
        return {**self._kept, "shared": ({**shared, "off": self.reason},)}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Keep it for `state_dict`; say what it means for this run."""
        if not state:
            return
        if state.get("version") != STATE_VERSION:
            logger.warning(
                "the checkpoint has a freezing state of version %r, which this kgtrun does not read: it is lost",
                state.get("version"),
            )
            return
        self._kept = state
        if state["shared"][0]["blocks"] is not None:
            logger.warning(
                "the checkpoint has %d frozen blocks; freezing is off (%s), so they train again. Its freezing state is kept, "
                "and saved with the next checkpoint",
                state["frontier"],
                self.reason,
            )
