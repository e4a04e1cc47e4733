"""Every private name of torch that this package uses, each with its reason. Tested with torch 2.13.0.

`PRIVATE_NAMES` is what the test asserts to exist; the functions below are the only callers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.utils.checkpoint
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import ChainedScheduler, LRScheduler, SequentialLR

PRIVATE_NAMES: dict[str, str] = {
    "torch.nn.parallel.DistributedDataParallel._build_params_for_reducer": "re-bucketing: who still needs a gradient",
    "torch.nn.parallel.DistributedDataParallel._build_debug_param_to_name_mapping": "re-bucketing: names in errors",
    "torch.nn.parallel.DistributedDataParallel._ddp_init_helper": "re-bucketing: a new reducer in the same wrapper",
    "torch.nn.parallel.DistributedDataParallel._set_static_graph": "re-bucketing under static_graph=True",
    "torch.distributed._register_comm_hook": "the new reducer gets the comm hook that the wrapper already has",
    "torch.distributed._broadcast_coalesced": "DDP's own way to make buffers equal",
    "torch.distributed.distributed_c10d._get_default_timeout": "bound of control waits where a group does not tell",
    "torch.utils.checkpoint.CheckpointFunction": "reentrant checkpointing behind a frozen prefix needs an input with grad",
    "torch._C._current_autograd_node": "may the comm hook leave its waiting to the end of the backward?",
    "torch._C._current_graph_task_id": "tells one backward from the next",
    "torch.autograd.Variable._execution_engine": "queue_callback: waiting at the end of the backward",
    "torch._dynamo.config.recompile_limit": "a moved frontier is one more graph, not one of the user's eight",
    "torch.ops.mkldnn._is_mkldnn_bf16_supported": "does this CPU have fast bf16 kernels?",
    "torch._disable_dynamo": "keeps our forward out of traces without importing dynamo at import time",
}

disable_dynamo: Callable[..., Any] = torch._disable_dynamo


def cpu_has_fast_bf16() -> bool:
    """Whether oneDNN computes bf16 on this CPU. Without it (AVX2 only, for instance) torch falls back to loops: a
    ResNet-20's forward takes 13 times as long as in fp32."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def rebuild_reducer(ddp: DistributedDataParallel) -> None:
    """Re-bucket `ddp` in place for the parameters that require a gradient now.

    The same three calls as in `DistributedDataParallel.__setstate__`. Running `__init__` again would work too, but clears
    every hook dictionary, the training flag, the join configuration and `require_backward_grad_sync`; this touches
    nothing but the reducer, its logger and the list of broadcast buffers. The old reducer removes its autograd hooks
    when it is dropped.
    """
    parameters, expect_sparse_gradient = ddp._build_params_for_reducer()
    names = ddp._build_debug_param_to_name_mapping(parameters)
    ddp._ddp_init_helper(parameters, expect_sparse_gradient, names, ddp.static_graph)
    ddp._has_rebuilt_buckets = False
    if ddp.static_graph:
        ddp.static_graph = False  # or torch takes the new reducer for one that has been told
        ddp._set_static_graph()
    for hook, state in ddp._comm_hooks:
        dist._register_comm_hook(ddp.reducer, state, hook)


def unsupported_options(ddp: DistributedDataParallel) -> list[str]:
    """Options of this wrapper that re-bucketing cannot carry over, in words."""
    found = []
    if ddp._delay_all_reduce_params:
        found.append("delay_all_reduce_named_params")
    if ddp.mixed_precision is not None:
        found.append("mixed_precision (use torch.autocast)")
    if ddp._use_python_reducer:
        found.append("torch._dynamo.config.optimize_ddp='python_reducer'")
    if any(hasattr(p, "_in_backward_optimizers") for p in ddp.parameters()):
        found.append("an optimizer applied in the backward")
    return found


def join_enabled(ddp: DistributedDataParallel) -> bool:
    """Was the last `Join` context of this wrapper an enabled one? (Torch leaves the setting when the context ends.)"""
    return ddp._join_config.enable


def rebuild_buckets_if_due(ddp: DistributedDataParallel) -> None:
    """What DDP's forward does first: after a reducer's first backward, agree on its order of gradients.

    A collective. Done ahead of ours it keeps stock DDP's order, in which a forward on one rank only (with gradients on)
    meets the other ranks' next training forward.
    """
    if ddp.reducer._rebuild_buckets():
        ddp._has_rebuilt_buckets = True


def ignored_by_ddp(ddp: DistributedDataParallel) -> set[str]:
    """The live set of parameter and buffer names that DDP neither reduces nor broadcasts."""
    return ddp.parameters_to_ignore


def broadcast(group: dist.ProcessGroup, tensors: Sequence[torch.Tensor], buffer_bytes: int) -> None:
    """Copy rank 0's `tensors` to all ranks of `group`, in flat pieces of at most `buffer_bytes`."""
    dist._broadcast_coalesced(group, list(tensors), buffer_bytes, 0)


def parts_of(scheduler: ChainedScheduler | SequentialLR) -> Sequence[LRScheduler]:
    """The schedulers that this one is made of. (An attribute of the instance: its test makes one.)"""
    return scheduler._schedulers


def milestones_of(scheduler: SequentialLR) -> Sequence[int]:
    """Moves after which the second, third, … scheduler takes over. (As above.)"""
    return scheduler._milestones


def group_timeout(group: dist.ProcessGroup) -> timedelta:
    """How long collectives of `group` wait for a peer."""
    for device in ("cpu", "cuda"):
        try:
            return group._get_backend(torch.device(device)).options._timeout
        except (RuntimeError, AttributeError):
            continue
    return dist.distributed_c10d._get_default_timeout(dist.Backend(dist.Backend.GLOO))


def inside_autograd_node() -> bool:
    """Is a backward node running on this thread (as against the callbacks at the end of a backward, or no backward)?"""
    return torch._C._current_autograd_node() is not None


def backward_id() -> int:
    """A number for the backward under way on this thread."""
    return torch._C._current_graph_task_id()


def at_end_of_backward(callback: Callable[[], None]) -> None:
    """Run `callback` when the backward under way ends. Callbacks run in the order in which they were queued."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)


def allow_one_more_recompile() -> None:
    """Past its limit of recompilations torch runs a compiled model eagerly, without a word. A mask costs one; add it."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.config.recompile_limit += 1


@contextmanager
def reentrant_checkpoint_inputs(prepare: Callable[[tuple[Any, ...]], tuple[Any, ...]]) -> Iterator[None]:
    """While open, the inputs of every reentrant checkpoint pass through `prepare` first.

    `torch.utils.checkpoint.checkpoint(use_reentrant=True)` looks its autograd Function up in its module at each call.
    """
    module: Any = torch.utils.checkpoint
    original = module.CheckpointFunction

    class Prepared:
        @staticmethod
        def apply(function: Callable[..., Any], preserve_rng_state: bool, *inputs: Any) -> Any:
            return original.apply(function, preserve_rng_state, *prepare(inputs))

    module.CheckpointFunction = Prepared
    try:
        yield
    finally:
        module.CheckpointFunction = original
