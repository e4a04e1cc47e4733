"""The cache at one frontier: prefix, route, file and gate, and what is done with one batch.

States: *new* (nothing known) -> *measured* (the prefix was computed and timed once) -> *ready* (the first use was checked,
a file is open) -> *refused* (uncached for good, with a reason), which any state can turn into. A refusal belongs to the
frontier: the next one starts anew. All of it concerns this rank only; nothing here communicates.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xxhash
from torch import nn
from torch.utils._pytree import tree_map

from kgt_ddp.activation_cache.counters import Counters
from kgt_ddp.activation_cache.first_use import NotYetError, ObjectionError, PaddingObjectionError, Route, first_use
from kgt_ddp.activation_cache.folder import CacheFolder
from kgt_ddp.activation_cache.gate import Gate, Spent
from kgt_ddp.activation_cache.key import Batch, Keys, UnkeyableError
from kgt_ddp.activation_cache.prefetch import Prefetch
from kgt_ddp.activation_cache.prefix import Prefix
from kgt_ddp.activation_cache.record import Codec, Rows, segments
from kgt_ddp.activation_cache.short_circuit import captured, replaced, stopped_at
from kgt_ddp.activation_cache.side_run import close
from kgt_ddp.activation_cache.store import ForeignFileError, Table
from kgt_ddp.activation_cache.writer import Writer

WORTH_JOINING = 0.25
"""With fewer hits than this share of a batch the whole batch is computed: one forward in place of two."""
SPOT_CHECK_EVERY = 100
READ_BYTES_PER_S = 1e9
READ_S = 20e-6
"""What a read is taken to cost before one was measured: so many bytes a second, and this much a slot."""
_ATTEMPTS = 5
_MOST_CHANGES = 3


class Session:
    """See the module docstring.

    Args:
        gated: whether the gate decides; without it the cache is used wherever it can be.
        compact: keep 32-bit floats as bfloat16.
    """

    def __init__(
        self,
        model: nn.Module,
        prefix: Prefix,
        *,
        folder: CacheFolder,
        writer: Writer,
        prefetch: Prefetch,
        counters: Counters,
        gated: bool,
        compact: bool,
        patience: int,
    ) -> None:
        self.prefix = prefix
        self.keys = Keys()
        self.gate = Gate(patience)
        self.refused = prefix.objection()
        self.digest: str | None = None
        self._model = model
        self._folder, self._writer, self._prefetch, self._counters = folder, writer, prefetch, counters
        self._gated, self._compact = gated, compact
        self._route: Route | None = None
        self._table: Table | None = None
        self._writable = False
        self._attempts = 0
        self._changes = 0
        self._until_spot_check = 1
        self._key_s = 0.0
        self._last = time.perf_counter()

    @contextmanager
    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any], ids: Any) -> Iterator[None]:
        """Around one training forward of the model."""
        batch = self._admitted(args, kwargs)
        if batch is None:
            yield
            return
        if ids is not None:
            self._prefetch.learn(ids, batch)
        if not self._prepared(batch):
            with self._timing(batch):
                yield
            return
        with self._with_cache(batch):
            yield

    def close(self, *, discard: bool = False) -> None:
        """Let go of the file; `discard` deletes it, unless another process holds it."""
        self._prefetch.forget()
        if self._table is not None:
            self._counters.corrupt += self._table.corrupt
            self._table.close()
            self._table = None
            if discard and self.digest is not None:
                self._folder.discard(self.digest)

    # ---- is this batch ours -----------------------------------------------------------------------------------------

    def _admitted(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Batch | None:
        if self.refused is not None or (self._gated and not self.gate.admits()):
            return None
        if self.prefix.changed():
            self._weights_changed()
        hook = self.prefix.hooked()
        if hook is not None or self.refused is not None:
            self.refused = self.refused or hook
            return None
        if self.prefix.observed():
            return None
        started = time.perf_counter()
        try:
            batch = self.keys.batch(args, kwargs)
        except UnkeyableError as error:
            self._attempt(str(error))
            return None
        self._key_s = time.perf_counter() - started
        self._counters.key_s += self._key_s
        return batch

    def _weights_changed(self) -> None:
        self._changes += 1
        if self._changes > _MOST_CHANGES:
            self.refused = "weights in the frozen prefix are written again and again"
        self.close()
        self._route = None

    def _attempt(self, reason: str) -> None:
        self._attempts += 1
        if self._attempts >= _ATTEMPTS:
            self.refused = reason

    def _prepared(self, batch: Batch) -> bool:
        """Whether everything is there to use the cache for this batch; if not, do one thing about it."""
        if not self.gate.compute_s_per_sample:
            return False
        if self._route is None or (batch.padded and not self._route.padding_seen and self._route.codec.by_token):
            return self._check(batch) and False  # the keys may be others now: from the next batch on
        return self._table is not None or self._open(self._route.codec)

    def _check(self, batch: Batch) -> bool:
        started = time.perf_counter()
        self.close()
        try:
            self._route = first_use(self._model, self.prefix, self.keys, batch, compact=self._compact)
        except NotYetError:
            self._attempt("no batch was fit for the check of the first use (it takes two samples and finite numbers)")
            return False
        except PaddingObjectionError:
            self.keys.trims, self._route = False, None
            self.close()
            return False
        except ObjectionError as error:
            self.refused = str(error)
            return False
        finally:
            self._counters.check_s += time.perf_counter() - started
        self.keys.excluded |= self._route.excluded
        sizes = self._route.codec.lengths(batch) or [[0]]
        size = sum(map(sum, sizes)) / len(sizes)
        self.gate.predict(size / READ_BYTES_PER_S + READ_S * max(size / self._route.codec.slot_bytes, 1))
        return True

    def _open(self, codec: Codec) -> bool:
        weights = self.prefix.digest()
        layout = f"{codec.layout}{self.keys.trims}{sorted(self.keys.excluded)}"
        self.digest = xxhash.xxh3_128_hexdigest(f"{weights}{layout}".encode())
        try:
            self._table, self._writable = self._folder.open(self.digest, codec.slot_bytes)
        except (OSError, ForeignFileError) as error:
            self.refused = f"{self._folder.path}: {error}"
            return False
        return True

    # ---- one batch --------------------------------------------------------------------------------------------------

    @contextmanager
    def _timing(self, batch: Batch) -> Iterator[None]:
        """Compute as ever and measure how long the prefix takes."""
        assert self.prefix.unit is not None
        with captured(self.prefix.unit, self._stopwatch(batch.size)):
            yield

    def _stopwatch(self, samples: int, then: Callable[[Any], None] = lambda output: None) -> Callable[[Any], None]:
        _synchronize()
        started = time.perf_counter()

        def stop(output: Any) -> None:
            _synchronize()
            self.gate.computed(samples, time.perf_counter() - started)
            then(output)

        return stop

    @contextmanager
    def _with_cache(self, batch: Batch) -> Iterator[None]:
        route, table, unit = self._route, self._table, self.prefix.unit
        assert route is not None and table is not None and unit is not None
        spent = _Meter(lookup_s=self._key_s)
        self._counters.batches += 1
        value, found = self._look_up(route, table, batch, spent)
        hits = int(found.sum())
        self._counters.hits += hits
        self._counters.misses += batch.size - hits
        if value is not None and hits == batch.size and not self._spot_check(route, batch, value):
            value = None
        if value is not None:
            self._counters.forward_saved_s += hits * self.gate.compute_s_per_sample
            with replaced(route.table(unit, value, batch)):
                yield
        else:
            with (
                route.learning(batch),
                captured(unit, self._stopwatch(batch.size, lambda output: self._keep(output, batch, found, spent))),
            ):
                yield
        self._account(batch, hits if value is not None else 0, spent)

    def _look_up(self, route: Route, table: Table, batch: Batch, spent: _Meter) -> tuple[Any, np.ndarray]:
        """(output of the frontier unit or None, which samples were found)."""
        codec = route.codec
        sizes = codec.lengths(batch)
        nothing = np.zeros(batch.size, bool)
        if sizes is None or not route.predictable(batch):
            return None, nothing
        started = time.perf_counter()
        ahead = self._prefetch.take(batch)
        if ahead is not None:
            found, tensors = ahead.found, ahead.tensors
            self._counters.prefetched += int(found.sum())
        else:
            tensors, rows = codec.empty_rows(batch, pinned=codec.on_cuda)
            found = np.fromiter(
                (table.get(k, segments(rows, sizes[i], i)) for i, k in enumerate(batch.keys)), bool, batch.size
            )
            self._counters.bytes_read += sum(sum(sizes[i]) for i in np.flatnonzero(found))
        self._prefetch.use(table, codec, batch)
        spent.lookup_s += time.perf_counter() - started
        if found.mean() < WORTH_JOINING:
            return None, found
        if not found.all():
            self._compute_missing(codec, tensors, batch, np.flatnonzero(~found))
            self._counters.partial_batches += 1
        else:
            self._counters.full_batches += 1
        started = time.perf_counter()
        value = ahead.output if ahead is not None and ahead.output is not None else codec.output(tensors, batch)
        spent.read_s += time.perf_counter() - started
        self._counters.read_s += spent.lookup_s + spent.read_s
        return value, found

    def _compute_missing(self, codec: Codec, tensors: list[torch.Tensor], batch: Batch, missing: np.ndarray) -> None:
        """Run the prefix for some samples and put their records among those that were read."""
        index = missing.tolist()
        part = batch.subset(index)
        stop = self._stopwatch(part.size)
        output = self._prefix_output(batch, index)
        stop(output)
        rows = codec.rows(output, part)
        assert rows is not None, "the first use has shown that samples are independent"
        for data, tensor in zip(rows, tensors, strict=True):
            tensor.view(batch.size, -1).view(torch.uint8).numpy()[index] = data
        self._write(rows, part, np.zeros(part.size, bool))

    def _prefix_output(self, batch: Batch, index: list[int] | None = None) -> Any:
        unit = self.prefix.unit
        assert unit is not None
        device = next(self._model.parameters()).device
        whole = index is None or len(index) == batch.size
        args, kwargs = batch.arguments() if whole else batch.select(index or [])
        args, kwargs = _moved((args, kwargs), device)
        with torch.no_grad():
            return stopped_at(unit, lambda: self._model(*args, **kwargs))

    def _keep(self, output: Any, batch: Batch, found: np.ndarray, spent: _Meter) -> None:
        """The frontier unit has computed: learn shapes, hand the missing records to the writer."""
        route = self._route
        if route is None:
            return
        started = time.perf_counter()
        route.codec.remember_shared(output, batch)
        rows = route.codec.rows(output, batch)
        if rows is not None:
            self._write(rows, batch, found)
        spent.write_s += time.perf_counter() - started

    def _write(self, rows: Rows, batch: Batch, found: np.ndarray) -> None:
        sizes = self._route.codec.lengths(batch) if self._route is not None else None
        if sizes is None or self._table is None or not self._writable or self._writer.stopped is not None:
            return
        records = [(batch.keys[i], segments(rows, sizes[i], i)) for i in np.flatnonzero(~found).tolist()]
        if records and not self._writer.add(self._table, records):
            self._counters.records_dropped += len(records)

    def _spot_check(self, route: Route, batch: Batch, value: Any) -> bool:
        """Now and then compute what was read, and compare: writes to the prefix that nothing else shows end here."""
        self._until_spot_check -= 1
        if self._until_spot_check > 0:
            return True
        self._until_spot_check = SPOT_CHECK_EVERY
        started = time.perf_counter()
        self._counters.spot_checks += 1
        stop = self._stopwatch(batch.size)
        output = self._prefix_output(batch)
        stop(output)
        ours, computed = route.codec.samples(value, batch), route.codec.samples(output, batch)
        assert ours is not None and computed is not None
        tolerance = 2e-2 if self._compact else None
        same = all(
            close(c, o, tolerance) for a, b in zip(computed, ours, strict=True) for c, o in zip(a, b, strict=True)
        )
        self._counters.check_s += time.perf_counter() - started
        if not same:
            self.refused = f"a record of block {self.prefix.blocks[-1].name} is not what the block computes"
            self.close(discard=True)
        return same

    def _account(self, batch: Batch, hits: int, spent: _Meter) -> None:
        now = time.perf_counter()
        self._counters.write_s += spent.write_s
        self.gate.spent(
            Spent(
                samples=batch.size,
                hits=hits,
                wall_s=now - self._last,
                lookup_s=spent.lookup_s,
                read_s=spent.read_s,
                write_s=spent.write_s,
            )
        )
        self._last = now


@dataclass
class _Meter:
    """Seconds of one batch."""

    lookup_s: float = 0.0
    read_s: float = 0.0
    write_s: float = 0.0


def _moved(arguments: Any, device: torch.device) -> Any:
    return tree_map(lambda t: t.to(device) if isinstance(t, torch.Tensor) else t, arguments)


def _synchronize() -> None:
    """On CUDA a clock tells nothing before the queue is empty."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
