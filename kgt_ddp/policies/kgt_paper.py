"""`kgt-paper`: the rule of the paper that this project starts from (arXiv 2201.06227), as far as it is known here.

Plasticity of the frontmost active block is smoothed over `window` values and a line is laid through the last `window`
smoothed ones. The block is stationary while the slope stays under `tolerance` times its first slopes; stationary for
`window` evaluations, it is frozen, and the next block is looked at: one block at a time. When the learning rate has
fallen to a tenth of its value at the first freeze, all blocks are thawed, and freezing them again takes half the window.

Two things differ from the paper's system. The plasticity fed here compares versions of fixed distance, while the paper
compares with a reference of growing age. And bootstrapping ends when the training loss changes by less than a tenth a
window, or, where nobody ever fed the loss, after two windows of values.

Per block: no first slope yet → watched → stationary for n evaluations → frozen. An unknown value is left out, and ends a
run of stationary evaluations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from kgt_ddp.policies.policy import Decision, Observation, check_weight_mean
from kgt_ddp.policies.series import known, moving_average, slope

STILL_LEARNING = 0.1
"""Relative change of the mean loss from window to window that ends bootstrapping."""


@dataclass(kw_only=True)
class KgtPaper:
    """See the module.

    Args:
        window: evaluations that are smoothed, fitted and waited for.
        tolerance: share of the first slope under which a block counts as stationary.
        thaw: share of the learning rate at the freeze at which everything is thawed.
        weight_mean: that of `Policy`; the paper leaves blocks as they are.
    """

    window: int = 10
    tolerance: float = 0.2
    thaw: float = 0.1
    weight_mean: float = 0.0
    signals: ClassVar[tuple[str, ...]] = ("plasticity",)
    needs_total_steps: ClassVar[bool] = False
    shortest_job: ClassVar[int] = 0
    _lag_steps: int | None = field(default=None, init=False)
    _window_now: int = field(default=0, init=False)
    _series: list[list[float]] = field(default_factory=list, init=False)
    _first_slopes: list[float | None] = field(default_factory=list, init=False)
    _losses: list[float] = field(default_factory=list, init=False)
    _booted: bool = field(default=False, init=False)
    _stationary: int = field(default=0, init=False)
    _rate_at_freeze: float | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if self.window < 2:
            raise ValueError(f"kgt-paper: window={self.window} must be at least 2")
        if not 0.0 < self.tolerance < 1.0 or not 0.0 < self.thaw < 1.0:
            raise ValueError(f"kgt-paper: tolerance={self.tolerance} and thaw={self.thaw} must be between 0 and 1")
        check_weight_mean("kgt-paper", self.weight_mean)
        self._window_now = self.window

    def decide(self, observation: Observation) -> Decision:
        values = observation.signals.get("plasticity", (None,) * observation.num_blocks)
        # Scores over another distance are on no line with those before.
        if not self._series or observation.lag_steps != self._lag_steps:
            self._lag_steps = observation.lag_steps
            self._series = [[] for _ in values]
            self._first_slopes = [None] * len(values)
            self._stationary = 0
        block = observation.frontier
        seen = known(values[block])
        self._note(values, observation.loss)
        if self._rate_has_fallen(observation):
            self._window_now = max(self.window // 2, 2)
            self._rate_at_freeze, self._stationary = None, 0
            return Decision(frontier=0, reason="the learning rate fell to a tenth of that at the freeze")
        if not self._booted:
            return Decision(frontier=block, reason="bootstrapping")
        steep, first = self._slope(block), self._first_slopes[block]
        if not seen or steep is None or first is None:
            self._stationary = 0
            return Decision(frontier=block, reason=f"block {block}: plasticity not known well enough")
        self._stationary = self._stationary + 1 if abs(steep) < self.tolerance * abs(first) else 0
        numbers = {"block": block, "slope": steep, "first_slope": first, "stationary": self._stationary}
        if self._stationary < self._window_now or block >= observation.max_frontier:
            return Decision(frontier=block, reason=f"block {block} is watched", numbers=numbers)
        self._stationary = 0
        if self._rate_at_freeze is None:
            self._rate_at_freeze = observation.learning_rate
        reason = f"block {block}: slope under {self.tolerance:.0%} of its first for {self._window_now} evaluations"
        return Decision(frontier=block + 1, reason=reason, numbers=numbers)

    def state_dict(self) -> dict[str, Any]:
        return {
            "window": self._window_now,
            "lag_steps": self._lag_steps,
            "series": [list(one) for one in self._series],
            "first_slopes": list(self._first_slopes),
            "losses": list(self._losses),
            "booted": self._booted,
            "stationary": self._stationary,
            "rate_at_freeze": self._rate_at_freeze,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._window_now, self._lag_steps = state["window"], state["lag_steps"]
        self._series = [list(one) for one in state["series"]]
        self._first_slopes = list(state["first_slopes"])
        self._losses = list(state["losses"])
        self._booted = state["booted"]
        self._stationary = state["stationary"]
        self._rate_at_freeze = state["rate_at_freeze"]

    def _note(self, values: tuple[float | None, ...], loss: float | None) -> None:
        keep = 2 * self.window
        for block, value in enumerate(values):
            if value is not None and known(value):
                self._series[block] = [*self._series[block], value][-keep:]
            if self._booted and self._first_slopes[block] is None:
                self._first_slopes[block] = self._slope(block)
        if loss is not None and known(loss):
            self._losses = [*self._losses, loss][-keep:]
        self._booted = self._booted or self._has_booted(bool(self._losses))

    def _has_booted(self, sees_loss: bool) -> bool:
        if not sees_loss:
            return max(map(len, self._series), default=0) >= 2 * self.window
        if len(self._losses) < 2 * self.window:
            return False
        before, now = sum(self._losses[: self.window]), sum(self._losses[self.window :])
        return abs(before - now) < STILL_LEARNING * abs(before)

    def _slope(self, block: int) -> float | None:
        smooth = moving_average(self._series[block], self.window)
        return slope(smooth[-self.window :]) if len(smooth) >= self.window else None

    def _rate_has_fallen(self, observation: Observation) -> bool:
        rate = observation.learning_rate
        frozen = observation.frontier > 0 and self._rate_at_freeze is not None and rate is not None
        return frozen and rate <= self.thaw * self._rate_at_freeze  # type: ignore[operator]
