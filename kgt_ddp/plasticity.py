"""Training plasticity: how far apart two versions of a block are, judged by what they make of the same samples.

Pure functions of tensors; no process group, clock or disk. The measure is the similarity-preserving loss of Tung and
Mori, "Similarity-Preserving Knowledge Distillation", ICCV 2019: with the activations of a block flattened to A of shape
(batch, features),

    G = A·Aᵀ with every row scaled to unit L2 norm          (batch, batch)
    plasticity = ‖G₁ − G₂‖²_F / batch²

G says which samples the block finds alike. It does not change when a block's output is rotated or scaled, so it
compares versions of a network that could not be compared number by number, and it is small: 16 KiB for 64 samples.

Don't know is None, never a number: an activation with NaN or infinity, no floating tensor in the output, a batch of
one (its G is always [[±1]]), or two G of different batches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor


def first_floating_tensor(output: Any) -> Tensor | None:
    """The activation in a block's output: the tensor itself, or the first floating one in a tuple, list, mapping or
    dataclass, depth first in their own order; None where there is none.

    A nested tensor is padded with zeros: torch's own encoder layers make one of a padded batch in evaluation mode.
    """
    if isinstance(output, Tensor):
        if not output.is_floating_point():
            return None
        return torch.nested.to_padded_tensor(output, 0.0) if output.is_nested else output
    if isinstance(output, Mapping):
        parts = list(output.values())
    elif isinstance(output, (tuple, list)):
        parts = list(output)
    elif is_dataclass(output) and not isinstance(output, type):
        parts = [getattr(output, field.name) for field in fields(output)]
    else:
        return None
    for part in parts:
        found = first_floating_tensor(part)
        if found is not None:
            return found
    return None


def gram(activation: Tensor, mask: Tensor | None = None) -> Tensor | None:
    """Which samples of a batch a block finds alike. Never waits for a device: its values are not looked at.

    Args:
        activation: (batch, ...) of any floating type; computed in fp32 on its own device.
        mask: (batch, tokens), nonzero where a token is real; for activations (batch, tokens, ...). Padding tokens are
            set to zero, so that they add nothing to any inner product: what a network writes there is arbitrary. Tokens
            are kept apart rather than averaged, as the formula has it; an average hides changes that cancel out.

    Returns:
        G of shape (batch, batch) in fp32, rows of unit L2 norm, zero for a sample whose activation is all zero and NaN
        for one that holds NaN or infinity; None for fewer than two samples.
    """
    if activation.dim() < 1 or activation.shape[0] < 2 or activation.numel() == 0:
        return None
    rows = activation.detach().float()
    if mask is not None:
        keep = (mask != 0).reshape(*mask.shape, *(1,) * (rows.dim() - 2)).to(rows.device)
        rows = rows.masked_fill(~keep, 0.0)
    rows = rows.flatten(1) if rows.dim() > 1 else rows.unsqueeze(1)
    with torch.autocast(rows.device.type, enabled=False):  # of the forward whose hook this may run in
        return torch.nn.functional.normalize(rows @ rows.T, dim=1, eps=1e-30)


def similarity(activation: Tensor, mask: Tensor | None = None) -> Tensor | None:
    """`gram`, or None where it is not finite throughout."""
    found = gram(activation, mask)
    # One number tells of all: NaN stays NaN in a sum, and a row with infinity in it has a NaN after its scaling.
    return found if found is not None and bool(torch.isfinite(found.sum())) else None


def distance(first: Tensor | None, second: Tensor | None) -> float | None:
    """Plasticity between two similarities of the same samples, each (batch, batch) or None.

    Returns:
        ‖first − second‖²_F / batch², in 0 to 4 / batch; None when either is unknown or their shapes differ.
    """
    if first is None or second is None or first.shape != second.shape:
        return None
    value = float((first - second.to(first.device)).square().sum()) / first.shape[0] ** 2
    return value if value == value and value != float("inf") else None


def plasticity(first: Any, second: Any, mask: Tensor | None = None) -> float | None:
    """Plasticity between two outputs of a block for the same samples: tensors (batch, ...), or structures of which the
    first floating tensor counts. None when it is not known, see the module."""
    one, two = first_floating_tensor(first), first_floating_tensor(second)
    if one is None or two is None:
        return None
    return distance(similarity(one, mask), similarity(two, mask))
