"""What a model is called with: the positional and keyword arguments of its forward, on the CPU, and their masks.

`sub_batch` cuts the first samples off the arguments of a training step's forward, whatever their structure; `masks`
finds which tokens of them are real, by the names under which models take their masks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Samples:
    """Arguments of one forward: `model(*args, **kwargs)`."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    masks: dict[str, Tensor] | None = None
    """Masks (batch, tokens), nonzero for real tokens, by the argument they come from; None: found by `masks_in`."""


def map_tensors(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """`value` with every tensor in its tuples, lists and mappings replaced. Mappings keep their class where it can be
    built from a dict (Hugging Face's BatchEncoding can), and become a dict otherwise."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        changed = {key: map_tensors(item, change) for key, item in value.items()}
        if type(value) is dict:
            return changed
        try:
            return type(value)(changed)  # type: ignore[call-arg]
        except Exception:
            return changed
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(item, change) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(map_tensors(item, change) for item in value)
    return value


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors in tuples, lists and mappings, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [tensor for item in value for tensor in tensors_in(item)] if isinstance(value, (tuple, list)) else []


def num_samples(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | None:
    """Batch size of a call: the length that all its tensors share in dimension 0 (those without dimensions, and of
    length 1 there, aside). None where they differ: the batch is not in front, or a mask (tokens, tokens) is among
    them."""
    lengths = {t.shape[0] for t in tensors_in((args, dict(kwargs))) if t.dim() > 0}
    if len(lengths) > 1:
        lengths.discard(1)
    return lengths.pop() if len(lengths) == 1 else None


def sub_batch(args: tuple[Any, ...], kwargs: Mapping[str, Any], limit: int) -> Samples:
    """The first `limit` samples of a call as `Samples`: detached copies on the CPU that share nothing with it. The
    whole batch, if `num_samples` is unknown."""
    total = num_samples(args, kwargs)

    def keep(tensor: Tensor) -> Tensor:
        part = tensor[:limit] if total is not None and tensor.dim() > 0 else tensor
        copy = part.detach().to("cpu", copy=True)
        return copy.contiguous()

    return Samples(map_tensors(tuple(args), keep), map_tensors(dict(kwargs), keep))


def masks_in(samples: Samples) -> dict[str, Tensor]:
    """Masks (batch, tokens) among the arguments, true for real tokens. A keyword or mapping key that contains "mask"
    names one; "key_padding_mask", as torch's own attention takes it, marks padding and is turned around."""
    if samples.masks is not None:
        return samples.masks
    found: dict[str, Tensor] = {}

    def look(mapping: Mapping[str, Any]) -> None:
        for key, value in mapping.items():
            if isinstance(value, Mapping):
                look(value)
            elif isinstance(value, Tensor) and "mask" in str(key) and value.dim() == 2:
                found[str(key)] = value == 0 if "key_padding_mask" in str(key) else value != 0

    for arg in samples.args:
        if isinstance(arg, Mapping):
            look(arg)
    look(samples.kwargs)
    return found


def mask_for(block: str, activation: Tensor, masks: Mapping[str, Tensor]) -> Tensor | None:
    """The mask that belongs to a block's activation (batch, tokens, features): the one of its batch and length whose
    argument is a decoder's exactly when the block is."""
    if activation.dim() != 3:
        return None
    for name, mask in masks.items():
        if mask.shape == activation.shape[:2] and _is_decoder(name) == _is_decoder(block):
            return mask
    return None


def _is_decoder(name: str) -> bool:
    return "decoder" in name or name.startswith("tgt")


def floating_to(samples: Samples, dtype: torch.dtype) -> Samples:
    """The same samples with floating tensors of another type; token ids and masks stay as they are."""

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    return Samples(map_tensors(samples.args, cast), map_tensors(samples.kwargs, cast), samples.masks)
