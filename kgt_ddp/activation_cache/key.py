"""What identifies a sample: a 128-bit hash of its content as it enters the model, before any copy to a device.

A batch's arguments are flattened. Tensors whose first dimension is the batch's are *rows* and hashed sample by sample;
everything else (flags, numbers, text, tensors without a batch dimension, autocast) is common to the batch and part of each
key. What cannot be hashed makes the batch unkeyable: it goes uncached.

The *form* of a call is all that may decide which way the model goes: structure, flags and plain values, types and numbers of
dimensions, tensors without a batch dimension, autocast. What is proved of a model is proved of one form. Sizes are no part of
it: texts of another length go the same way.

Text: an `attention_mask` of shape (batch, length) with ones in front and zeros behind marks padding. Tensors of shape
(batch, length, …) are then hashed up to the sample's length, so that the same text has the same key whatever it is
padded to. A tensor is cut this way only if what is cut off is one constant, always the same; otherwise it is hashed whole.

Keys say nothing about the model: the store binds every record to the frozen prefix (`prefix.Prefix.digest`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import xxhash
from torch.utils._pytree import TreeSpec, tree_flatten_with_path, tree_map, tree_unflatten

KEY_BYTES = 16
_PLAIN = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device)


class LeftOutError(Exception):
    """Calls of this form go uncached: nothing of it is hashed."""


class UnkeyableError(Exception):
    """This batch has no keys; the text says why."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """The arguments of one forward, understood."""

    size: int
    """Samples."""
    keys: Sequence[bytes]
    """One a sample, 16 bytes each."""
    common: bytes
    """Hash of everything that all samples share: form, and shapes but for padding."""
    form: bytes
    """Hash of the form of the call; see the module docstring."""
    dims: tuple[int, ...]
    """Sizes of all tensors one behind the other: what shapes inside the model can depend on."""
    lengths: np.ndarray | None
    """(batch,) real tokens of each sample: all there are, where nothing marks padding. None if nothing has a length."""
    padded_length: int
    """What the samples are padded to; 0 without `lengths`."""
    cut: frozenset[str]
    """Names of the arguments that were hashed without their padding."""
    leaves: Sequence[Any]
    names: Sequence[str]
    rows: Sequence[bool]
    """Which leaves carry a batch dimension."""
    spec: TreeSpec

    @property
    def padded(self) -> bool:
        """Whether any sample is shorter than the batch."""
        return self.lengths is not None and bool((self.lengths < self.padded_length).any())

    def arguments(self, change: Any = lambda name, tensor: tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs) with every row tensor passed through `change(name, tensor)`."""
        leaves = [
            change(n, leaf) if row else leaf for n, leaf, row in zip(self.names, self.leaves, self.rows, strict=True)
        ]
        return tree_unflatten(leaves, self.spec)

    def select(self, index: Sequence[int], length: int | None = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs) of some samples only, padded as the batch is, or to `length`."""
        chosen = torch.as_tensor(index)

        def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
            tensor = tensor.index_select(0, chosen.to(tensor.device))
            return tensor[:, :length] if name in self.cut else tensor

        return self.arguments(change)

    def own(self, arguments: Any, device: torch.device) -> Any:
        """`arguments`, as the methods above give them, on a device as DDP puts them there. Nothing in them is the caller's:
        the model may write into what it is given."""
        callers = {id(leaf) for leaf in self.leaves}
        return tree_map(
            lambda leaf: leaf.to(device, copy=id(leaf) in callers) if isinstance(leaf, torch.Tensor) else leaf,
            arguments,
        )

    def subset(self, index: Sequence[int]) -> Batch:
        """The same of some samples only; its arguments stay those of the whole batch."""
        lengths = None if self.lengths is None else self.lengths[list(index)]
        return replace(self, size=len(index), keys=[self.keys[i] for i in index], lengths=lengths)


class Keys:
    """Makes batches of arguments; remembers what padding looks like.

    Attributes:
        excluded: names of arguments by sample that the frozen prefix was shown not to depend on.
    """

    def __init__(self) -> None:
        self.excluded: set[str] = set()
        self.trims = True
        """Whether keys leave padding out."""
        self._pads: dict[str, Any] = {}

    def batch(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], left_out: Callable[[bytes], bool] = lambda form: False
    ) -> Batch:
        """Understand and hash one batch.

        Raises:
            LeftOutError: `left_out` says so of its form.
            UnkeyableError: an argument cannot be hashed, or there is no batch dimension.
        """
        entries, spec = tree_flatten_with_path((args, kwargs))
        names = [_name(path) for path, _ in entries]
        leaves = [leaf for _, leaf in entries]
        size = next((len(t) for t in leaves if isinstance(t, torch.Tensor) and t.dim() > 0), 0)
        if not size:
            raise UnkeyableError("the model gets no tensor with a batch dimension")
        rows = [isinstance(t, torch.Tensor) and t.dim() > 0 and len(t) == size for t in leaves]
        lengths, padded = _lengths(names, leaves) if self.trims else (None, 0)
        trims = lengths is not None
        if lengths is None and (padded := _whole_length(leaves, rows)):
            lengths = np.full(size, padded)
        # A tensor of several elements steers the model's Python no more than samples do: its content is in the keys alone.
        kinds = [
            f"{name}:{row}{leaf.dtype}{leaf.dim()}"
            if row or (isinstance(leaf, torch.Tensor) and leaf.numel() > 1)
            else f"{name}={_plain(name, leaf)}"
            for name, leaf, row in zip(names, leaves, rows, strict=True)
        ]
        form = xxhash.xxh3_128_digest(f"{spec}{_autocast(leaves)}{kinds}".encode())
        if left_out(form):
            raise LeftOutError
        common = xxhash.xxh3_128(form + bytes([trims]))
        columns: list[tuple[np.ndarray, int]] = []
        cuts: set[str] = set()
        dims: list[int] = []
        for name, leaf, row in zip(names, leaves, rows, strict=True):
            if isinstance(leaf, torch.Tensor):
                dims += leaf.shape
                if not row:
                    common.update(f"{name}={_plain(name, leaf)}".encode())
            if not row or name in self.excluded:
                continue
            data = _bytes_of(name, leaf)
            cut = trims and lengths is not None and self._cuts(name, leaf, lengths, padded)
            if cut:
                cuts.add(name)
            common.update(f"{name}:{tuple(leaf.shape[2 if cut else 1 :])}{cut}".encode())
            columns.append((data, data.shape[1] // padded if cut else 0))
        seed = common.digest()
        return Batch(
            size=size,
            keys=[_row_key(seed, columns, i, lengths) for i in range(size)],
            common=seed,
            form=form,
            dims=tuple(dims),
            lengths=lengths,
            padded_length=padded,
            cut=frozenset(cuts),
            leaves=leaves,
            names=names,
            rows=rows,
            spec=spec,
        )

    def _cuts(self, name: str, tensor: torch.Tensor, lengths: np.ndarray, padded: int) -> bool:
        if tensor.dim() < 2 or tensor.shape[1] != padded:
            return False
        shortest = int(lengths.argmin())
        if lengths[shortest] == padded:
            return name not in self._pads or self._pads[name] is not None
        pad = self._pads.setdefault(name, tensor[shortest, -1].clone())
        if pad is None:
            return False
        behind = torch.arange(padded, device=tensor.device) >= torch.as_tensor(lengths, device=tensor.device)[:, None]
        if not torch.equal(tensor[behind], pad.expand(int(behind.sum()), *pad.shape)):
            self._pads[name] = None
            return False
        return True


def _name(path: Sequence[Any]) -> str:
    parts = [getattr(entry, "key", getattr(entry, "idx", entry)) for entry in path]
    return ".".join(str(part) for part in parts[1:])


def _lengths(names: Sequence[str], leaves: Sequence[Any]) -> tuple[np.ndarray | None, int]:
    for name, leaf in zip(names, leaves, strict=True):
        if name.split(".")[-1] != "attention_mask" or not isinstance(leaf, torch.Tensor) or leaf.dim() != 2:
            continue
        mask = leaf.detach().cpu() != 0
        if bool(mask[:, 0].all()) and not bool((mask[:, 1:] & ~mask[:, :-1]).any()):
            return mask.sum(1).numpy(), mask.shape[1]
    return None, 0


def _whole_length(leaves: Sequence[Any], rows: Sequence[bool]) -> int:
    return next((leaf.shape[1] for leaf, row in zip(leaves, rows, strict=True) if row and leaf.dim() >= 2), 0)


def _autocast(leaves: Sequence[Any]) -> str:
    kinds = {"cpu", "cuda"} | {t.device.type for t in leaves if isinstance(t, torch.Tensor)}
    return "".join(f"{k}{torch.get_autocast_dtype(k)}" for k in sorted(kinds) if torch.is_autocast_enabled(k))


def _plain(name: str, leaf: Any) -> str:
    if isinstance(leaf, torch.Tensor):
        whole = _bytes_of(name, leaf.reshape(1, -1))
        return f"{leaf.dtype}{tuple(leaf.shape)}{xxhash.xxh3_128_hexdigest(whole.data)}"
    if type(leaf) not in _PLAIN:
        raise UnkeyableError(f"the model gets a {type(leaf).__name__}, which cannot be part of a key")
    return repr(leaf)


def _bytes_of(name: str, tensor: torch.Tensor) -> np.ndarray:
    """(batch, bytes) of a tensor on the CPU."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.requires_grad:
        why = "needs a gradient" if tensor.requires_grad else "is not a dense tensor"
        raise UnkeyableError(f"the argument {name!r} {why}")
    flat = tensor.detach().cpu().contiguous().reshape(len(tensor), -1)
    return flat.view(torch.uint8).numpy() if flat.numel() else np.zeros((len(tensor), 0), np.uint8)


def _row_key(seed: bytes, columns: Sequence[tuple[np.ndarray, int]], row: int, lengths: np.ndarray | None) -> bytes:
    state = xxhash.xxh3_128(seed)
    for data, token_bytes in columns:
        # A cut row is preceded by its length: no two ways of cutting may yield the same bytes.
        if token_bytes and lengths is not None:
            state.update(int(lengths[row]).to_bytes(4, "little"))
            state.update(data[row, : int(lengths[row]) * token_bytes].data)
        else:
            state.update(data[row].data)
    return state.digest()
