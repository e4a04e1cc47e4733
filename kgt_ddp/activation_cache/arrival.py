"""One batch on its way from a `CachedLoader` to the model: which of its samples were left out, and how they are put back.

The training process may put any stand-in back at any time, by decoding it through the data set and the collate function: so
a record that is gone, a frontier that has moved or a cache that gives up cost a decode here, and never a wrong input.

The batch has to enter the model as the loader yielded it, and nothing else until the next one. Until ids are proven that is
shown by a hash of its input; afterwards by the marks. A batch with stand-ins whose marks are gone has been changed on its
way: `ChangedBatchError`. So is, for all that can be told, any other batch that a script begins to give to the model by then:
it might have been made of the stand-ins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import xxhash
from torch.utils._pytree import tree_leaves

from kgt_ddp.activation_cache.dataset import CachedDataset, marked
from kgt_ddp.activation_cache.key import Batch
from kgt_ddp.errors import KgtError

Rehash = Callable[[], Batch]


class ChangedBatchError(KgtError, ValueError):
    """A batch with samples that were not decoded did not reach the model as the loader yielded it."""


class Arrival:
    """See the module docstring.

    Args:
        ids: of the batch's samples, in order.
        batch: as the loader yields it.
        watched: whether samples are being looked at: without a frozen prefix none are, and nothing is hashed.

    Attributes:
        waiting: row -> sample of the stand-ins that were not put back.
        leaves: the model's arguments that hold the input, once `find` has found them; the loader's tensor until then.
        entered: whether `find` has found them.
        num_known: samples whose keys were known before they came.
    """

    def __init__(
        self, ids: Sequence[int], dataset: CachedDataset, collate: Callable[[Any], Any], batch: Any, *, watched: bool
    ) -> None:
        self.samples = list(ids)
        self.ids = dataset.ids
        self.leaves: list[torch.Tensor] = []
        self.waiting: dict[int, int] = {}
        self.entered = False
        self.num_known = 0
        self._dataset, self._collate = dataset, collate
        self._print: bytes | None = None
        self._rehash: Rehash
        self._left_out = False
        value = self._input_of(batch)
        if value is None:
            self.ids.drop(4)
            return
        self.leaves = [value]
        self._form = (value.shape, value.dtype)
        self.waiting = marked(value)
        self._left_out = bool(self.waiting)
        if any(self.samples[row] != sample for row, sample in self.waiting.items()):
            raise ChangedBatchError("CachedLoader: batches do not come in the order in which they were drawn")
        if watched and not self.waiting and not self.ids.dropped:
            self._print = _print(value)

    @property
    def may_be_left_out(self) -> bool:
        """Whether such samples need not be decoded, some day."""
        return self.entered and not self.ids.dropped

    def find(self, args: tuple[Any, ...], kwargs: dict[str, Any], *, strict: bool = True) -> bool:
        """Find the input among a forward's arguments; whether it is there with stand-ins.

        Raises:
            ChangedBatchError: `strict`, samples were left out, and they are not there as they were.
        """
        if not self._left_out and self._print is None:
            return False
        alike = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        alike = [t for t in alike if (t.shape, t.dtype) == self._form]
        if self._left_out:
            # Looked for even if all were put back: that may have been done in a copy of the batch on the device.
            rows = [(t, marked(t)) for t in alike]
            found = [(t, there) for t, there in rows if there and self.waiting.items() <= there.items()]
            if not found and self.waiting and strict:
                raise ChangedBatchError(
                    "the batch was changed between CachedLoader and the model, or the model is given another batch besides, "
                    "which must not happen with a CachedDataset: put the transform into the data set, or leave "
                    "CachedDataset out"
                )
            if found:
                self.leaves, self.entered = [t for t, _ in found], True
                self.waiting = {row: sample for _, there in found for row, sample in there.items()}
            return bool(found)
        if strict:
            self.leaves = [t for t in alike if _print(t) == self._print]
            self.entered = bool(self.leaves)
            if not self.entered:
                self.ids.drop(3)
        return False

    def fill(self, rows: Sequence[int] | None = None) -> None:
        """Decode stand-ins, all or those of some rows, and put them where they belong, in place."""
        wanted = [row for row in (self.waiting if rows is None else rows) if row in self.waiting]
        if not wanted:
            return
        decoded = self._collate([self._dataset.dataset[self.waiting[row]] for row in wanted])
        value = self._dataset.input_of(decoded)
        with torch.no_grad():
            for leaf in self.leaves:
                leaf[wanted] = value.to(device=leaf.device, dtype=leaf.dtype)
        for row in wanted:
            del self.waiting[row]

    def give_up(self) -> None:
        """There is no cache for this batch, nor for the next ones: `fill`, and have workers decode."""
        self.ids.withdraw()
        self.fill()

    def restore(self, batch: Batch, rows: Sequence[int] | None = None) -> Batch:
        """`fill`, and the batch with the keys of what came: ids are dropped if that is not what it was."""
        wanted = [row for row in (self.waiting if rows is None else rows) if row in self.waiting]
        if not wanted:
            return batch
        self.fill(wanted)
        again = self._rehash()
        if again.common == self.ids.common and not self.ids.dropped:
            for row in wanted:
                self.ids.meet(self.samples[row], again.keys[row])
        if self.ids.dropped and self.waiting:
            self.fill()
            again = self._rehash()
        return replace(again, keys=[batch.keys[r] if r in self.waiting else key for r, key in enumerate(again.keys)])

    def identified(self, batch: Batch, rehash: Rehash, there: Callable[[bytes], bool] | None) -> Batch:
        """The batch with the keys of its stand-ins, those put back whose records are gone.

        Args:
            rehash: makes the batch anew, of the arguments as they are then.
            there: whether the cache has a record for a key; None where it is not ready.
        """
        ids, self._rehash = self.ids, rehash
        if self.waiting and (ids.dropped or there is None or ids.common != batch.common):
            batch = self.restore(batch)
        if ids.dropped or not self.entered:
            return batch
        ids.use_common(batch.common)
        self.num_known = ids.num_known(self.samples)
        for row, sample in enumerate(self.samples):
            if row not in self.waiting and not ids.meet(sample, batch.keys[row]):
                return self.restore(batch)
        known = {row: ids.key(sample) for row, sample in self.waiting.items()}
        batch = replace(batch, keys=[known.get(row) or key for row, key in enumerate(batch.keys)])
        gone = [row for row, key in known.items() if key is None or there is None or not there(key)]
        return self.restore(batch, gone)

    def _input_of(self, batch: Any) -> torch.Tensor | None:
        try:
            value = self._dataset.input_of(batch)
        except (LookupError, TypeError):
            return None
        sound = isinstance(value, torch.Tensor) and value.dim() > 0 and len(value) == len(self.samples)
        return value if sound and all(self._dataset.has_id(i) for i in self.samples) else None


def _print(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return xxhash.xxh3_128_digest(flat.view(torch.uint8).numpy().data) if flat.numel() else b"\0"
