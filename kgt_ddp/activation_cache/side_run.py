"""Extra forwards of a model under training that leave no trace: random numbers, buffers, modes and gradients stay.

For the time of side runs normalisation layers use (and keep) their running statistics, so that none is updated and no
synchronised layer communicates: ranks run on the side on their own, whenever they like. Gradients are taken by
`torch.autograd.grad`, which neither touches `.grad` nor wakes DDP's reducer.

A model whose own `forward` communicates must not be run on the side: `session` looks for that first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@dataclass(frozen=True)
class Outcome:
    """What a forward gives its user: outputs, and the gradients of a fixed random combination of them."""

    outputs: list[torch.Tensor]
    gradients: list[torch.Tensor | None]

    def finite(self) -> bool:
        return all(bool(torch.isfinite(t).all()) for t in self._all())

    def same(self, other: Outcome) -> bool:
        """Whether nobody could tell the two apart, but for the order of additions on a device."""
        here, there = self._all(), other._all()
        return len(here) == len(there) and all(close(a, b) for a, b in zip(here, there, strict=True))

    def _all(self) -> list[torch.Tensor]:
        return [*self.outputs, *(g for g in self.gradients if g is not None)]


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float | None = None, *, on_average: bool = False) -> bool:
    """Equal shapes, and no element further off than `tolerance` times the largest one of `a`.

    By default as two kernels may differ that compute the same. An accelerator rounds to TF32 or, in a forward under autocast,
    to less within results of 32 bits: parts of a batch then differ from the whole by far more than fp32's rounding.

    Args:
        on_average: nor all elements together further off than `tolerance` times the mean one. A few elements may be a hundred
            times as large as the others, as in the residual stream of large transformers, and would hide any change of those.
    """
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not (a.is_floating_point() or a.is_complex()):
        return torch.equal(a, b)
    if a.numel() == 0:
        return True
    if tolerance is None:
        precise = torch.finfo(a.dtype).bits >= 32 and a.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
        tolerance = 1e-4 if precise else 3e-2
    size, distance = a.abs(), (a - b).abs()
    same = distance.max() <= tolerance * size.max().clamp(min=1e-12)
    if on_average:
        same &= distance.mean(dtype=torch.float32) <= tolerance * size.mean(dtype=torch.float32).clamp(min=1e-12)
    return bool(same)  # False for NaN


def random_states(device: torch.device) -> list[torch.Tensor]:
    """Of the generators that a forward on this device may draw from."""
    states = [torch.random.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


@contextmanager
def on_the_side(model: nn.Module) -> Iterator[None]:
    """See the module docstring."""
    modes = {m: m.training for m in model.modules() if isinstance(m, _NORMS)}
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    cuda = [torch.cuda.current_device()] if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=cuda):
        for module in modes:
            module.training = False
        try:
            yield
        finally:
            for module, training in modes.items():
                module.training = training
            with torch.no_grad():
                for buffer, before in buffers:
                    # Written only if something changed it: a write counts as a change of the frozen prefix.
                    if not torch.equal(buffer, before) and not bool((before != before).any()):
                        buffer.copy_(before)
            torch.clear_autocast_cache()


def outcome(run: Callable[[], Any], parameters: list[nn.Parameter], *, seed: int = 0) -> Outcome:
    """Run a forward and its backward, with random numbers by `seed`.

    Raises:
        TypeError: the output holds something that cannot be compared.
    """
    torch.manual_seed(seed)
    leaves = tree_leaves(run())
    for leaf in leaves:
        if not isinstance(leaf, (torch.Tensor, bool, int, float, str, type(None))):
            raise TypeError(f"its output holds a {type(leaf).__name__}, which cannot be compared")
    outputs = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    total = torch.zeros(())
    for tensor in outputs:
        if tensor.requires_grad:
            generator = torch.Generator().manual_seed(1)
            weights = torch.randn(tensor.shape, generator=generator).to(tensor.device)
            total = total.to(tensor.device) + (tensor.float() * weights).sum()
    if not total.requires_grad:
        return Outcome([t.detach() for t in outputs], [])
    gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    return Outcome([t.detach() for t in outputs], list(gradients))
