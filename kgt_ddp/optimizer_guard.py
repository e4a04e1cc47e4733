"""Frozen parameters do not move, whatever the optimizer does.

While `step()` runs, frozen parameters are taken out of the optimizer's `param_groups`, and put back afterwards in their old
places. State is untouched, so `state_dict()` keeps its shape, also in the middle of a step, and a lifted block goes on with
its old momentum. A group that would be empty stays with the optimizers of torch: schedulers and `ZeroRedundancyOptimizer`
pair groups by position. With those of others it goes as a whole: some index a parameter of each group (Muon) or of the
first (SAM). A forward within the step, which a closure makes, meets full groups; `before_step` follows the closure.

An optimizer that reaches its parameters by another way is caught by comparison: frozen weights are compared with a copy
in each optimizer's first step after a change, and when the copy is to be given up, some steps later: what moves them may do
so every few steps only, and need not be an optimizer (a wrapper that averages). Optimizers that moved them are named once,
and from then on the copy is written back after each step and before each forward.

An optimizer all of whose parameters are frozen would meet `GradScaler.step` without a single gradient, which is an error
there; its smallest parameter gets a gradient of zeros (that no step will use).

Torch calls the hooks of this module around every optimizer's step (`register_optimizer_step_pre_hook`, process-wide).
Owns no collectives. A step that raises leaves the groups filtered; every forward repairs this, and so does a state that is
saved or loaded.
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


_STEPS_WATCHED = 16


class OptimizerGuard:
    """Guards one model's frozen parameters; see the module docstring."""

    def __init__(self) -> None:
        self._frozen: list[nn.Parameter] = []
        self._ids: set[int] = set()
        self._copies: list[torch.Tensor] = []
        self._versions: list[int] = []
        self._steps_left = 0
        self._removed: list[tuple[torch.optim.Optimizer, Groups, list[list[Any]]]] = []
        self._checked: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        self._movers: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        self._known: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        """Those whose states are whole whenever they are asked for."""
        self._interrupted: list[torch.optim.Optimizer] = []
        self._starved: list[nn.Parameter] = []
        self._under_way: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        """Those within a step."""

    def set_frozen(self, parameters: Sequence[nn.Parameter], optimizers: Iterable[torch.optim.Optimizer]) -> None:
        """From now on exactly these do not move. `optimizers`: those known to own parameters of the model."""
        self.restore()
        self._compare_again()
        self._frozen = list(parameters)
        self._ids = {id(p) for p in self._frozen}
        self._copies = [p.detach().clone() for p in self._frozen]
        self._versions = [p._version for p in self._frozen]
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

    def before_forward(self) -> None:
        """No step is under way; or one is, whose closure makes this forward. What has moved since is undone."""
        self.restore()
        if self._movers:
            if not self._under_way:  # else the writes are the step's
                self._adopt_counted()
            self._write_back()

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Take the frozen parameters out of `optimizer`, if it has any."""
        if not self._ids:
            return
        self._under_way.add(optimizer)
        if optimizer not in self._known:
            self._known.add(optimizer)
            self._keep_states_whole(optimizer)
        groups = optimizer.param_groups
        if not any(id(p) in self._ids for group in groups for p in group["params"]):
            return
        self._removed.append((optimizer, list(groups), [group["params"] for group in groups]))
        for group in groups:
            group["params"] = [p for p in group["params"] if id(p) not in self._ids]
        if not _is_of_torch(optimizer):
            groups[:] = [group for group in groups if group["params"]]

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Put them back; look after an optimizer that moved them all the same."""
        self.restore(optimizer)
        self._under_way.discard(optimizer)
        if not self._copies:
            return
        if optimizer not in self._checked and optimizer not in self._movers:
            self._checked.add(optimizer)
            if self._moved():
                self._movers.add(optimizer)
                logger.warning(
                    "%s moves parameters that it does not list; frozen weights are written back after each step",
                    type(optimizer).__name__,
                )
        if self._movers:
            self._write_back()

    def step_ended(self) -> None:
        """The clock ticked: give up the copies when nobody has moved a frozen weight for some steps."""
        self._steps_left -= 1
        if self._steps_left == 0:
            self._compare_again()
            if not self._movers:
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

    def _keep_states_whole(self, optimizer: torch.optim.Optimizer) -> None:
        """Its state may be saved or loaded within a step, or after one that raised."""
        optimizer.register_state_dict_pre_hook(lambda _: self._interrupt(), prepend=True)
        optimizer.register_state_dict_post_hook(lambda *_: self._continue())
        optimizer.register_load_state_dict_pre_hook(lambda *_: self.restore(), prepend=True)

    def _interrupt(self) -> None:
        # All of them: an optimizer and the one around it may have one list of groups.
        self._interrupted = [owner for owner, _, _ in self._removed]
        self.restore()

    def _continue(self) -> None:
        interrupted, self._interrupted = self._interrupted, []
        for optimizer in interrupted:
            self.before_step(optimizer)

    def _moved(self) -> bool:
        return any(not _same_bits(p, copy) for p, copy in zip(self._frozen, self._copies, strict=True))

    def _compare_again(self) -> None:
        """The copies are about to go. Who moved a weight since each optimizer's first step cannot be told."""
        if not self._checked or not self._copies or self._movers:
            return
        self._adopt_counted()
        if not self._moved():
            return
        self._movers.update(self._checked)
        logger.warning(
            "frozen weights have moved between or in steps of %s; they are written back after each step",
            ", ".join(sorted(type(optimizer).__name__ for optimizer in self._checked)),
        )
        self._write_back()

    def _adopt_counted(self) -> None:
        """A write that torch has counted may well be meant (a checkpoint is loaded); one by way of `.data` is a mover's."""
        watched = zip(self._frozen, self._copies, self._versions, strict=True)
        self._copies = [c if p._version == version else p.detach().clone() for p, c, version in watched]

    def _write_back(self) -> None:
        with torch.no_grad():
            for parameter, copy in zip(self._frozen, self._copies, strict=True):
                if not _same_bits(parameter, copy):
                    parameter.copy_(copy)
        self._versions = [p._version for p in self._frozen]


def _is_of_torch(optimizer: torch.optim.Optimizer) -> bool:
    """By where its `step` is defined."""
    return str(getattr(type(optimizer).step, "__module__", "")).startswith("torch.")


def _same_bits(parameter: torch.Tensor, copy: torch.Tensor) -> bool:
    """Bytes, not values: a NaN equals itself here, since the question is whether anything was written."""
    a, b = (t.detach().contiguous().view(-1).view(torch.uint8) for t in (parameter, copy))
    return torch.equal(a, b)
