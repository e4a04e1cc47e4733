"""`gradnorm`: freeze where the gradient's size changes least. The rule of AutoFreeze (Liu et al., MLSys-W 2021).

Training is cut into intervals. For each active block, with g the L1 norm of its gradient summed over an interval,

    change = |g of the interval before − g of this interval| / g of the interval before

and the blocks in front of the first one whose change is at or above the median of all active blocks are frozen. Of
blocks that all do the same, half are below their median: this rule freezes sooner or later whatever the scores are.

States: no interval complete (nothing is decided) → one complete (nothing to compare) → comparing.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from kgt_ddp.policies.policy import Decision, Observation, check_weight_mean

UNKNOWN_LENGTH_STEPS = 200
"""Interval of a job whose length is not known."""


@dataclass(kw_only=True)
class GradNorm:
    """See the module. `intervals`: how many make up a job of known length; `weight_mean`: that of `Policy`, 0 in AutoFreeze."""

    intervals: int = 20
    weight_mean: float = 0.0
    signals: ClassVar[tuple[str, ...]] = ("grad_norm",)
    needs_total_steps: ClassVar[bool] = False
    shortest_job: ClassVar[int] = 0
    _sums: list[float | None] | None = field(default=None, init=False)
    _before: list[float | None] | None = field(default=None, init=False)
    _end: int | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if self.intervals < 2:
            raise ValueError(f"gradnorm: intervals={self.intervals} must be at least 2")
        check_weight_mean("gradnorm", self.weight_mean)

    def decide(self, observation: Observation) -> Decision:
        norms = observation.signals.get("grad_norm", (None,) * observation.num_blocks)
        self._sums = _added(self._sums, norms)
        if self._end is None:
            self._end = observation.step + self._interval(observation.total_steps)
        if observation.step < self._end:
            return Decision(frontier=observation.frontier, reason="the interval is not over")
        self._end = observation.step + self._interval(observation.total_steps)
        before, now = self._before, self._sums
        self._before, self._sums = now, None
        if before is None:
            return Decision(frontier=observation.frontier, reason="no interval to compare with")
        changes = relative_changes(before, now)
        frontier = first_at_or_above_median(changes, observation.frontier)
        return Decision(
            frontier=min(frontier, observation.max_frontier),
            reason=f"block {frontier} is the first whose gradient changed by the median or more",
            numbers={"changes": [None if c is None else round(c, 4) for c in changes]},
        )

    def state_dict(self) -> dict[str, Any]:
        return {"sums": _copy(self._sums), "before": _copy(self._before), "end": self._end}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._sums, self._before = _copy(state["sums"]), _copy(state["before"])
        self._end = state["end"]

    def _interval(self, total_steps: int | None) -> int:
        return max(total_steps // self.intervals, 1) if total_steps else UNKNOWN_LENGTH_STEPS


def relative_changes(before: Sequence[float | None], now: Sequence[float | None]) -> list[float | None]:
    """|before − now| / before, one a block; None where either is unknown or `before` is zero."""
    return [
        abs(old - new) / old if old is not None and new is not None and old > 0 else None
        for old, new in zip(before, now, strict=True)
    ]


def first_at_or_above_median(changes: Sequence[float | None], frontier: int) -> int:
    """Index of the first active block whose change is at or above the median of the active ones, or is unknown."""
    known = [c for c in changes[frontier:] if c is not None]
    middle = statistics.median(known) if known else 0.0
    for block in range(frontier, len(changes)):
        change = changes[block]
        if change is None or change >= middle:
            return block
    return frontier


def _added(sums: Sequence[float | None] | None, norms: Sequence[float | None]) -> list[float | None]:
    """Sums with one more term; unknown once a term is."""
    finite = [n if n is not None and math.isfinite(n) else None for n in norms]
    if sums is None:
        return finite
    return [None if s is None or n is None else s + n for s, n in zip(sums, finite, strict=True)]


def _copy(values: Sequence[float | None] | None) -> list[float | None] | None:
    return None if values is None else list(values)
