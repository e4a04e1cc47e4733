"""What is done with a batch at a frontier that is ready: look up, put together, compute what is missing, write, compare.

A batch is *full* (every sample was found: the prefix does not run), *partial* (at least `WORTH_JOINING` were found: the
prefix runs for the others), or *computed* (it runs as ever, and what was not there is written). Of every
`SPOT_CHECK_EVERY`th batch with hits these are computed as well and compared; `wrong` then says what does not agree. A
model that goes past what it is to be given, asks for it twice, or is compiled meanwhile, computes as ever; `bypassed` then
says so.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from kgt_ddp.activation_cache import torch_private
from kgt_ddp.activation_cache.arrival import Arrival
from kgt_ddp.activation_cache.counters import Counters
from kgt_ddp.activation_cache.first_use import Route
from kgt_ddp.activation_cache.gate import Gate, Spent
from kgt_ddp.activation_cache.key import Batch
from kgt_ddp.activation_cache.offers import Offers
from kgt_ddp.activation_cache.prefetch import Prefetch
from kgt_ddp.activation_cache.prefix import COMPILED, Prefix
from kgt_ddp.activation_cache.record import Rows, segments
from kgt_ddp.activation_cache.short_circuit import Replacement, now, replaced, stopped_at, timed
from kgt_ddp.activation_cache.side_run import close
from kgt_ddp.activation_cache.store import Table
from kgt_ddp.activation_cache.writer import Writer

WORTH_JOINING = 0.25
"""With fewer hits than this share of a batch the whole batch is computed: one forward in place of two."""
SPOT_CHECK_EVERY = 100
GLANCE = 12
"""Samples of a batch that are looked for first. Where one in four or more are there, 1 in 30 such batches goes on as if
none were."""


class FrontierCache:
    """See the module docstring.

    Args:
        writer: None where the file cannot be written.
        tolerance: of spot checks, relative to a sample's largest element; None for that of the dtype.

    Attributes:
        wrong: what a spot check found, or None.
        bypassed: why what was read is not what the model goes on with, or None.
        finds: whether the latest batch was there, or enough of it.
        num_looked_up: samples of all batches.
    """

    def __init__(
        self,
        model: nn.Module,
        prefix: Prefix,
        table: Table,
        writer: Writer | None,
        *,
        gate: Gate,
        prefetch: Prefetch,
        counters: Counters,
        tolerance: float | None,
    ) -> None:
        assert prefix.unit is not None
        self.wrong: str | None = None
        self.bypassed: str | None = None
        self._model, self._prefix, self._unit = model, prefix, prefix.unit
        self._table, self._writer = table, writer
        self._route: Route
        self._gate, self._prefetch, self._counters = gate, prefetch, counters
        self._tolerance = tolerance
        self._until_spot_check = 1
        self.finds = False
        self.num_looked_up = 0
        self._offers = Offers(model, table.digest, counters)
        self._last = time.perf_counter()

    @contextmanager
    def forward(self, batch: Batch, route: Route, *, key_s: float, arrival: Arrival | None = None) -> Iterator[None]:
        """Around one forward.

        Args:
            route: of the form of this call; records are alike for all forms.
            key_s: what hashing the batch took.
            arrival: which samples were not decoded.
        """
        self._route = route
        spent = Spent(samples=batch.size, lookup_s=key_s)
        value, found, spent = self._look_up(batch, spent, arrival)
        hits = int(found.sum())
        self.num_looked_up += batch.size
        self._counters.batches += 1
        self._counters.hits += hits
        self._counters.misses += batch.size - hits
        if value is not None and self._is_wrong(batch, value, found, arrival):
            value = None
        if arrival is not None:
            if value is None:
                batch = arrival.restore(batch)
            else:
                self._offers.make(arrival, batch, value, partial(route.table, self._unit))
        if value is not None:
            spent = replace(spent, hits=hits, undecoded=self._undecoded(arrival, batch, hits))
            self._counters.forward_saved_s += hits * self._gate.compute_s_per_sample
            with self._giving(value, batch, arrival):
                yield
        else:
            write_s = [0.0]
            with self._computing(batch, found, write_s):
                yield
            spent = replace(spent, write_s=write_s[0])
        self._account(spent)

    def pause(self) -> None:
        """A batch passed by: its time is none of the cache's."""
        self._last = time.perf_counter()

    @property
    def read_only(self) -> bool:
        return self._writer is None

    def has(self, key: bytes) -> bool:
        """Whether a record seems to be there."""
        return self._table.has(key)

    def close(self) -> None:
        self._offers.withdraw()
        self._counters.corrupt += self._table.corrupt
        self._table.close()

    # ---- reading ----------------------------------------------------------------------------------------------------

    def _look_up(self, batch: Batch, spent: Spent, arrival: Arrival | None) -> tuple[Any, np.ndarray, Spent]:
        """(output of the frontier unit or None, which samples were found, seconds)."""
        codec = self._route.codec
        sizes = codec.lengths(batch)
        if sizes is None or not self._route.predictable(batch):
            return None, np.zeros(batch.size, bool), spent
        started = time.perf_counter()
        ahead = self._prefetch.take(batch)
        self._prefetch.use(self._table, codec, batch)
        if ahead is not None:
            found, tensors = ahead.found, ahead.tensors
            self._counters.prefetched += int(found.sum())
        elif not self.finds and (there := self._seem_there(batch)).mean() < WORTH_JOINING:
            return None, there, replace(spent, lookup_s=spent.lookup_s + time.perf_counter() - started)
        else:
            tensors, rows = codec.empty_rows(batch, pinned=codec.on_cuda)
            found = np.array([self._table.get(k, segments(rows, sizes[i], i)) for i, k in enumerate(batch.keys)])
        self._counters.bytes_read += sum(sum(sizes[i]) for i in np.flatnonzero(found))
        spent = replace(spent, lookup_s=spent.lookup_s + time.perf_counter() - started)
        self.finds = bool(found.mean() >= WORTH_JOINING)
        if not self.finds:
            return None, found, spent
        if arrival is not None and not found[list(arrival.waiting)].all():
            return None, found, spent  # a record that was there a moment ago: rare, so all of the batch is computed
        if found.all():
            self._counters.full_batches += 1
        elif self._compute_missing(tensors, batch, np.flatnonzero(~found).tolist()):
            self._counters.partial_batches += 1
        else:
            return None, found, spent
        started = time.perf_counter()
        value = ahead.output if ahead is not None and ahead.output is not None else codec.output(tensors, batch)
        return value, found, replace(spent, read_s=time.perf_counter() - started)

    def _seem_there(self, batch: Batch) -> np.ndarray:
        """Which samples seem to have records; none, where a few of them have none: that is what each batch of new
        samples looks like, and it is to cost little. A record that was overlooked is written again, in its place."""
        there = [self._table.has(key) for key in batch.keys[:GLANCE]]
        if not any(there):
            return np.zeros(batch.size, bool)
        return np.array(there + [self._table.has(key) for key in batch.keys[GLANCE:]])

    def _compute_missing(self, tensors: list[torch.Tensor], batch: Batch, missing: list[int]) -> bool:
        """Run the prefix for some samples and put their records among those that were read, if they are of one kind."""
        part = batch.subset(missing)
        rows = self._route.codec.rows(self._prefix_output(batch, missing), part)
        if rows is None:
            return False
        for data, tensor in zip(rows, tensors, strict=True):
            tensor.view(batch.size, -1).view(torch.uint8).numpy()[missing] = data
        self._write(rows, part, np.zeros(part.size, bool))
        return True

    def _prefix_output(self, batch: Batch, index: list[int] | None = None) -> Any:
        """The frontier unit's output for these samples of a batch, or for all."""
        device = next(self._model.parameters()).device
        args, kwargs = batch.own(batch.arguments() if index is None else batch.select(index), device)
        started = now()
        with torch.no_grad():
            output = stopped_at(self._unit, lambda: self._model(*args, **kwargs))
        self._gate.computed(batch.size if index is None else len(index), now() - started)
        return output

    @contextmanager
    def _giving(self, value: Any, batch: Batch, arrival: Arrival | None) -> Iterator[None]:
        """Around a forward whose frontier unit returns `value`. If it ends without a call of that unit, or with several, it is
        run again, with nothing replaced: layers behind the frontier have then counted one more batch in their running
        statistics."""
        calls: list[bool] = []
        past: list[bool] = []

        def give(_: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            calls.append(torch_private.under_compilation())
            return value

        def unless_past(module: nn.Module, instead: Replacement) -> Replacement:
            compute = module.forward
            return lambda call, args, kwargs: compute(*args, **kwargs) if past else instead(call, args, kwargs)

        def twice_if_past(compute: Callable[..., Any]) -> Replacement:
            def forward(_: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                output = compute(*args, **kwargs)
                if len(calls) == 1:
                    return output
                past.append(True)
                self.bypassed = self._calls(len(calls))
                if arrival is not None:
                    arrival.fill()
                return compute(*args, **kwargs)

            return forward

        table = {**self._route.table(self._unit, value, batch), self._unit: give}
        with replaced(
            {m: unless_past(m, instead) for m, instead in table.items()}
            | {self._model: twice_if_past(self._model.forward)}
        ):
            yield
        if any(calls) and not past:
            self.bypassed = COMPILED

    def _calls(self, num: int) -> str:
        """What speaks against so many calls of the frontier unit in a forward."""
        how = f"is called {num} times in a forward" if num else "is not called as modules are any more"
        return f"block {self._prefix.blocks[-1].name} {how}"

    # ---- computing and writing --------------------------------------------------------------------------------------

    @contextmanager
    def _computing(self, batch: Batch, found: np.ndarray, write_s: list[float]) -> Iterator[None]:
        calls = 0

        def keep(seconds: float, output: Any) -> None:
            nonlocal calls
            calls += 1
            if calls > 1:
                self.bypassed = self._calls(calls)
                return
            self._gate.computed(batch.size, seconds)
            started = time.perf_counter()
            self._route.codec.remember_shared(output, batch)
            rows = self._route.codec.rows(output, batch)
            if rows is not None:
                self._write(rows, batch, found)
            write_s[0] = time.perf_counter() - started

        with self._route.learning(batch), timed(self._model, self._unit, keep):
            yield

    def _write(self, rows: Rows, batch: Batch, found: np.ndarray) -> None:
        sizes = self._route.codec.lengths(batch)
        if sizes is None or self._writer is None or self._writer.stopped is not None or self.wrong is not None:
            return
        records = [(batch.keys[i], segments(rows, sizes[i], i)) for i in np.flatnonzero(~found).tolist()]
        if records and not self._writer.add(self._table, records):
            self._counters.records_dropped += len(records)

    # ---- checking ---------------------------------------------------------------------------------------------------

    def _is_wrong(self, batch: Batch, value: Any, found: np.ndarray, arrival: Arrival | None) -> bool:
        """Now and then compute what was read, and compare: writes to the prefix that nothing else shows end here."""
        self._until_spot_check -= 1
        if self._until_spot_check > 0:
            return False
        self._until_spot_check = SPOT_CHECK_EVERY
        if arrival is not None and arrival.waiting:
            arrival.restore(batch)
            if arrival.ids.dropped:
                return True  # the records are sound; they are those of other samples
        started = time.perf_counter()
        self._counters.spot_checks += 1
        codec = self._route.codec
        computed, ours = codec.samples(self._prefix_output(batch), batch), codec.samples(value, batch)
        assert ours is not None
        if computed is None or not all(
            close(c, o, self._tolerance, on_average=True)
            for row in np.flatnonzero(found)
            for c, o in zip(computed[row], ours[row], strict=True)
        ):
            self.wrong = f"a record of block {self._prefix.blocks[-1].name} is not what the block computes"
        self._counters.check_s += time.perf_counter() - started
        return self.wrong is not None

    def _undecoded(self, arrival: Arrival | None, batch: Batch, hits: int) -> int:
        """How many of the hits need not be decoded, by this rank."""
        if arrival is None or not self._offers.may_cover(arrival, batch):
            self._gate.decodes(0.0)
            return 0
        self._gate.decodes(arrival.ids.decode_s_per_sample)
        return min(hits, arrival.num_known)

    def _account(self, spent: Spent) -> None:
        at = time.perf_counter()
        self._counters.read_s += spent.lookup_s + spent.read_s
        self._counters.write_s += spent.write_s
        self._gate.spent(replace(spent, wall_s=at - self._last))
        self._last = at
