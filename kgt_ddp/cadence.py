"""How often decisions are made: about 150 times a job, which is what the policies are calibrated for.

`interval_for` says it for a job whose length is known at the start. A length that is learned on the way makes the interval
longer later; so does a job that goes on and on without anybody knowing its length. Then `coarser` is asked at every
decision of rank 0, and its answer travels to the other ranks with the mask (`agreement`). A longer interval is a multiple
of the one before: what a reference remembers of steps at the old one can be compared at the new distances, too.

A reference that is slow for this job makes the interval longer, too (`affordable`). One that does not answer before the next
submit passes some over, and then no two that it keeps may be a lag apart: it would never find a score.
"""

from __future__ import annotations

import math
from typing import Final

from kgt_ddp.agreement import LAG

DECISIONS: Final = 150
SHORTEST: Final = LAG + 1
LONGEST: Final = 50
UNKNOWN: Final = 10
BUDGET: Final = 0.01
"""Share of the node's computing that the references may take."""
TOLERANCE: Final = 0.2
"""So far over the budget, or so little of a margin, an interval stays."""
KEEP_UP: Final = 1.5
"""An interval is so many times as long as an answer takes."""
FEWEST: Final = 75
"""Decisions of a job at least. `kgt` compares over eight of them; with 50 it knew too little before .7 of a job."""
LATE: Final = 0.25
"""Share of a job behind which a longer interval would cost more in what was seen than it saves."""


def interval_for(total_steps: int | None) -> int:
    """Steps from one decision to the next; `total_steps` None: the length is not known."""
    return UNKNOWN if not total_steps else min(max(total_steps // DECISIONS, SHORTEST), LONGEST)


def coarser(interval: int, step: int, total_steps: int | None) -> int:
    """The interval from `step` on: the present one, or a multiple of it.

    Of a job of unknown length as many steps are taken to come as there were.
    """
    if total_steps is not None and step > LATE * total_steps:
        return interval
    wanted = interval_for(total_steps if total_steps is not None else max(2 * step, 1))
    return interval * max(wanted // interval, 1)


def affordable(
    interval: int, *, step_s: float, passed_s: float, cpu_s: float, num_cores: float, step: int, total_steps: int | None
) -> int:
    """The interval from `step` on at which the reference can follow, within its budget: the present one, or a multiple.

    Args:
        step_s: seconds that a training step takes.
        passed_s: seconds that pass until the reference has answered a submit.
        cpu_s: seconds of computing in it.
        num_cores: cores of the node, those of each of its references.

    Returns:
        No interval that would leave fewer than `FEWEST` decisions in the job; where that is too short for the reference to
        follow there will be no scores.
    """
    if total_steps is not None and step > LATE * total_steps:
        return interval
    wanted = max(KEEP_UP * passed_s, cpu_s / (BUDGET * num_cores)) / step_s / interval
    longest = max((total_steps or max(2 * step, 1)) // FEWEST // interval, 1)
    return interval * min(max(math.ceil(wanted - TOLERANCE), 1), longest)
