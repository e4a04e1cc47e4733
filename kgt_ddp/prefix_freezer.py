"""Puts a frontier into effect on one wrapper: the one place where a mask becomes reality.

In order: the blocks freeze or lift; what freezes is put to the mean of its weights, where the policy wants that; this, and
buffers that now stop being broadcast, are made equal on all ranks (a collective, by `agreement`; machines of different kinds
may have rounded a mean differently); DDP is told to leave the buffers out; it gets a new reducer for what is live; hook,
guard and edge follow. All ranks must be here together, with no gradient of the step recorded.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from kgt_ddp import torch_private
from kgt_ddp.agreement import equalise
from kgt_ddp.blocks import Blocks
from kgt_ddp.comm_hook import FreezeHookState
from kgt_ddp.optimizer_guard import OptimizerGuard
from kgt_ddp.prefix_edge import PrefixEdge
from kgt_ddp.weight_mean import WeightMean

logger = logging.getLogger(__name__)


class PrefixFreezer:
    """See the module docstring.

    Args:
        blocks: the partition.
        hook: told what no longer trains.
        mean: where blocks are put as they freeze; None: they stay as they are.
    """

    def __init__(self, blocks: Blocks, hook: FreezeHookState, mean: WeightMean | None) -> None:
        self.guard = OptimizerGuard()
        self.edge = PrefixEdge()
        self._blocks = blocks
        self._hook = hook
        self._mean = mean
        self._ignored_by_us: set[str] = set()

    def apply(
        self, ddp: DistributedDataParallel, frontier: int, optimizers: Iterable[Optimizer], *, at_mean: bool
    ) -> None:
        """Freeze the first `frontier` blocks of `ddp`.

        Args:
            optimizers: those known to own parameters of the model.
            at_mean: what freezes is put to its mean, if there is one.
        """
        old = self._blocks.frontier
        self._blocks.move_to(frontier)
        written = self._mean.moved_from(old, put=at_mean) if self._mean is not None else []
        apart = self._apart(ddp)
        equal = [t for t in (*written, *self._blocks.buffers_between(old, frontier)) if id(t) not in apart]
        equalise(ddp.process_group, equal, ddp.broadcast_bucket_size)
        self._leave_out_buffers(ddp)
        frozen = self._blocks.frozen_parameters()
        self._rebuild_reducer(ddp)
        torch_private.allow_one_more_recompile()
        self._hook.set_frozen(frozen, in_buckets=False)
        self.guard.set_frozen(frozen, optimizers)
        self.edge.move_to(self._blocks)
        shared = self._blocks.shared_in_prefix()
        if shared:
            logger.info("%s still trains: an active block uses it too", ", ".join(shared))

    def _rebuild_reducer(self, ddp: DistributedDataParallel) -> None:
        """What the user has turned off for a while stays with DDP, as it would have stayed with the reducer of before."""
        resting = self._blocks.resting() if ddp.find_unused_parameters else []
        for parameter in resting:
            parameter.requires_grad_(True)
        torch_private.rebuild_reducer(ddp)
        for parameter in resting:
            parameter.requires_grad_(False)

    def _apart(self, ddp: DistributedDataParallel) -> set[int]:
        """By id: what the user has DDP ignore, and each rank has for itself (a shard of an embedding, say)."""
        names = torch_private.ignored_by_ddp(ddp) - self._ignored_by_us
        everything = (*ddp.module.named_parameters(), *ddp.module.named_buffers())
        return {id(tensor) for name, tensor in everything if name in names}

    def _leave_out_buffers(self, ddp: DistributedDataParallel) -> None:
        """Frozen buffers leave DDP's broadcast; names that the user has DDP ignore are not ours to give back."""
        ignored = torch_private.ignored_by_ddp(ddp)
        ignored -= self._ignored_by_us
        self._ignored_by_us = set(self._blocks.frozen_buffers()) - ignored
        ignored |= self._ignored_by_us
