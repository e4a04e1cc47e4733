"""Runs forwards of a model whose frozen modules do not compute: they return what they are told to.

For the time of one forward a module's `forward` is replaced on the instance (what stood there, a patch of the user's
included, comes back), so hooks and call order stay as they are. Three uses:

- `replaced`: each module of a table returns what its entry makes, by the number of its call in this forward;
- `captured`: one module computes as ever, and its output is shown to a callback; `timed`: with the time it took;
- `stopped_at`: the forward ends by force when one module has computed, and yields its output; nothing behind it runs.

Knows nothing of caches. Not for compiled modules, whose compiled code does not look at the instance again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

Replacement = Callable[[int, tuple[Any, ...], dict[str, Any]], Any]
"""(number of the call in this forward, args, kwargs) -> output."""


class _Stop(BaseException):
    """Ends a forward. Not an `Exception`: a model that catches those must not catch this."""

    def __init__(self, output: Any) -> None:
        super().__init__("the forward ends here")
        self.output = output


@contextmanager
def replaced(table: Mapping[nn.Module, Replacement]) -> Iterator[None]:
    """See the module docstring."""
    before = {module: module.__dict__.get("forward") for module in table}
    for module, replacement in table.items():
        module.__dict__["forward"] = _counted(replacement)
    try:
        yield
    finally:
        for module, own in before.items():
            if own is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = own


@contextmanager
def captured(module: nn.Module, note: Callable[[Any], None]) -> Iterator[None]:
    """Call `note(output)` as soon as `module` has computed, before anything can change the output in place."""
    compute = module.forward

    def forward(_: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = compute(*args, **kwargs)
        note(output)
        return output

    with replaced({module: forward}):
        yield


@contextmanager
def timed(model: nn.Module, module: nn.Module, note: Callable[[float, Any], None]) -> Iterator[None]:
    """Call `note(seconds, output)` when `module` has computed. Seconds since `model`'s forward began: what its wrapper
    does before, waiting for other ranks included, is not among them."""
    began = 0.0

    def begin(compute: Callable[..., Any]) -> Replacement:
        def forward(_: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            nonlocal began
            began = now()
            return compute(*args, **kwargs)

        return forward

    with replaced({model: begin(model.forward)}), captured(module, lambda output: note(now() - began, output)):
        yield


def now() -> float:
    """Seconds of a clock, with all work that was queued on CUDA done."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def stopped_at(module: nn.Module, run: Callable[[], Any]) -> Any:
    """The output of `module` in the forward `run`, which goes no further.

    Raises:
        LookupError: the forward ended without a call of `module`.
    """
    compute = module.forward

    def forward(_: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        raise _Stop(compute(*args, **kwargs))

    with replaced({module: forward}):
        try:
            run()
        except _Stop as stop:
            return stop.output
    raise LookupError("the module was not called")


def _counted(replacement: Replacement) -> Callable[..., Any]:
    calls = 0

    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return replacement(calls - 1, args, kwargs)

    return forward
