"""What the learning rate has just done, and what that says about the movement still to come.

A block's movement follows the learning rate, so scores can be extrapolated only while the rate behaves as it did:

    drop       in one go to a third or less, out of line with the changes before it: training enters another regime, in
               which front blocks often move once more
    rise       to twice the lowest rate since the last event, or more: what stood still at the low rate proves nothing
               at the higher one. The rising part of a warm-up is a row of rises; so is a warm restart
    otherwise  flat or smoothly decaying: nothing happened

A rise after a decay (a restart) is remembered for good: from then on a low rate is no longer taken for the end of
training, and the rates to come are reckoned to be like those already seen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal

DROP: Final = 0.35
RISE: Final = 2.0
OUT_OF_LINE: Final = 3.0
"""An abrupt change is this many times larger than any of the last few."""
REMEMBERED: Final = 8

Event = Literal["drop", "rise"]


@dataclass(kw_only=True)
class RateWatch:
    """See the module. Plain data; `asdict` is its state."""

    recent: list[tuple[int, float]] = field(default_factory=list)
    """(step, rate) since the last event, the latest few."""
    low: float = math.inf
    """Lowest rate since the last event."""
    high: float = 0.0
    """Highest rate since the last event."""
    peak: float = 0.0
    """Highest rate of the run."""
    restarts: bool = False
    square_steps: float = 0.0
    """Sum over the run of rate² × steps."""
    rate_steps: float = 0.0
    """Sum over the run of rate × steps."""

    def note(self, step: int, rate: float | None) -> Event | None:
        """Take in the rate at a decision; what happened, if anything. An unknown rate is nothing."""
        if rate is None or not math.isfinite(rate) or rate < 0:
            return None
        event = self._event(rate)
        if self.recent:
            since, before = step - self.recent[-1][0], self.recent[-1][1]
            self.square_steps += before**2 * since
            self.rate_steps += before * since
        if event == "rise" and self.peak > 0 and self.peak >= RISE * self.low:
            self.restarts = True
        if event is not None:
            self.recent, self.low, self.high = [], math.inf, 0.0
        self.recent = [*self.recent, (step, rate)][-REMEMBERED:]
        self.low, self.high = min(self.low, rate), max(self.high, rate)
        self.peak = max(self.peak, rate)
        return event

    @property
    def falling(self) -> bool:
        """Has it decayed since the last event, in whatever way?"""
        return self.lost > 0.0

    @property
    def lost(self) -> float:
        """Share of the highest rate since the last event that is gone."""
        return 1.0 - self.recent[-1][1] / self.high if self.recent and self.high > 0 else 0.0

    def horizon(self, steps: int) -> float:
        """How many steps at the present rate move the weights as far as the next `steps` steps will.

        A rate that decays is taken to go on decaying by the same share a step, which no common schedule undercuts by
        much: linear and cosine decay end sooner. After a restart the rates to come are like those of the run so far.
        """
        if not self.recent or steps <= 0:
            return float(max(steps, 0))
        now = self.recent[-1][1]
        if self.restarts and self.recent[-1][0] > 0:
            usual = math.sqrt(self.square_steps / self.recent[-1][0])
            return steps * max(usual / now, 1.0) if now > 0 else math.inf
        decay = self._decay()
        if math.isinf(decay):
            return 0.0
        return -math.expm1(-decay * steps) / decay if decay > 0 else float(steps)

    def spent(self, step: int) -> float:
        """How many steps at the present rate would have moved the weights as far as the `step` steps so far did."""
        if not self.recent:
            return float(step)
        now = self.recent[-1][1]
        return self.rate_steps / now if now > 0 else math.inf

    def state_dict(self) -> dict[str, Any]:
        return {**asdict(self), "recent": [list(pair) for pair in self.recent], "low": _or_none(self.low)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.recent = [(int(step), float(rate)) for step, rate in state["recent"]]
        self.low = math.inf if state["low"] is None else state["low"]
        self.high, self.peak = state["high"], state["peak"]
        self.restarts, self.square_steps = state["restarts"], state["square_steps"]
        self.rate_steps = state["rate_steps"]

    def _decay(self) -> float:
        """Share of the rate that is lost a step, lately; infinite where nothing is left of it."""
        (first, before), (last, now) = self.recent[0], self.recent[-1]
        if last <= first or now >= before:
            return 0.0
        return math.log(before / now) / (last - first) if now > 0 else math.inf

    def _event(self, rate: float) -> Event | None:
        if not self.recent:
            return None
        if rate >= RISE * self.low and rate > 0:
            return "rise"
        changes = [abs(b - a) for (_, a), (_, b) in zip(self.recent, self.recent[1:], strict=False)]
        before = self.recent[-1][1]
        if rate <= DROP * before and before - rate > OUT_OF_LINE * max(changes, default=0.0):
            return "drop"
        return None


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None
