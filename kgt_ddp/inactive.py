"""What stands in the place of `Freezing` where a wrapper is a plain DDP."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

logger = logging.getLogger(__name__)


class Inactive:
    """Freezes nothing, answers the same questions as `Freezing`, and knows why: `reason`."""

    active = False
    frontier = 0

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def describe(self) -> str:
        return f"freezing is off: {self.reason}"

    def summary(self) -> dict[str, Any]:
        return {"active": False, "reason": self.reason, "frontier": 0, "freezes": [], "dropped_bytes": 0}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        if state and state.get("frontier"):
            logger.warning(
                "the checkpoint has %s frozen blocks; freezing is off (%s), so they train again",
                state["frontier"],
                self.reason,
            )
