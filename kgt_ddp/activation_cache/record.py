"""From the output of the frontier block to records by sample, and back.

A record is the sample's part of every tensor that has a batch dimension, one behind the other; of text, only the real
tokens. In `compact` form 32-bit floats are kept as bfloat16 (half the bytes, a relative error of at most 2^-8); everything
else, and everything in exact form, keeps its bits. Tensors without a batch dimension (a bias that all samples share) are
not in records; they are remembered per shape of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from kgt_ddp.activation_cache.key import Batch
from kgt_ddp.activation_cache.outputs import UnsupportedOutputError

_SHARED_KEPT = 32
_PLAIN = (bool, int, float, str, type(None))
Rows = list[np.ndarray]
"""For each tensor of a record: (batch, bytes), the samples' parts padded to equal size."""


class Codec:
    """Takes the outputs of one block apart and puts them together again.

    Args:
        output: one output of the block, to learn from.
        batch: the batch it belongs to.
        compact: keep 32-bit floats as bfloat16.

    Raises:
        UnsupportedOutputError: it has no tensor by sample, or holds what is neither tensor nor plain value.
    """

    def __init__(self, output: Any, batch: Batch, *, compact: bool) -> None:
        leaves, self._spec = tree_flatten(output)
        self._leaves = leaves
        self._row_leaves = [i for i, t in enumerate(leaves) if _by_sample(t, batch)]
        self._shared_leaves = [
            i for i, t in enumerate(leaves) if isinstance(t, torch.Tensor) and i not in self._row_leaves
        ]
        if not self._row_leaves:
            raise UnsupportedOutputError("its output has no batch dimension in front")
        if any(leaves[i].shape[:1] not in ((), (1,)) for i in self._shared_leaves):
            raise UnsupportedOutputError("part of its output has another first dimension than the batch")
        self._dtypes = [leaves[i].dtype for i in self._row_leaves]
        self._devices = [leaves[i].device for i in self._row_leaves]
        self._stored = [torch.bfloat16 if compact and d == torch.float32 else d for d in self._dtypes]
        self._by_token = [
            batch.lengths is not None
            and leaves[i].dim() >= 2
            and list(leaves[i].shape[1:]).count(batch.padded_length) == 1
            and leaves[i].shape[1] == batch.padded_length
            for i in self._row_leaves
        ]
        self._shapes = [
            tuple(leaves[i].shape[2 if tokens else 1 :])
            for i, tokens in zip(self._row_leaves, self._by_token, strict=True)
        ]
        self._unit_bytes = [
            int(np.prod(shape, dtype=np.int64)) * stored.itemsize
            for shape, stored in zip(self._shapes, self._stored, strict=True)
        ]
        self._shared: dict[tuple[bytes, tuple[int, ...]], list[torch.Tensor]] = {}
        self._leaves = self._plain_values(leaves)
        """Its plain values, and types where there are none. They are in no record: an output with others, or with a tensor in
        a plain value's place, is another kind of output."""

    @staticmethod
    def _plain_values(leaves: Sequence[Any]) -> list[Any]:
        return [
            torch.Tensor if isinstance(leaf, torch.Tensor) else leaf if type(leaf) in _PLAIN else type(leaf)
            for leaf in leaves
        ]

    @property
    def by_token(self) -> bool:
        """Whether records can leave padding out. Without, records of padded batches hold the padding too."""
        return all(self._by_token)

    @property
    def cuda_device(self) -> torch.device | None:
        """The GPU that the output is on, if it is on one."""
        return next((device for device in self._devices if device.type == "cuda"), None)

    @property
    def on_cuda(self) -> bool:
        return self.cuda_device is not None

    @property
    def has_shared(self) -> bool:
        """Whether outputs hold tensors without a batch dimension."""
        return bool(self._shared_leaves)

    @property
    def layout(self) -> str:
        """Text that differs wherever records could not be read as each other's."""
        return f"{self._spec}{self._stored}{self._dtypes}{self._shapes}{self._by_token}{self._leaves}"

    @property
    def slot_bytes(self) -> int:
        """A good size of slots for these records: one sample, or 32 tokens of one."""
        units = sum(size * (32 if tokens else 1) for size, tokens in zip(self._unit_bytes, self._by_token, strict=True))
        return max(units, 64)

    def lengths(self, batch: Batch) -> list[list[int]] | None:
        """Bytes of each tensor's part, for each sample; None if the batch does not fit (text without its lengths)."""
        if any(self._by_token) and batch.lengths is None:
            return None
        return [
            [
                size * (int(batch.lengths[row]) if tokens and batch.lengths is not None else 1)
                for size, tokens in zip(self._unit_bytes, self._by_token, strict=True)
            ]
            for row in range(batch.size)
        ]

    def rows(self, output: Any, batch: Batch) -> Rows | None:
        """A copy of the samples' parts, as bytes on the CPU; None if this output is unlike the one learned from."""
        leaves, spec = tree_flatten(output)
        if spec != self._spec or self._plain_values(leaves) != self._leaves:
            return None
        found = []
        for place, index in enumerate(self._row_leaves):
            tensor = leaves[index]
            if not _by_sample(tensor, batch) or tensor.dtype != self._dtypes[place]:
                return None
            tokens = 2 if self._by_token[place] else 1
            if tuple(tensor.shape[tokens:]) != self._shapes[place]:
                return None
            if tokens == 2 and (batch.lengths is None or tensor.shape[1] != batch.padded_length):
                return None
            kept = tensor.detach().to(device="cpu", dtype=self._stored[place], copy=True).contiguous()
            found.append(kept.reshape(batch.size, -1).view(torch.uint8).numpy())
        return found

    def samples(self, output: Any, batch: Batch) -> list[list[torch.Tensor]] | None:
        """Each sample's part of every tensor, without padding, as views; None as for `rows`."""
        leaves, spec = tree_flatten(output)
        if spec != self._spec or self._plain_values(leaves) != self._leaves:
            return None
        if not all(_by_sample(leaves[i], batch) for i in self._row_leaves):
            return None
        return [
            [
                leaves[i][row, : int(batch.lengths[row])] if tokens and batch.lengths is not None else leaves[i][row]
                for i, tokens in zip(self._row_leaves, self._by_token, strict=True)
            ]
            for row in range(batch.size)
        ]

    def shared(self, output: Any) -> list[torch.Tensor]:
        """The tensors without a batch dimension."""
        leaves = tree_flatten(output)[0]
        return [leaves[i] for i in self._shared_leaves]

    def remember_shared(self, output: Any, batch: Batch) -> None:
        """Keep the tensors without a batch dimension, for batches of the same shape."""
        if self._shared_leaves:
            while len(self._shared) >= _SHARED_KEPT:
                self._shared.pop(next(iter(self._shared)))
            self._shared[batch.common, batch.dims] = [t.detach().clone() for t in self.shared(output)]

    def knows_shared(self, batch: Batch) -> bool:
        """Whether a batch of this shape can be put together."""
        return not self._shared_leaves or (batch.common, batch.dims) in self._shared

    def empty_rows(self, batch: Batch, *, pinned: bool = False) -> tuple[list[torch.Tensor], Rows]:
        """Room for a batch: the tensors, and the same memory as rows of bytes. Padding is zero."""
        tensors, rows = [], []
        for stored, shape, tokens in zip(self._stored, self._shapes, self._by_token, strict=True):
            size = (batch.size, batch.padded_length, *shape) if tokens else (batch.size, *shape)
            make = torch.zeros if tokens and batch.padded else torch.empty
            tensor = make(size, dtype=stored, pin_memory=pinned)
            tensors.append(tensor)
            rows.append(tensor.view(batch.size, -1).view(torch.uint8).numpy())
        return tensors, rows

    def output(self, tensors: Sequence[torch.Tensor], batch: Batch) -> Any:
        """The block's output, of tensors filled through `empty_rows`."""
        leaves: list[Any] = list(self._leaves)
        for place, index in enumerate(self._row_leaves):
            leaves[index] = tensors[place].to(device=self._devices[place], dtype=self._dtypes[place], non_blocking=True)
        if self._shared_leaves:
            for index, tensor in zip(self._shared_leaves, self._shared[batch.common, batch.dims], strict=True):
                leaves[index] = tensor.clone()
        return tree_unflatten(leaves, self._spec)


def segments(rows: Rows, lengths: Sequence[int], row: int) -> list[memoryview]:
    """One sample's record as pieces of memory."""
    return [data[row, :size].data for data, size in zip(rows, lengths, strict=True)]


def _by_sample(leaf: Any, batch: Batch) -> bool:
    if not isinstance(leaf, torch.Tensor):
        if type(leaf) not in _PLAIN:
            raise UnsupportedOutputError(f"it returns a {type(leaf).__name__}")
        return False
    return leaf.dim() > 0 and len(leaf) == batch.size
