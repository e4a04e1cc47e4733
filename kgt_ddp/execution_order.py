"""When is each parameter and each module of a model first and last used? Watched during one ordinary forward.

Modules are seen by temporary forward hooks, parameters by a `TorchFunctionMode` (which also sees `self.cls_token` used
directly in a forward, that no module hook shows). Nothing of the forward is changed, and nothing stays behind. A parameter
that is handed to a custom `autograd.Function` is seen by neither; its owner's call stands in for it. Neither sees into a
`ScriptModule`, which takes no hooks: it counts as not called.

Times are ticks of a counter: only their order means anything.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from kgt_ddp import torch_private


@dataclass
class ExecutionOrder:
    """What one forward showed. Keys are `id`s of modules and parameters of the watched model."""

    calls: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    """Module -> (start, end) of each of its calls."""
    uses: dict[int, list[int]] = field(default_factory=dict)
    """Parameter -> time of each use by a torch function."""
    reentrant_calls: list[tuple[int, int]] = field(default_factory=list)
    """(start, end) of each `torch.utils.checkpoint` with `use_reentrant=True`; those inside another one are left out."""
    _time: int = 0
    _call_began: int | None = None

    def tick(self) -> int:
        self._time += 1
        if self._call_began is not None and torch.is_grad_enabled():  # within such a call it is off
            self.reentrant_calls.append((self._call_began, self._time))
            self._call_began = None
        return self._time

    def reentrant_call(self) -> None:
        """One begins. Its end is told by what runs next."""
        if torch.is_grad_enabled():
            self._call_began = self.tick()


class _UseRecorder(TorchFunctionMode):
    def __init__(self, order: ExecutionOrder, watched: set[int]) -> None:
        super().__init__()
        self._order = order
        self._watched = watched

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not _reads_metadata(func):
            self._note((*args, *kwargs.values()))
        return func(*args, **kwargs)

    def _note(self, values: Any) -> None:
        for value in values:
            if isinstance(value, nn.Parameter):
                if id(value) in self._watched:
                    self._order.uses.setdefault(id(value), []).append(self._order.tick())
            elif isinstance(value, (list, tuple)):
                self._note(value)


def _reads_metadata(func: Any) -> bool:
    """Reading an attribute (`weight.dtype`, `weight.device`) is not a use: models ask long before they compute."""
    return getattr(func, "__name__", "") in (
        "__get__",
        "size",
        "dim",
        "numel",
        "is_floating_point",
        "stride",
        "data_ptr",
    )


def takes_hooks(module: nn.Module) -> bool:
    """A `ScriptModule` raises instead."""
    return not isinstance(module, torch.jit.ScriptModule)


def looked_at(*_: Any) -> None:
    """A forward hook that does nothing. Where hooks look, the activation cache lets the frozen prefix compute."""


@contextmanager
def watch(model: nn.Module) -> Iterator[ExecutionOrder]:
    """Record the forwards of `model` that run inside this context.

    A compiled model runs eagerly in it: hooks and function modes do not reach compiled code.
    """
    order = ExecutionOrder()
    open_calls: dict[int, list[int]] = {}

    def enters(module: nn.Module, _: Any) -> None:
        open_calls.setdefault(id(module), []).append(order.tick())

    def leaves(module: nn.Module, _: Any, __: Any) -> None:
        starts = open_calls.get(id(module))
        if starts:
            order.calls.setdefault(id(module), []).append((starts.pop(), order.tick()))

    def notice(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        order.reentrant_call()
        return inputs

    with ExitStack() as stack:
        for module in model.modules():
            if not takes_hooks(module):
                continue
            for handle in (
                module.register_forward_pre_hook(enters, prepend=True),
                module.register_forward_hook(leaves, always_call=True),
            ):
                stack.callback(handle.remove)
        if "torch._dynamo" in sys.modules:  # nothing is compiled without it, and importing it takes a second
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch_private.reentrant_checkpoint_inputs(notice))
        stack.enter_context(_UseRecorder(order, {id(p) for p in model.parameters()}))
        yield order
        order.tick()  # ends a call that was the last thing to run
        for calls in order.calls.values():
            calls.sort()
