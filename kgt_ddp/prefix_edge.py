"""What happens at the edge between the frozen prefix and the first active block, where autograd needs help.

Three cases, each switched on only where it occurs, because a hook on a block costs a compiled model a recompilation:

- *Reentrant checkpointing.* `checkpoint(use_reentrant=True)` gives its parameters no gradient when none of its inputs
  requires one, which is just what the first active block meets behind a frozen prefix. Inputs are marked
  `requires_grad_()` from the first call on in which something trains; not before, or frozen blocks would be recomputed
  and walked backward too. Which call that is for which frontier was seen in the watched forward (`marking`). A call that
  reaches over the frontier recomputes frozen blocks in the backward, when the activation cache no longer stands in for
  those in front of them: there it is kept from doing so at all.
- *A shared parameter in the prefix* (tied embeddings) still requires a gradient for its active use, and its use in front
  would draw the whole prefix into the backward. Inputs of frozen blocks, and of reentrant checkpoints with nothing else in
  them, are detached then, unless an input of the wrapper requires a gradient.
- *`nn.TransformerEncoder` with a padding mask.* It looks at its first layer alone to see whether it may run on nested
  tensors, and then gives these to all; layers that train cannot take them. It is told not to while anything is frozen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.hooks import RemovableHandle

from kgt_ddp import torch_private
from kgt_ddp.blocks import Blocks
from kgt_ddp.execution_order import ExecutionOrder, looked_at, takes_hooks

Marking = list[tuple[str | None, bool]]
"""For each frontier from 1 on: the module after whose first call inputs of reentrant checkpoints are marked, None: from
the forward's start on; and whether one of them reaches over the frontier. Plain data, saved with the freezing."""


class PrefixEdge:
    """See the module docstring."""

    def __init__(self) -> None:
        self.reentrant: Marking | bool = False
        """The model calls reentrant checkpoints. (True: in a state saved when no more was known of them.)"""
        self._frontier = 0
        self._from_start = False
        self._passed = False
        self._shared = False
        self._detaches = False
        self._handles: list[RemovableHandle] = []
        self._nesting: list[nn.TransformerEncoder] = []
        """Those that may use nested tensors while nothing is frozen."""

    @property
    def needed(self) -> bool:
        """Whether forwards must run inside `forward()`."""
        return bool(self.reentrant) and self._frontier > 0

    def move_to(self, blocks: Blocks) -> None:
        """The frontier has moved."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for encoder in self._nesting:
            encoder.use_nested_tensor = True
        self._nesting = []
        self._frontier = blocks.frontier
        self._shared = bool(blocks.shared_in_prefix())
        units = [block.unit for block in blocks.blocks[: blocks.frontier] if block.unit is not None]
        if not units:
            return
        self._nesting = [
            m for m in blocks.model.modules() if isinstance(m, nn.TransformerEncoder) and m.use_nested_tensor
        ]
        for encoder in self._nesting:
            encoder.use_nested_tensor = False
        if self.reentrant:
            self._mark_at(blocks)
        if self._shared:
            self._handles += [
                unit.register_forward_pre_hook(self._detach_inputs, with_kwargs=True)
                for unit in filter(takes_hooks, units)
            ]

    def look_at(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """A forward of the wrapper begins, with these inputs."""
        self._detaches = self._shared and not any(_needs_grad(t) for t in tree_leaves((args, dict(kwargs))))

    @contextmanager
    def forward(self) -> Iterator[None]:
        """One training forward of a model with reentrant checkpoints."""
        self._passed = self._from_start
        with torch_private.reentrant_checkpoint_inputs(self._prepare):
            yield

    def _mark_at(self, blocks: Blocks) -> None:
        after, reaches_over = self.reentrant[self._frontier - 1] if isinstance(self.reentrant, list) else (None, True)
        self._from_start = after is None
        if after is not None:
            self._handles.append(dict(blocks.model.named_modules())[after].register_forward_hook(self._note_passed))
        if reaches_over:
            first = list(filter(takes_hooks, blocks.blocks[0].modules))[:1]
            self._handles += [module.register_forward_hook(looked_at) for module in first]

    def _note_passed(self, *_: Any) -> None:
        self._passed = True

    def _prepare(self, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        if not torch.is_grad_enabled():
            return inputs
        if any(_needs_grad(t) for t in tree_leaves(inputs)):
            return tuple(tree_map(_detached, inputs)) if self._detaches and not self._passed else inputs
        if not self._passed:
            return inputs
        return tuple(t.detach().requires_grad_() if _can_have_grad(t) else t for t in inputs)

    def _detach_inputs(self, _: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        return (tree_map(_detached, args), tree_map(_detached, kwargs)) if self._detaches else None


def marking(blocks: Blocks, order: ExecutionOrder) -> Marking:
    """See `Marking`. Too early a start costs time; one that is late would leave blocks without gradient."""
    homes = {id(m): index for index, block in enumerate(blocks.blocks) for m in block.modules}
    homes |= {id(p): index for index, block in enumerate(blocks.blocks) for _, p in block.parameters}
    names = {id(m): name for name, m in blocks.model.named_modules()}
    # (time, block) of whatever may train; -1 where the owner belongs to none. A call stands in for uses that were not seen.
    owners = [m for m in blocks.model.modules() if next(m.parameters(recurse=False), None) is not None]
    uses = [(start, homes.get(id(m), -1)) for m in owners for start, _ in order.calls.get(id(m), [])]
    uses += [(time, homes[id(p)]) for p in blocks.model.parameters() for time in order.uses.get(id(p), [])]
    found: Marking = []
    for frontier in range(1, len(blocks)):
        modules = {names[id(m)]: order.calls.get(id(m), []) for b in blocks.blocks[:frontier] for m in b.modules}
        front = {name: calls for name, calls in modules.items() if calls}
        end = max((calls[-1][1] for calls in front.values()), default=0)
        trains = min((time for time, home in uses if home >= frontier or time > end), default=end + 1)
        begin = next((s for s, e in order.reentrant_calls if s < trains < e), trains)
        ended = {calls[0][1]: name for name, calls in front.items() if calls[0][1] < begin}
        reaches_over = any(begin < calls[-1][0] for calls in front.values())
        found.append((ended[max(ended)] if ended else None, reaches_over))
    return found


def _detached(value: Any) -> Any:
    return value.detach() if _needs_grad(value) else value


def _needs_grad(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad


def _can_have_grad(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())
