"""Small training jobs with a frozen prefix in one process, with and without the cache: outputs and gradients, step by step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kgt_ddp.activation_cache.cache import ActivationCache
from kgt_ddp.activation_cache.options import CacheOptions
from kgt_ddp.blocks import Blocks
from kgt_ddp.execution_order import watch
from kgtrun.contract.events import EventWriter

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class Wrapper(nn.Module):
    """Stands for DDP: one module inside, and the cache around its forward."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.cache: ActivationCache | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.cache is None:
            return self.module(*args, **kwargs)
        with self.cache.forward():
            return self.module(*args, **kwargs)


@dataclass
class Job:
    wrapper: Wrapper
    blocks: Blocks
    cache: ActivationCache

    @property
    def model(self) -> nn.Module:
        return self.wrapper.module

    def step(self, arguments: Arguments, seed: int = 0) -> list[torch.Tensor]:
        """Output and gradients of one step, which changes no weight."""
        torch.manual_seed(seed)
        self.model.zero_grad()
        output = self.wrapper(*arguments[0], **arguments[1])
        loss = getattr(output, "loss", None)
        tensor = output if isinstance(output, torch.Tensor) else output.logits
        (tensor.square().mean() if loss is None else loss).backward()
        return [tensor.detach(), *(p.grad.clone() for p in self.model.parameters() if p.grad is not None)]

    def epochs(self, batches: Sequence[Arguments], count: int = 3) -> list[list[torch.Tensor]]:
        results = []
        for epoch in range(count):
            results += [self.step(batch, seed=epoch) for batch in batches]
            self.cache.drain()
        return results


@contextmanager
def job(
    make: Callable[[], nn.Module],
    example: Arguments,
    frontier: int,
    folder: Path,
    *,
    before: Callable[[nn.Module], Any] = lambda model: None,
    **options: Any,
) -> Iterator[Job]:
    """A model in training mode whose first `frontier` blocks are frozen; `before` runs on it ahead of that."""
    torch.manual_seed(0)
    wrapper = Wrapper(make()).train()
    before(wrapper.module)
    blocks = Blocks(wrapper.module)
    torch.manual_seed(0)
    with watch(wrapper.module) as order:
        wrapper(*example[0], **example[1])
    blocks.order_by(order)
    blocks.move_to(frontier)
    settings = {"mode": "on", "directory": folder, "budget_bytes": 64 << 20, "exact": True, **options}
    cache = ActivationCache(wrapper, blocks, EventWriter(None, role="test", index=0), CacheOptions(**settings))
    wrapper.cache = cache
    try:
        yield Job(wrapper, blocks, cache)
    finally:
        cache.close()


def both(
    make: Callable[[], nn.Module], batches: Sequence[Arguments], frontier: int, folder: Path, **options: Any
) -> tuple[list[list[torch.Tensor]], list[list[torch.Tensor]], dict[str, Any]]:
    """(with the cache, without it, the cache's summary) of three epochs."""
    with job(make, batches[0], frontier, folder, **options) as cached:
        ours = cached.epochs(batches)
        summary = cached.cache.summary()
    with job(make, batches[0], frontier, folder, mode="off") as plain:
        theirs = plain.epochs(batches)
    return ours, theirs, summary


def equal(a: Sequence[Sequence[torch.Tensor]], b: Sequence[Sequence[torch.Tensor]]) -> bool:
    """Bit for bit."""
    return len(a) == len(b) and all(
        len(x) == len(y) and all(torch.equal(s, t) for s, t in zip(x, y, strict=True))
        for x, y in zip(a, b, strict=True)
    )


def farthest(a: Sequence[Sequence[torch.Tensor]], b: Sequence[Sequence[torch.Tensor]]) -> float:
    """Largest difference, relative to the largest element of its step: a gradient that is nothing but rounding, as that
    of an attention's key bias, is no measure."""
    return max(
        float((s - t).abs().max()) / max(float(t.abs().max()) for t in y)
        for x, y in zip(a, b, strict=True)
        for s, t in zip(x, y, strict=True)
    )
