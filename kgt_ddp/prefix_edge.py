"""What happens at the edge between the frozen prefix and the first active block, where autograd needs help.

Three cases, each switched on only where it occurs, because a hook on a block costs a compiled model a recompilation:

- *Reentrant checkpointing.* `checkpoint(use_reentrant=True)` gives its parameters no gradient when none of its inputs
  requires one, which is just what the first active block meets behind a frozen prefix. Its inputs are marked
  `requires_grad_()` once the last frozen block has run in this forward; not before, or frozen blocks would be
  recomputed and walked backward too.
- *A shared parameter in the prefix* (tied embeddings) still requires a gradient for its active use, and its use in front
  would draw the whole prefix into the backward. Inputs of frozen blocks are detached then, unless the model's own input
  requires a gradient.
- *`nn.TransformerEncoder` with a padding mask.* It looks at its first layer alone to see whether it may run on nested
  tensors, and then gives these to all; layers that train cannot take them. It is told not to while anything is frozen.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.hooks import RemovableHandle

from kgt_ddp import torch_private
from kgt_ddp.blocks import Blocks


class PrefixEdge:
    """See the module docstring."""

    def __init__(self) -> None:
        self.reentrant = False
        """The model calls reentrant checkpoints."""
        self._frontier = 0
        self._passed = False
        self._handles: list[RemovableHandle] = []
        self._nesting: list[nn.TransformerEncoder] = []
        """Those that may use nested tensors while nothing is frozen."""

    @property
    def needed(self) -> bool:
        """Whether forwards must run inside `forward()`."""
        return self.reentrant and self._frontier > 0

    def move_to(self, blocks: Blocks) -> None:
        """The frontier has moved."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for encoder in self._nesting:
            encoder.use_nested_tensor = True
        self._nesting = []
        self._frontier = blocks.frontier
        units = [block.unit for block in blocks.blocks[: blocks.frontier] if block.unit is not None]
        if not units:
            return
        self._nesting = [
            m for m in blocks.model.modules() if isinstance(m, nn.TransformerEncoder) and m.use_nested_tensor
        ]
        for encoder in self._nesting:
            encoder.use_nested_tensor = False
        if self.reentrant:
            self._handles.append(units[-1].register_forward_hook(self._note_passed))
        if blocks.shared_in_prefix():
            self._handles += [u.register_forward_pre_hook(_detach_inputs, with_kwargs=True) for u in units]

    @contextmanager
    def forward(self) -> Iterator[None]:
        """One training forward of a model with reentrant checkpoints."""
        self._passed = False
        with torch_private.reentrant_checkpoint_inputs(self._prepare):
            yield

    def _note_passed(self, *_: Any) -> None:
        self._passed = True

    def _prepare(self, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        if not self._passed or not torch.is_grad_enabled() or any(_needs_grad(t) for t in tree_leaves(inputs)):
            return inputs
        return tuple(t.detach().requires_grad_() if _can_have_grad(t) else t for t in inputs)


def _detach_inputs(_: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    return tree_map(_detached, args), tree_map(_detached, kwargs)


def _detached(value: Any) -> Any:
    return value.detach() if _needs_grad(value) else value


def _needs_grad(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad


def _can_have_grad(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())
