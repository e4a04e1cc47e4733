"""How many optimizer steps the job has: given by the user, or read from the learning-rate scheduler of the script.

A scheduler that decays to its end says when training ends, in its own unit: moves. Users move it once a step, once an
epoch or once a micro-batch, so the unit is observed: steps of the clock from one move to the next, their median, once
`WATCHED_STEPS` have passed since the first move. What is left of the schedule times the unit is what is left of the job.

States: *given* (never changes) | *looking* (no scheduler with an end was found yet) -> *watching* (its unit is not known)
-> *learned* -> *unknown* for good, where the job goes on past the end that it was said to have, or where two schedulers
say different things. All ranks look and watch, at the same steps; but what must be equal on all of them is decided on
rank 0 alone and sent, since nothing proves that they all found the same.

Nothing of torch is patched. A scheduler keeps its optimizer, not the reverse; so it is looked for among the objects that
Python's garbage collector knows: about 0.07 s for 340,000 objects, once where it succeeds, otherwise again at four times
the steps. Owns no collectives.
"""

from __future__ import annotations

import functools
import gc
import inspect
import logging
import math
import statistics
import weakref
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Final

from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    CosineAnnealingLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    OneCycleLR,
    PolynomialLR,
    SequentialLR,
)

from kgt_ddp import torch_private
from kgtrun.contract.events import EventWriter

logger = logging.getLogger(__name__)

WATCHED_STEPS: Final = 20
"""A gradient scaler skips steps of the optimizer, not those of the scheduler; it does so rarely, so the median stands."""
LOOK_AGAIN: Final = 4
NAMES: Final = ("num_training_steps", "total_steps")
"""What a function given to `LambdaLR` may call the end; the first is that of transformers."""


def moves_to_end(scheduler: LRScheduler) -> tuple[float, str] | None:
    """Moves of `scheduler` from the start of training to the end, and where that is written; None: it has no end.

    A warm-up, steps at milestones and cycles end nowhere.
    """
    found: tuple[Any, str] | None = None
    match scheduler:
        case OneCycleLR():
            found = scheduler.total_steps, "total_steps"
        case CosineAnnealingLR():
            found = scheduler.T_max, "T_max"
        case PolynomialLR():
            found = scheduler.total_iters, "total_iters"
        case LinearLR() if scheduler.end_factor < scheduler.start_factor:
            found = scheduler.total_iters, "total_iters"
        case LambdaLR():
            found = _only({end for function in scheduler.lr_lambdas for end in _named_ends(function)})
        case ChainedScheduler():
            return _only({end for one in torch_private.parts_of(scheduler) if (end := moves_to_end(one))})
        case SequentialLR():
            parts, milestones = torch_private.parts_of(scheduler), torch_private.milestones_of(scheduler)
            last = moves_to_end(parts[-1])
            if last is None or not milestones:
                return last
            return milestones[-1] + last[0], f"SequentialLR, {milestones[-1]} + {last[1]}"
    if found is None or not _is_length(found[0]):
        return None
    return float(found[0]), f"{type(scheduler).__name__}.{found[1]}={found[0]}"


def find_schedulers(optimizers: Collection[Optimizer]) -> list[LRScheduler]:
    """Schedulers that are in charge of one of `optimizers`; not those that are parts of another one."""
    owners = {id(optimizer) for optimizer in optimizers}
    # type(), not isinstance(): that would ask proxies for their __class__, and wake them.
    known = [o for o in gc.get_objects() if issubclass(type(o), LRScheduler)]
    found = [one for one in known if id(getattr(one, "optimizer", None)) in owners]
    parts = {id(part) for one in found if isinstance(one, SequentialLR) for part in _all_parts(one)}
    return [one for one in found if id(one) not in parts and not isinstance(one, ChainedScheduler)]


class _Watched:
    """One scheduler, and how often it moves."""

    def __init__(self, scheduler: LRScheduler, moves: float, source: str) -> None:
        self.moves = moves
        self.source = source
        self.unit: float | None = None
        """Steps from one move to the next, once known."""
        self.total_steps = 0
        self._scheduler = weakref.ref(scheduler)
        self._position: float | None = None
        self._began: int | None = None
        self._moved: int = 0
        self._units: list[float] = []

    def note(self, step: int) -> None:
        """Step `step` has just been made. The scheduler is where it was left before it, when `step - 1` were."""
        scheduler = self._scheduler()
        position = getattr(scheduler, "last_epoch", None)
        if position is None or position == self._position:
            return
        before, self._position = self._position, position
        if before is None or position < before:  # nobody knows when it came here; or it was put back
            self._began, self._units = None, []
            return
        if self._began is None:
            self._began = step
        else:
            self._units.append((step - self._moved) / (position - before))
        self._moved = step
        if self._units and step - self._began >= WATCHED_STEPS:
            self.unit = statistics.median(self._units)
            self.total_steps = step - 1 + round((self.moves - position) * self.unit)


class JobLength:
    """See the module docstring.

    Args:
        given: by the user; None: to be learned.
        events: where it is recorded when it is learned, with its source, or given up.
    """

    def __init__(self, given: int | None, events: EventWriter) -> None:
        self.total_steps = given
        """Optimizer steps of the whole job; None while they are not known."""
        self._settled = given is not None
        self._slack = math.inf
        """Steps past the end that are still no surprise: one move of the scheduler."""
        self._events = events
        self._watched: list[_Watched] = []
        self._next_look = 0

    def look(self, optimizers: Collection[Optimizer], step: int) -> None:
        """Look for schedulers, unless that is done; without success again at `LOOK_AGAIN` times the steps."""
        if self._settled or self._watched or self.total_steps is not None or step < self._next_look or not optimizers:
            return
        self._next_look = LOOK_AGAIN * step
        for scheduler in find_schedulers(optimizers):
            end = moves_to_end(scheduler)
            if end is not None:
                self._watched.append(_Watched(scheduler, *end))

    def step_ended(self, step: int) -> None:
        """The clock says `step`."""
        if self._settled:
            return
        if self.total_steps is not None:
            if step > self.total_steps + self._slack:
                self._give_up(step, f"the job goes on past step {self.total_steps}")
            return
        for one in self._watched:
            one.note(step)
        known = [one for one in self._watched if one.unit is not None]
        if known:
            self._learn(step, known)

    def state_dict(self) -> dict[str, Any]:
        """What was learned; plain data. What is being watched is watched anew."""
        if self._settled or self.total_steps is None:
            return {}
        return {"total_steps": self.total_steps, "slack": self._slack}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`; a length that was given stays."""
        if not self._settled and "total_steps" in state:
            self.total_steps, self._slack = state["total_steps"], state["slack"]

    def _learn(self, step: int, known: list[_Watched]) -> None:
        self._watched = []
        lengths = [one.total_steps for one in known]
        first = known[0]
        assert first.unit is not None
        self._slack = max(first.unit, 1.0)
        if max(lengths) - min(lengths) > self._slack:
            self._give_up(step, f"schedulers end at different steps: {', '.join(map(str, sorted(lengths)))}")
            return
        if first.total_steps <= step:
            self._give_up(step, f"{first.source} is over at step {first.total_steps}")
            return
        self.total_steps = first.total_steps
        logger.info("kgtrun: the job has %d steps, says %s", self.total_steps, first.source)
        self._events.write(
            "job_length", step=step, total_steps=self.total_steps, source=first.source, steps_per_move=first.unit
        )

    def _give_up(self, step: int, why: str) -> None:
        self._settled, self.total_steps = True, None
        logger.info("kgtrun: the job's length is not known: %s", why)
        self._events.write("job_length", step=step, total_steps=None, source=why)


def _named_ends(function: Any) -> Iterator[tuple[Any, str]]:
    """The end among what a function was bound to: by `functools.partial`, or as a variable around it."""
    bound: dict[str, Any] = {}
    while isinstance(function, functools.partial):
        bound = {**function.keywords, **bound}
        function = function.func
    if inspect.isfunction(function):
        bound = {**inspect.getclosurevars(function).nonlocals, **bound}
    for name in NAMES:
        if _is_length(bound.get(name)):
            yield bound[name], name
            return


def _all_parts(scheduler: LRScheduler) -> Iterator[LRScheduler]:
    if isinstance(scheduler, SequentialLR | ChainedScheduler):
        for part in torch_private.parts_of(scheduler):
            yield part
            yield from _all_parts(part)


def _only(found: Collection[tuple[Any, str]]) -> tuple[Any, str] | None:
    """The one that there is; None where there are none or several."""
    return next(iter(found)) if len(found) == 1 else None


def _is_length(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and value > 0
