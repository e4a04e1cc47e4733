"""What is known of one cut: how far the output of a block has moved, and how far it will still move.

The scores of a block are those of its output, which carries every change in front of it: a block's history is that of the
cut behind it. S(d) is the plasticity between two versions d steps apart, a squared distance; L is the run's lag.

    level     the median of S(4L) over a window
    exponent  how S grows with the distance: log2 of S(4L) / S(L), halved; 2 where the block moves steadily, 1 where it
              wanders, 0 where it jitters about a point. The median over the window, held between 0 and 2
    to come   level × (horizon / 4L) ^ exponent: what the steps that are left would still change, if it were not frozen
    past      the sum of S(4L) over the run, one term every 4L steps: what has changed so far
    peak      the highest level so far

States of an evaluation: visible (all three scores at least `VISIBLE` floors, and of a kind with each other), near the
floor, unknown. Only visible ones are reckoned with; three scores at odds do not measure one movement. A score far above
all of its window, and among the highest of the run, means that the block is no longer the one it was (fresh weights, for
instance): its history begins anew, 5L steps later, when no score compares across the jump any more.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final

VISIBLE: Final = 3.0
JUMP: Final = 3.0
AT_ODDS: Final = 4.0
"""S(2L) lies between S(L) and S(4L), give or take this factor, or the three do not measure one movement."""
DECLINE: Final = 0.25
MIN_SEEN: Final = 5
MIN_TERMS: Final = 3
KEPT: Final = 32
"""Evaluations that are kept of a window, at least; those in between are left out."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Of one block at one evaluation: S(L), S(2L), S(4L), and the score of the model against itself."""

    near: float | None
    middle: float | None
    far: float | None
    floor: float | None


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """See the module."""

    level: float
    exponent: float
    to_come: float
    past: float
    declined: bool
    """Three of four scores of the window are under `DECLINE` times the peak."""


@dataclass(kw_only=True)
class CutHistory:
    """See the module. Plain data; `asdict` is its state."""

    recent: list[tuple[int, float, float]] = field(default_factory=list)
    """(step, S(L), S(4L)) of visible evaluations."""
    past: float = 0.0
    terms: int = 0
    counted_step: int = 0
    """Step up to which `past` reaches."""
    peak: float = 0.0
    fastest: float = 0.0
    """Highest S(L) of the run."""
    blind_until: int = 0
    """Step before which scores compare across a jump or a change of pace."""
    num_scored: int = 0
    """Evaluations of the whole run at which anybody had a score, whatever it was."""
    num_near_floor: int = 0
    """Evaluations near the floor since the last visible or unknown one."""
    num_still: int = 0
    """Visible evaluations in a row after which the policy found the cut still."""

    def note(self, step: int, scores: Scores, *, span: int, window: int) -> bool:
        """Take in an evaluation. Returns whether it is visible, and counts.

        Args:
            span: 4L, in steps.
            window: how far back levels are taken from, in steps.
        """
        self.num_scored += any(value is not None for value in (scores.near, scores.middle, scores.far))
        self.recent = [entry for entry in self.recent if entry[0] > step - window]
        seen = visible(scores)
        near_floor = not seen and _near_floor(scores)
        self.num_near_floor = self.num_near_floor + 1 if near_floor else 0
        if seen is None:
            if _known(scores) and not near_floor:  # at odds with each other: noise, not a movement
                self.num_still = 0
            return False
        near, far = seen
        if self._jumps_to(near):
            self.recent, self.past, self.terms, self.peak, self.num_still = [], 0.0, 0, 0.0, 0
            self.blind_until = self.counted_step = step + settling(span)
        self.fastest = max(self.fastest, near)
        if step < self.blind_until:
            return False
        if not self.recent or step - self.recent[-1][0] >= window / KEPT:
            self.recent.append((step, near, far))
        if step - self.counted_step >= span:
            self.past += statistics.median([entry[2] for entry in self.recent if entry[0] > step - span] or [far])
            self.terms += 1
            self.counted_step = step
        if len(self.recent) >= MIN_SEEN:
            self.peak = max(self.peak, statistics.median(entry[2] for entry in self.recent))
        return True

    def pace_changed(self, step: int, span: int) -> None:
        """What was seen lately says nothing about what comes, nor does any score that compares across this step. What
        is past remains."""
        self.recent, self.num_still = [], 0
        self.blind_until = self.counted_step = step + settling(span)

    def outlook(self, horizon: float, span: int) -> Outlook | None:
        """What the last evaluations say; None where they are too few.

        Args:
            horizon: steps at the present pace that are still to come.
        """
        if len(self.recent) < MIN_SEEN or self.terms < MIN_TERMS or self.past <= 0:
            return None
        _, level, upper = statistics.quantiles((far for _, _, far in self.recent), n=4, method="inclusive")
        growth = statistics.median(far / near for _, near, far in self.recent)
        exponent = min(max(math.log2(growth) / 2, 0.0), 2.0)
        to_come = level * (horizon / span) ** exponent if math.isfinite(horizon) else math.inf
        declined = upper < DECLINE * self.peak
        return Outlook(level=level, exponent=exponent, to_come=to_come, past=self.past, declined=declined)

    def _jumps_to(self, near: float) -> bool:
        """Far above all of the window, and back among the highest of the run: not a mere gust."""
        if len(self.recent) < MIN_SEEN:
            return False
        return near > JUMP * max(entry[1] for entry in self.recent) and near > self.fastest / 2

    def state_dict(self) -> dict[str, Any]:
        return {**asdict(self), "recent": [list(entry) for entry in self.recent]}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> CutHistory:
        return cls(**{**state, "recent": [(int(step), near, far) for step, near, far in state["recent"]]})


def settling(span: int) -> int:
    """Steps after which no score compares across an event any more: 4L, and a lag more, as a score arrives late."""
    return span + span // 4


def visible(scores: Scores) -> tuple[float, float] | None:
    """S(L) and S(4L) where all is known, well above the floor and of a kind; else None."""
    if not _known(scores) or _near_floor(scores):
        return None
    near, middle, far = scores.near, scores.middle, scores.far
    assert near is not None and middle is not None and far is not None
    if near <= 0 or far <= 0 or not min(near, far) / AT_ODDS <= middle <= max(near, far) * AT_ODDS:
        return None
    return near, far


def _known(scores: Scores) -> bool:
    values = (scores.near, scores.middle, scores.far, scores.floor)
    return all(value is not None and math.isfinite(value) for value in values)


def _near_floor(scores: Scores) -> bool:
    if not _known(scores):
        return False
    assert scores.near is not None and scores.middle is not None and scores.far is not None
    assert scores.floor is not None
    return min(scores.near, scores.middle, scores.far) < VISIBLE * scores.floor
