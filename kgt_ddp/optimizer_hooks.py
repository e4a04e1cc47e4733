"""Process-wide hooks around every optimizer step, passed on to whoever listens.

Torch's optimizer hooks are global and cannot be removed from inside a step, so one pair is installed once, at the first
listener, and listeners are held weakly.
"""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook


class StepListener(Protocol):
    """Called around each optimizer step of this process; must not raise."""

    def before_optimizer_step(self, optimizer: Optimizer) -> None: ...

    def before_closure(self, optimizer: Optimizer) -> None:
        """A closure that the step was given is about to run."""

    def after_closure(self, optimizer: Optimizer) -> None:
        """It has run, forward and backward: the step goes on."""

    def after_optimizer_step(self, optimizer: Optimizer) -> None: ...


_listeners: weakref.WeakKeyDictionary[Any, None] = weakref.WeakKeyDictionary()
"""In order: what several do to one optimizer is undone by the last of them first."""
_installed = False


def listen(listener: StepListener) -> None:
    """Call `listener` around every optimizer step for as long as it lives."""
    global _installed
    _listeners[listener] = None
    if not _installed:
        register_optimizer_step_pre_hook(_before)
        register_optimizer_step_post_hook(_after)
        _installed = True


def learning_rate(optimizers: Iterable[Optimizer]) -> float | None:
    """Of the first parameter group; None without one, or where it has none."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            return float(group["lr"]) if "lr" in group else None
    return None


def living_optimizers() -> list[Optimizer]:
    """Every optimizer of this process, whether it has made a step or not."""
    # type(), not isinstance(): that would ask proxies for their __class__, and wake them.
    return [one for one in gc.get_objects() if issubclass(type(one), Optimizer)]


def _before(optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
    for listener in list(_listeners):
        listener.before_optimizer_step(optimizer)
    if callable(kwargs.get("closure")):
        return args, {**kwargs, "closure": _followed(kwargs["closure"], optimizer)}
    # The optimizer itself is the first argument. A step of one's own may be given anything, a model for instance.
    if len(args) > 1 and callable(args[1]) and not isinstance(args[1], nn.Module):
        return (args[0], _followed(args[1], optimizer), *args[2:]), kwargs
    return None


def _followed(closure: Callable[..., Any], optimizer: Optimizer) -> Callable[..., Any]:
    @functools.wraps(closure)
    def run(*args: Any, **kwargs: Any) -> Any:
        for listener in reversed(list(_listeners)):
            listener.before_closure(optimizer)
        result = closure(*args, **kwargs)
        for listener in list(_listeners):
            listener.after_closure(optimizer)
        return result

    return run


def _after(optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
    for listener in reversed(list(_listeners)):
        listener.after_optimizer_step(optimizer)
