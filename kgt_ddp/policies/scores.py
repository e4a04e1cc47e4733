"""The scores of one block at one evaluation, and whether they may be reckoned with.

visible      all known, finite, S(4L) at least `VISIBLE` floors, and of a kind with each other
near floor   known, but S(4L) under `VISIBLE` floors: the block moves less than can be seen; or zero, as of a block that stands
             still before a reference that is exact, whose floor is zero
at odds      known and above the floor, but no measures of one movement: noise
unknown      anything else

Where S(L) alone drowns in the floor nobody knows how the movement grows with the distance. The most is assumed, that the block
moves steadily: S(L) is then a sixteenth of S(4L).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

VISIBLE: Final = 3.0
AT_ODDS: Final = 4.0
"""S(2L) lies between S(L) and S(4L), give or take this factor."""

STEADY: Final = 16.0
"""S(4L) over S(L) of a block that moves steadily: they are squared distances."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """S(L), S(2L), S(4L), and the score of the model against itself; None where nobody had one."""

    near: float | None
    middle: float | None
    far: float | None
    floor: float | None

    @property
    def missing(self) -> bool:
        """Had nobody any of the three?"""
        return self.near is None and self.middle is None and self.far is None


def visible(scores: Scores) -> tuple[float, float] | None:
    """S(L) and S(4L) if the evaluation is visible."""
    known = _known(scores)
    if known is None or near_floor(scores):
        return None
    near, middle, far = _measures(*known)
    return (near, far) if _of_a_kind(near, middle, far) else None


def near_floor(scores: Scores) -> bool:
    known = _known(scores)
    return known is not None and (known[2] < VISIBLE * known[3] or known[2] == 0.0)


def hidden(scores: Scores) -> tuple[float, float] | None:
    """The most that S(L) and S(4L) of a block near the floor may be; None also where that is nothing at all."""
    known = _known(scores)
    if known is None or not near_floor(scores):
        return None
    most = VISIBLE * known[3]
    return (most / STEADY, most) if most else None


def at_odds(scores: Scores) -> bool:
    known = _known(scores)
    return known is not None and not near_floor(scores) and not _of_a_kind(*_measures(*known))


def _measures(near: float, middle: float, far: float, floor: float) -> tuple[float, float, float]:
    return near if near >= VISIBLE * floor else far / STEADY, middle, far


def _of_a_kind(near: float, middle: float, far: float) -> bool:
    return min(near, far) > 0 and min(near, far) / AT_ODDS <= middle <= max(near, far) * AT_ODDS


def _known(scores: Scores) -> tuple[float, float, float, float] | None:
    values = (scores.near, scores.middle, scores.far, scores.floor)
    if any(value is None or not math.isfinite(value) for value in values):
        return None
    return values  # type: ignore[return-value]
