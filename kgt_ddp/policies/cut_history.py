"""What is known of one cut: how far the output of a block has moved, and how far it will still move.

The scores of a block are those of its output, which carries every change in front of it: a block's history is that of the
cut behind it. S(d) is the plasticity between two versions d steps apart, a squared distance; L is the run's lag.

    level     the median of S(4L) over a window
    exponent  how S grows with the distance: log2 of S(4L) / S(L), halved; 2 where the block moves steadily, 1 where it
              wanders, 0 where it jitters about a point. The median over the window, held between 0 and 2
    to come   level × (horizon / 4L) ^ exponent: what the steps that are left would still change, if it were not frozen
    past      the sum of S(4L) over the run, one term every 4L steps, outliers cut: what has changed so far
    peak      the highest level so far
    usual     the median of the past's terms: the level at which it mostly moved, once a plunge at the start is the
              smaller part of them

Only visible evaluations (`scores`) are reckoned with, and those near the floor as the most that they may be: they count
for the level, and for nothing that is past. Once they are all there is (`MIN_SEEN` in a row), what is to come is bounded,
whatever the peak was and whether anything was ever seen.

A block that had calmed down, and whose score is suddenly far above all of its window and the highest of the run, is no longer
the one it was (fresh weights, for instance): its history begins anew, 5L steps later, when no score compares across the jump
any more.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from kgt_ddp.policies.scores import STEADY, Scores, at_odds, hidden, near_floor, visible

CALM: Final = 0.25
JUMP: Final = 3.0
DECLINE: Final = 0.25
HALVED: Final = 0.5
ROUGH: Final = 2.0
"""Neighbouring scores of a block differ by less than this factor, mostly: they compare nearly the same versions. Scores
drawn at random, or put into another order, do not, and may be far under the peak by chance."""
CALMED: Final = 0.5
MIN_SEEN: Final = 5
MIN_TERMS: Final = 3
MIN_USUAL: Final = 8
MAX_TERMS: Final = 63
"""One more, and neighbours are added up in pairs, and terms come half as often: a long run keeps a short list."""
OUTLIER: Final = 30.0
"""A term counts up to this many medians. A network may fall from its random weights into a flat state in a few steps;
beside such a plunge all that follows, the learning itself included, would look like nothing."""
KEPT: Final = 32
"""Evaluations that are kept of a window, at least; those in between are left out."""


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """See the module."""

    level: float
    exponent: float
    measured: bool
    """Whether the exponent is, and not assumed where S(L) drowned."""
    to_come: float
    own: float
    """What is to come as a share of what is past of this cut; infinite where nothing is."""
    declined: bool
    """Three of four scores of the window are under `DECLINE` times the peak."""
    halved: bool
    """The same, under `HALVED` times the peak; or all of late drowned in the floor."""
    calmed: bool
    """Three of four scores of the window are under `CALMED` times the usual level."""
    smooth: bool
    """The scores of the window hang together."""


@dataclass(kw_only=True)
class CutHistory:
    """See the module. Plain data; `asdict` is its state."""

    recent: list[tuple[int, float, float]] = field(default_factory=list)
    """(step, S(L), S(4L)) of visible evaluations."""
    terms: list[float] = field(default_factory=list)
    """Of the past, the oldest first."""
    stride: int = 1
    """Times 4L steps that a term stands for."""
    counted_step: int = 0
    """Step up to which they reach."""
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
    """Evaluations that count in a row after which the policy found the cut still."""

    def note(self, step: int, scores: Scores, *, span: int, window: int, network_moves: bool = True) -> bool:
        """Take in an evaluation. Returns whether it counts: it is visible, or near the floor and so bounded.

        Args:
            span: 4L, in steps.
            window: how far back levels are taken from, in steps.
            network_moves: any cut's evaluation is visible. If none is, the floor tells nothing of this one.
        """
        self.num_scored += not scores.missing
        self.recent = [entry for entry in self.recent if entry[0] > step - window]
        seen = visible(scores)
        self.num_near_floor = self.num_near_floor + 1 if near_floor(scores) else 0
        if seen is None:
            if at_odds(scores):
                self.num_still = 0
            bound = hidden(scores)
            if bound is None or not network_moves or step < self.blind_until:
                return False
            self._remember(step, *bound, window)
            return True
        near, far = seen
        if self._jumps_to(near):
            self.recent, self.terms, self.stride, self.peak, self.num_still = [], [], 1, 0.0, 0
            self.blind_until = self.counted_step = step + settling(span)
        self.fastest = max(self.fastest, near)
        if step < self.blind_until:
            return False
        self._remember(step, near, far, window)
        self._count(step, far, span)
        if len(self.recent) >= MIN_SEEN:
            self.peak = max(self.peak, statistics.median(entry[2] for entry in self.recent))
        return True

    def _remember(self, step: int, near: float, far: float, window: int) -> None:
        if not self.recent or step - self.recent[-1][0] >= window / KEPT:
            self.recent.append((step, near, far))

    def pace_changed(self, step: int, span: int) -> None:
        """What was seen lately says nothing about what comes, nor does any score that compares across this step. What
        is past remains."""
        self.recent, self.num_still = [], 0
        self.blind_until = self.counted_step = step + settling(span)

    def lag_changed(self, step: int, span: int, factor: float) -> None:
        """Scores compare over `factor` times the distance from now on; `span` is the new one. What was the highest so far
        is carried over by the exponent of what was seen last; what is past adds up over any distance."""
        growth = 2.0
        if len(self.recent) >= MIN_SEEN:
            growth = math.sqrt(statistics.median(far / near for _, near, far in self.recent))
        scale = factor ** min(max(math.log2(growth), 0.0), 2.0)
        self.peak, self.fastest = self.peak * scale, self.fastest * scale
        self.pace_changed(step, span)

    def outlook(self, horizon: float, span: int) -> Outlook | None:
        """What the last evaluations say; None where they are too few.

        Args:
            horizon: steps at the present pace that are still to come.
        """
        drowned = self.num_near_floor >= MIN_SEEN
        if len(self.recent) < MIN_SEEN or not (self.has_past or drowned):
            return None
        _, level, upper = statistics.quantiles((far for _, _, far in self.recent), n=4, method="inclusive")
        growth = statistics.median(far / near for _, near, far in self.recent)
        exponent = min(max(math.log2(growth) / 2, 0.0), 2.0)
        to_come = level * (horizon / span) ** exponent if math.isfinite(horizon) else math.inf
        return Outlook(
            level=level,
            exponent=exponent,
            measured=growth != STEADY,  # what is assumed is exactly that
            to_come=to_come,
            declined=upper < DECLINE * self.peak,
            halved=drowned or upper < HALVED * self.peak,
            own=to_come / past if (past := self.past()) else math.inf,
            smooth=self._roughness() < ROUGH,
            calmed=len(self.terms) >= MIN_USUAL and upper < CALMED * statistics.median(self.terms) / self.stride,
        )

    def _roughness(self) -> float:
        """By what factor a score of the window differs from the one before; the median."""
        logs = [math.log(far) for _, _, far in self.recent]
        return math.exp(statistics.median(abs(b - a) for a, b in itertools.pairwise(logs)))

    def _count(self, step: int, far: float, span: int) -> None:
        """Add a term to the past, if it is time to."""
        reach = self.stride * span
        if step - self.counted_step < reach:
            return
        level = statistics.median([entry[2] for entry in self.recent if entry[0] > step - reach] or [far])
        self.terms.append(self.stride * level)
        self.counted_step = step
        if len(self.terms) > MAX_TERMS:
            self.terms = [a + b for a, b in zip(self.terms[::2], self.terms[1::2], strict=True)]
            self.stride *= 2

    @property
    def has_past(self) -> bool:
        return len(self.terms) >= MIN_TERMS

    def past(self) -> float:
        """See the module; 0 without a term."""
        if not self.terms:
            return 0.0
        most = OUTLIER * statistics.median(self.terms)
        return sum(min(term, most) for term in self.terms)

    def _jumps_to(self, near: float) -> bool:
        """From calm, far above all of the window and the highest of the run. Neither a gust nor the growth of
        a warm-up is that."""
        if len(self.recent) < MIN_SEEN:
            return False
        window = max(entry[1] for entry in self.recent)
        return window < CALM * self.fastest and near > max(JUMP * window, self.fastest)

    def state_dict(self) -> dict[str, Any]:
        return {**asdict(self), "recent": [list(entry) for entry in self.recent]}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> CutHistory:
        return cls(**{**state, "recent": [(int(step), near, far) for step, near, far in state["recent"]]})


def settling(span: int) -> int:
    """Steps after which no score compares across an event any more: 4L, and a lag more, as a score arrives late."""
    return span + span // 4
