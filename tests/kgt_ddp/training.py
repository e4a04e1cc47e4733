"""A tiny training job with everything by seed, for comparisons bit by bit."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9, weight_decay=5e-4),
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=1e-2, weight_decay=0.1),
}


def told() -> list[str]:
    """Messages of kgt_ddp's log from now on, as they come. For a rank's own process, which ends with its test."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("kgt_ddp").addHandler(handler)
    return messages


def image_batch(step: int, rank: int, size: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randn(size, 1, 8, 8, generator=g), torch.randint(0, 5, (size,), generator=g)


def descend(ddp: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> float:
    """One step on one labelled batch; its loss."""
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(ddp(x), y)
    loss.backward()
    optimizer.step()
    return loss.item()


def train(
    ddp: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    rank: int,
    steps: range,
    accumulate: int = 1,
    no_sync: bool = False,
    autocast: bool = False,
    before_step: Callable[[int], Any] = lambda step: None,
    between: Callable[[int], Any] = lambda step: None,
) -> list[float]:
    """Losses of this rank. `between` is called after the first of several backwards of a step."""
    losses = []
    for step in steps:
        optimizer.zero_grad()
        for part in range(accumulate):
            torch.manual_seed(77 * step + part)
            x, y = image_batch(step * accumulate + part, rank)
            quiet = no_sync and part < accumulate - 1
            with ddp.no_sync() if quiet else contextlib.nullcontext():
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    loss = nn.functional.cross_entropy(ddp(x), y)
                (loss / accumulate).backward()
            losses.append(loss.item())
            if part == 0 and accumulate > 1:
                between(step)
        before_step(step)
        optimizer.step()
    return losses


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: t.detach().clone() for n, t in model.state_dict().items()}


def differing(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    """Names whose tensors are not equal bit for bit."""
    assert a.keys() == b.keys()
    return [n for n in a if not torch.equal(a[n], b[n])]
