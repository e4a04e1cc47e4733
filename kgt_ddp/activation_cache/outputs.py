"""The structure of a module's output: tensors, tuples, dicts, ModelOutputs, with plain values between.

`Outline` learns it from real outputs and makes stand-ins of the same structure, dtype and shape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from kgt_ddp.activation_cache.shapes import ShapeRule

_PLAIN = (bool, int, float, str, type(None))


class UnsupportedOutputError(Exception):
    """An output holds something that cannot be imitated; the text says what."""


class Outline:
    """Structure, dtypes and shapes of one module's output.

    Args:
        output: the first one seen.
        dims: sizes of the model's inputs, see `key.Batch.dims`.

    Raises:
        UnsupportedOutputError: it holds objects other than tensors and plain values.
    """

    def __init__(self, output: Any, dims: Sequence[int]) -> None:
        leaves, self._spec = tree_flatten(output)
        for leaf in leaves:
            if not isinstance(leaf, torch.Tensor) and type(leaf) not in _PLAIN:
                raise UnsupportedOutputError(f"it returns a {type(leaf).__name__}")
        self._leaves = [(leaf.dtype, leaf.device) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        self._rules = [ShapeRule() if isinstance(leaf, torch.Tensor) else None for leaf in leaves]
        self._spare: list[torch.Tensor | None] = [None] * len(leaves)
        self.observe(output, dims)

    def observe(self, output: Any, dims: Sequence[int]) -> bool:
        """Learn from one more output; returns whether its structure is the known one."""
        leaves, spec = tree_flatten(output)
        described = [(t.dtype, t.device) if isinstance(t, torch.Tensor) else t for t in leaves]
        if spec != self._spec or described != self._leaves:
            return False
        for rule, leaf in zip(self._rules, leaves, strict=True):
            if rule is not None:
                rule.observe(dims, leaf.shape)
        return True

    def predictable(self, dims: Sequence[int]) -> bool:
        """Whether `stand_in` can be made for inputs of these sizes."""
        return all(rule is None or rule.predict(dims) is not None for rule in self._rules)

    def stand_in(self, dims: Sequence[int]) -> Any:
        """Zeros of the right shapes. The memory is used again by the next call: nobody is to read it."""
        return tree_unflatten([self._zeros(i, dims) for i in range(len(self._leaves))], self._spec)

    def _zeros(self, index: int, dims: Sequence[int]) -> Any:
        rule = self._rules[index]
        if rule is None:
            return self._leaves[index]
        shape = rule.predict(dims)
        assert shape is not None, "stand_in() without predictable()"
        spare = self._spare[index]
        if spare is None or spare.shape != shape:
            dtype, device = self._leaves[index]
            spare = self._spare[index] = torch.zeros(shape, dtype=dtype, device=device)
        return spare


def map_tensors(change: Callable[[torch.Tensor], torch.Tensor], output: Any) -> Any:
    """`output` with every tensor in it passed through `change`."""
    leaves, spec = tree_flatten(output)
    return tree_unflatten([change(t) if isinstance(t, torch.Tensor) else t for t in leaves], spec)


def poisoned(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of this shape that nothing can read unnoticed: NaN, or numbers far out of range."""
    if tensor.is_floating_point() or tensor.is_complex():
        return torch.full_like(tensor, float("nan"))
    if tensor.dtype == torch.bool:
        return ~tensor
    return torch.full_like(tensor, torch.iinfo(tensor.dtype).max // 2)
