"""How often decisions are made: about 150 times a job, which is what the policies are calibrated for.

`interval_for` says it for a job whose length is known at the start. A length that is learned on the way makes the interval
longer later; so does a job that goes on and on without anybody knowing its length. Then `coarser` is asked at every
decision of rank 0, and its answer travels to the other ranks with the mask (`agreement`). A longer interval is a multiple
of the one before: what a reference remembers of steps at the old one can be compared at the new distances, too.
"""

from __future__ import annotations

from typing import Final

from kgt_ddp.agreement import LAG

DECISIONS: Final = 150
SHORTEST: Final = LAG + 1
LONGEST: Final = 50
UNKNOWN: Final = 10
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
