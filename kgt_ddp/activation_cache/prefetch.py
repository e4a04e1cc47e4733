"""Reads the records of coming batches before they are needed, on a thread of its own and in bounded memory.

A loader that knows which samples come (`loader.CachedLoader`) announces their ids. What an id's key is was learned when the
sample passed before. Ids are hints only: a batch takes what was read ahead for its own keys, which are hashes of what it
really holds, so a wrong or unstable id costs a read and never yields another sample's activation.

At most `DEPTH` batches are held. On CUDA the host side is pinned and the copy to the device runs on a stream of its own,
which the training stream waits for when it takes the batch.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_leaves

from kgt_ddp.activation_cache.key import KEY_BYTES, Batch
from kgt_ddp.activation_cache.record import Codec, segments
from kgt_ddp.activation_cache.store import Table

DEPTH = 3
_IDLE_S = 1.0
_MOST_IDS = 4_000_000


@dataclass(frozen=True, kw_only=True, eq=False)
class Ahead:
    """One batch that was read ahead."""

    keys: Sequence[bytes]
    padded_length: int
    found: np.ndarray
    """(batch,) which samples had a record."""
    tensors: list[torch.Tensor]
    output: Any
    """The frontier unit's output, already on its device; None unless all were found."""
    ready: Any = None
    """A CUDA event after which `output` may be used."""


class Prefetch:
    """See the module docstring."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.num_bytes = 0
        self._known: dict[int, tuple[bytes, int]] = {}
        self._wanted: deque[Sequence[int]] = deque(maxlen=DEPTH)
        self._done: deque[Ahead] = deque(maxlen=DEPTH)
        self._source: tuple[Table, Codec, Batch] | None = None
        self._changed = threading.Condition()
        self._running = False
        self._stream: Any = None

    def learn(self, ids: Sequence[int], batch: Batch) -> None:
        """These ids were these samples."""
        if len(ids) != batch.size or len(self._known) > _MOST_IDS:
            return
        lengths = batch.lengths if batch.lengths is not None else np.zeros(batch.size, np.int64)
        for sample, key, length in zip(ids, batch.keys, lengths, strict=True):
            self._known[sample] = (key, int(length))

    def use(self, table: Table, codec: Codec, like: Batch) -> None:
        """Read from here from now on. `like`: a batch of this job, whose form the coming ones share."""
        with self._changed:
            if self._source is None or self._source[0] is not table:
                self._done.clear()
            self._source = (table, codec, like)

    def forget(self) -> None:
        """The frontier has moved: what was read is of no use, and keys may mean something else."""
        with self._changed:
            self._source = None
            self._wanted.clear()
            self._done.clear()
            self._known.clear()

    def announce(self, ids: Sequence[int]) -> None:
        """A batch of these ids will come."""
        with self._changed:
            if self._source is None:
                return
            self._wanted.append(list(ids))
            if not self._running:
                self._running = True
                threading.Thread(target=self._work, name="kgtrun-cache-prefetch", daemon=True).start()
            self._changed.notify_all()

    def take(self, batch: Batch) -> Ahead | None:
        """What was read ahead for exactly these samples, if it was."""
        with self._changed:
            for ahead in self._done:
                if ahead.padded_length == batch.padded_length and list(ahead.keys) == list(batch.keys):
                    self._done.remove(ahead)
                    break
            else:
                return None
        if ahead.ready is not None:
            tensors = [t for t in tree_leaves(ahead.output) if isinstance(t, torch.Tensor)]
            stream = torch.cuda.current_stream(tensors[0].device)
            stream.wait_event(ahead.ready)
            for (
                tensor
            ) in tensors:  # or its memory goes to the next batch that is read while the training still needs it
                tensor.record_stream(stream)
        return ahead

    def drain(self, timeout_s: float = 5.0) -> bool:
        """Wait, at most so long, until nothing is to be read; for tests."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._wanted and not self._reading, timeout_s)

    _reading = False

    def _work(self) -> None:
        while True:
            with self._changed:
                if not self._changed.wait_for(lambda: self._wanted, _IDLE_S):
                    self._running = False
                    return
                ids, source = self._wanted.popleft(), self._source
                self._reading = True
            started = time.perf_counter()
            try:
                ahead = self._read(ids, *source) if source is not None else None
            except Exception:  # a hint that cannot be followed; the batch will read for itself
                ahead = None
            with self._changed:
                self.seconds += time.perf_counter() - started
                self._reading = False
                if ahead is not None and self._source is not None and self._source[0] is source[0]:  # type: ignore[index]
                    self._done.append(ahead)
                self._changed.notify_all()

    def _read(self, ids: Sequence[int], table: Table, codec: Codec, like: Batch) -> Ahead | None:
        known = [self._known.get(i) for i in ids]
        if any(entry is None for entry in known):
            return None
        keys = [entry[0] for entry in known if entry is not None]
        lengths = np.array([entry[1] for entry in known if entry is not None])
        padded = int(lengths.max())
        batch = replace(
            like,
            size=len(keys),
            keys=keys,
            lengths=lengths if like.lengths is not None else None,
            padded_length=padded if like.lengths is not None else 0,
        )
        sizes = codec.lengths(batch)
        assert sizes is not None and all(len(key) == KEY_BYTES for key in keys)
        tensors, rows = codec.empty_rows(batch, pinned=codec.on_cuda)
        found = np.zeros(batch.size, bool)
        for row, key in enumerate(keys):
            found[row] = table.get(key, segments(rows, sizes[row], row))
            self.num_bytes += sum(sizes[row]) if found[row] else 0
        output, ready = self._to_device(codec, tensors, batch) if found.all() and not codec.has_shared else (None, None)
        return Ahead(
            keys=keys, padded_length=batch.padded_length, found=found, tensors=tensors, output=output, ready=ready
        )

    def _to_device(self, codec: Codec, tensors: list[torch.Tensor], batch: Batch) -> tuple[Any, Any]:
        device = codec.cuda_device
        if device is None:
            return codec.output(tensors, batch), None
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        with torch.cuda.device(device), torch.cuda.stream(self._stream):  # a thread begins on the first GPU
            output = codec.output(tensors, batch)
            ready = torch.cuda.Event()
            ready.record(self._stream)
        return output, ready
