"""Private names of torch that the cache uses, each with its reason. Tested with torch 2.13.0.

As `kgt_ddp.torch_private`, whose table this one adds to: the functions below are the only callers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from kgt_ddp.activation_cache.short_circuit import Replacement, replaced

PRIVATE_NAMES: dict[str, str] = {
    "torch.utils._python_dispatch.TorchDispatchMode": "sees collectives that a model's own forward issues",
    "torch.Tensor._version": "counts writes in place: have frozen weights been written?",
    "torch._C._dynamo.eval_frame.get_eval_frame_callback": "does torch.compile look at what is called here?",
}

PRIVATE_ATTRIBUTES: dict[str, str] = {
    "_forward_hooks": "a hook in the prefix would not see real outputs",
    "_forward_pre_hooks": "as before, inputs",
    "_backward_hooks": "as before, gradients",
    "_backward_pre_hooks": "as before, gradients",
    "_compiled_call_impl": "set by Module.compile(): compiled code does not look at the instance's forward",
}
"""Attributes of every `torch.nn.Module`."""


def hooks(module: nn.Module) -> list[object]:
    """All hooks on one module; microseconds where there are none."""
    if not (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks):
        return []
    return [
        *module._forward_hooks.values(),
        *module._forward_pre_hooks.values(),
        *module._backward_hooks.values(),
        *module._backward_pre_hooks.values(),
    ]


def is_compiled(module: nn.Module) -> bool:
    """Whether `torch.compile` or `Module.compile` was used on it, or on its `forward`."""
    if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
        return True
    forward = module.forward
    compiled = hasattr(forward, "_torchdynamo_orig_callable")
    return compiled and not getattr(forward, "_torchdynamo_disable", False)  # torch.compiler.disable leaves both


def under_compilation() -> bool:
    """Whether the caller is called by something that `torch.compile` was used on: while it is traced, or where the trace
    was broken off and Python goes on. False where nothing is compiled, and inside what `torch.compiler.disable` guards."""
    return torch.compiler.is_compiling() or torch._C._dynamo.eval_frame.get_eval_frame_callback() is not None


def writes(tensor: torch.Tensor) -> int:
    """How often it was written in place."""
    return tensor._version


class _Collectives(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: str | None = None
        self.inside_norm = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional") and not self.inside_norm:
            self.found = self.found or str(func)
        return func(*args, **(kwargs or {}))


@contextmanager
def watching_collectives(model: nn.Module, found: Callable[[str | None], None]) -> Iterator[None]:
    """Around a wrapper's forward: tell, at the end, which collective `model`'s own forward issued, if any.

    What synchronised normalisation layers issue does not count, nor what DDP issues around the model.
    """
    seen = _Collectives()

    def under_mode(compute: Callable[..., Any]) -> Replacement:
        def forward(_: int, args: Any, kwargs: Any) -> Any:
            with seen:
                return compute(*args, **kwargs)

        return forward

    def norm(compute: Callable[..., Any]) -> Replacement:
        def forward(_: int, args: Any, kwargs: Any) -> Any:
            with ExitStack() as stack:
                seen.inside_norm += 1
                stack.callback(lambda: setattr(seen, "inside_norm", seen.inside_norm - 1))
                return compute(*args, **kwargs)

        return forward

    table: dict[nn.Module, Replacement] = {
        m: norm(m.forward) for m in model.modules() if isinstance(m, nn.SyncBatchNorm)
    }
    with replaced({**table, model: under_mode(model.forward)}):
        yield
    found(seen.found)
