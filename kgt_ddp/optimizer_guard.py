"""Frozen parameters do not move, whatever the optimizer does.

While `step()` runs, frozen parameters are taken out of the optimizer's `param_groups` (a group that would be empty goes as
a whole: some optimizers index its last parameter), and put back afterwards in their old places. State is untouched, so
`state_dict()` keeps its shape and a lifted block goes on with its old momentum.

An optimizer that reaches its parameters by another way is caught by comparison: in the first steps after a change the
frozen weights are compared with a copy; an optimizer that moved them is named once, and from then on the copy is written
back after each of its steps. Where none does, the copy is given up.

An optimizer all of whose parameters are frozen would meet `GradScaler.step` without a single gradient, which is an error
there; its smallest parameter gets a gradient of zeros (that no step will use).

Torch calls the hooks of this module around every optimizer's step (`register_optimizer_step_pre_hook`, process-wide).
Owns no collectives. A step that raises leaves the groups filtered; `restore` repairs this and is called by every forward.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

logger = logging.getLogger(__name__)

Groups = list[dict[str, Any]]


_STEPS_WATCHED = 8


class OptimizerGuard:
    """Guards one model's frozen parameters; see the module docstring."""

    def __init__(self) -> None:
        self._frozen: list[nn.Parameter] = []
        self._ids: set[int] = set()
        self._copies: list[torch.Tensor] = []
        self._steps_left = 0
        self._removed: list[tuple[torch.optim.Optimizer, Groups, list[list[Any]]]] = []
        self._checked: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        self._movers: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        self._starved: list[nn.Parameter] = []

    def set_frozen(self, parameters: Sequence[nn.Parameter], optimizers: Iterable[torch.optim.Optimizer]) -> None:
        """From now on exactly these do not move. `optimizers`: those known to own parameters of the model."""
        self.restore()
        self._frozen = list(parameters)
        self._ids = {id(p) for p in self._frozen}
        self._copies = [p.detach().clone() for p in self._frozen]
        self._steps_left = _STEPS_WATCHED
        self._checked.clear()
        self._starved = []
        for optimizer in optimizers:
            members = [p for group in optimizer.param_groups for p in group["params"]]
            if members and all(id(p) in self._ids for p in members):
                self._starved.append(min(members, key=lambda p: p.numel()))

    def feed_starved(self) -> None:
        """Give an optimizer without any gradient one of zeros; called when a backward ends."""
        for parameter in self._starved:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Take the frozen parameters out of `optimizer`, if it has any."""
        groups = optimizer.param_groups
        if not self._ids or not any(id(p) in self._ids for group in groups for p in group["params"]):
            return
        self._removed.append((optimizer, list(groups), [group["params"] for group in groups]))
        for group in groups:
            group["params"] = [p for p in group["params"] if id(p) not in self._ids]
        groups[:] = [group for group in groups if group["params"]]

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Put them back; look after an optimizer that moved them all the same."""
        self.restore(optimizer)
        if not self._copies:
            return
        if optimizer not in self._checked and optimizer not in self._movers:
            self._checked.add(optimizer)
            if any(not _same_bits(p, copy) for p, copy in zip(self._frozen, self._copies, strict=True)):
                self._movers.add(optimizer)
                logger.warning(
                    "%s moves parameters that it does not list; frozen weights are written back after each of its steps",
                    type(optimizer).__name__,
                )
        if optimizer in self._movers:
            self._write_back()

    def step_ended(self) -> None:
        """The clock ticked: give up the copies when nobody has moved a frozen weight for some steps."""
        self._steps_left -= 1
        if self._steps_left == 0 and not self._movers:
            self._copies = []

    def restore(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Undo `before_step` for one optimizer, or for all whose step did not end."""
        if not self._removed:
            return
        kept = []
        for entry in reversed(self._removed):
            owner, groups, members = entry
            if optimizer is not None and owner is not optimizer:
                kept.append(entry)
                continue
            for group, parameters in zip(groups, members, strict=True):
                group["params"] = parameters
            owner.param_groups[:] = groups
        self._removed = kept[::-1]

    def _write_back(self) -> None:
        with torch.no_grad():
            for parameter, copy in zip(self._frozen, self._copies, strict=True):
                if not _same_bits(parameter, copy):
                    parameter.copy_(copy)


def _same_bits(parameter: torch.Tensor, copy: torch.Tensor) -> bool:
    """Bytes, not values: a NaN equals itself here, since the question is whether anything was written."""
    a, b = (t.detach().contiguous().view(-1).view(torch.uint8) for t in (parameter, copy))
    return torch.equal(a, b)
