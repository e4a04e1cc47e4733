"""The cache at one cut, from its first batch on: may it be cached, and what has to be known before it is.

States: *new* -> *watched* (one forward has shown no collectives, nor that it is compiled) -> *measured* (the prefix was timed
once) -> *ready* (the first use was checked, a file is open) -> *refused* (uncached for good, with a reason), which any state
can turn into.
A refusal belongs to the cut: the next one starts anew. All of it concerns this rank only; nothing here communicates.
What is done with a batch once all is ready is `frontier_cache`'s.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import xxhash
from torch import nn

from kgt_ddp.activation_cache import torch_private
from kgt_ddp.activation_cache.arrival import Arrival
from kgt_ddp.activation_cache.counters import Counters
from kgt_ddp.activation_cache.first_use import NotYetError, ObjectionError, PaddingObjectionError, Route
from kgt_ddp.activation_cache.folder import CacheFolder
from kgt_ddp.activation_cache.forms import Forms
from kgt_ddp.activation_cache.frontier_cache import FrontierCache
from kgt_ddp.activation_cache.gate import Gate
from kgt_ddp.activation_cache.key import Batch, Keys, LeftOutError, UnkeyableError
from kgt_ddp.activation_cache.prefetch import Prefetch
from kgt_ddp.activation_cache.prefix import COMPILED, Prefix
from kgt_ddp.activation_cache.short_circuit import Replacement, replaced, timed
from kgt_ddp.activation_cache.store import ForeignFileError
from kgt_ddp.activation_cache.writer import Writer

READ_BYTES_PER_S = 1e9
READ_S = 20e-6
"""What a read is taken to cost before one was measured: so many bytes a second, and this much a slot."""
_ATTEMPTS = 5
_MOST_CHANGES = 3


class Session:
    """See the module docstring.

    Args:
        gate: decides where it is given; without one the cache is used wherever it can be.
        compact: keep 32-bit floats as bfloat16.
        compiled: whether an earlier cut's session has found that out: looking costs a compilation.
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
        compact: bool,
        gate: Gate | None,
        compiled: bool = False,
    ) -> None:
        self.prefix = prefix
        self.keys = Keys()
        self.gate = gate if gate is not None else Gate()
        self.refused = COMPILED if compiled else prefix.objection()
        self.digest: str | None = None
        self._model = model
        self._folder, self._writer, self._prefetch, self._counters = folder, writer, prefetch, counters
        self._gated, self._compact = gate is not None, compact
        self._forms = Forms(model, prefix, self.keys, compact=compact)
        self._ready: FrontierCache | None = None
        self._watched = False
        self._attempts = 0
        self._changes = 0
        self._key_s = 0.0

    @property
    def state(self) -> str:
        """refused, or what the gate says; without one the cache is open."""
        if self.refused is not None:
            return "refused"
        return self.gate.state if self._gated else "open"

    @property
    def compiled(self) -> bool:
        """Whether that is why it was refused."""
        return self.refused == COMPILED

    @property
    def finds(self) -> bool:
        """Whether the latest batch was there, or a good part of it."""
        return self._ready is not None and self._ready.finds

    @property
    def num_looked_up(self) -> int:
        """Samples that were looked up at this cut."""
        return self._ready.num_looked_up if self._ready is not None else 0

    @contextmanager
    def forward(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], ids: Any, arrival: Arrival | None = None
    ) -> Iterator[None]:
        """Around one training forward of the model. `arrival`: where its batch comes from, if samples have ids."""
        batch = self._admitted(args, kwargs)
        if arrival is not None:
            batch = self._identified(batch, args, kwargs, arrival)
        if batch is None:
            yield
            return
        if ids is not None:
            self._prefetch.learn(ids, batch)
        if not self._watched or self._forms.to_be_watched(batch):
            self.pause()
            with (
                self._watching_calls(),
                torch_private.watching_collectives(self._model, partial(self._collectives, batch)),
            ):
                yield
            return
        route = self._prepared(batch, arrival)
        if route is None:
            self.pause()
            assert self.prefix.unit is not None, "Prefix.objection() comes first"
            with timed(self._model, self.prefix.unit, lambda seconds, _: self.gate.computed(batch.size, seconds)):
                yield
            return
        assert self._ready is not None
        with self._ready.forward(batch, route, key_s=self._key_s, arrival=arrival):
            yield
        if self._ready.wrong is not None:
            self.refused = self._ready.wrong
            self.close(discard=True)
        elif self._ready.bypassed is not None:
            self.refused = self._ready.bypassed
            self.close()

    def pause(self) -> None:
        """A batch passes by: its time is none of the cache's."""
        if self._ready is not None:
            self._ready.pause()

    @property
    def read_only(self) -> bool:
        """Whether there is a file, and it cannot be written."""
        return self._ready is not None and self._ready.read_only

    def close(self, *, discard: bool = False) -> None:
        """Let go of the file; `discard` deletes it, unless another process holds it."""
        self._prefetch.forget()
        if self._ready is not None:
            self._ready.close()
            self._ready = None
            if discard and self.digest is not None:
                self._folder.discard(self.digest)

    # ---- is this batch ours -----------------------------------------------------------------------------------------

    def _admitted(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Batch | None:
        if self.refused is not None:
            return None
        if self._gated and not self.gate.admits():
            self.pause()
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
            batch = self.keys.batch(args, kwargs, self._forms.hopeless)
        except LeftOutError:
            self.pause()
            return None
        except UnkeyableError as error:
            self._attempt(str(error))
            return None
        self._key_s = time.perf_counter() - started
        self._counters.key_s += self._key_s
        return batch

    def _identified(self, batch: Batch | None, args: Any, kwargs: Any, arrival: Arrival) -> Batch | None:
        """The batch with the keys of what was left out. What is not sure to be read is decoded here."""
        if batch is None:
            arrival.give_up()
            return None
        # A batch that is to be checked has to be complete: one of another form, or the first with padding.
        proved = self._watched and self._forms.route(batch) is not None
        ready = self._ready if proved and not batch.padded and not batch.cut else None
        return arrival.identified(
            batch, lambda: self.keys.batch(args, kwargs), ready.has if ready is not None else None
        )

    @contextmanager
    def _watching_calls(self) -> Iterator[None]:
        """Are the prefix's modules called by Python, which looks at the instance, or by code that was compiled, perhaps
        around the wrapper or in between? Such code may go on to do what it did when it was compiled."""
        if self._watched:
            yield
            return
        seen: dict[nn.Module, list[bool]] = {part: [] for part in self.prefix.parts}

        def noting(part: nn.Module) -> Replacement:
            compute, calls = part.forward, seen[part]

            def forward(_: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                calls.append(torch_private.under_compilation())
                return compute(*args, **kwargs)

            return forward

        with replaced({part: noting(part) for part in seen}):
            yield
        assert self.prefix.unit is not None, "Prefix.objection() comes first"
        if any(any(calls) for calls in seen.values()):
            self.refused = COMPILED
        elif not seen[self.prefix.unit]:
            self._attempt(f"block {self.prefix.blocks[-1].name} was not called as modules are")
        else:
            self._watched = True

    def _collectives(self, batch: Batch, found: str | None) -> None:
        """Ranks run on the side when each sees fit: a model that communicates in its forward would wait for others."""
        reason = f"the model communicates in its own forward ({found})"
        if found is None:
            self._forms.watched(batch)
        elif self._forms.is_first(batch):
            self.refused = reason
        else:
            self._forms.leave_out(batch, reason)

    def _weights_changed(self) -> None:
        self._changes += 1
        if self._changes > _MOST_CHANGES:
            self.refused = "weights or buffers that the frozen prefix may read are written again and again"
        self.close()
        self._forms.forget()

    def _attempt(self, reason: str) -> None:
        self._attempts += 1
        if self._attempts >= _ATTEMPTS:
            self.refused = reason

    def _prepared(self, batch: Batch, arrival: Arrival | None) -> Route | None:
        """How to go round the prefix, if everything is there to use the cache for this batch; if not, do one thing about it."""
        if not self.gate.compute_s_per_sample:
            return None
        if self._ready is None:
            self.gate.decodes(
                arrival.ids.decode_s_per_sample if arrival is not None and arrival.may_be_left_out else 0.0
            )
        route = self._forms.route(batch)
        if route is None:
            self._check(batch)  # the keys may be others now: from the next batch on
            return None
        return route if self._ready is not None or self._open(route) else None

    def _check(self, batch: Batch) -> None:
        started = time.perf_counter()
        if self._forms.is_first(batch):
            self.close()
        try:
            route = self._forms.prove(batch)
        except NotYetError:
            self._attempt(
                "no batch was fit for the check of the first use: it takes two samples, finite numbers, and a form of the "
                "model's call that comes again (no argument beside the samples is to be another one each time)"
            )
        except PaddingObjectionError:
            self.keys.trims = False
            self._forms.forget()
            self.close()
        except ObjectionError as error:
            self.refused = str(error)
        else:
            if route is not None:
                sizes = route.codec.lengths(batch) or [[0]]
                size = sum(map(sum, sizes)) / len(sizes)
                self.gate.predict(size / READ_BYTES_PER_S + READ_S * max(size / route.codec.slot_bytes, 1))
        finally:
            self._counters.check_s += time.perf_counter() - started

    def _open(self, route: Route) -> bool:
        weights = self.prefix.digest()
        layout = f"{route.codec.layout}{self.keys.trims}{sorted(self.keys.excluded)}"
        self.digest = xxhash.xxh3_128_hexdigest(f"{weights}{layout}".encode())
        try:
            table, writable = self._folder.open(self.digest, route.codec.slot_bytes)
        except (OSError, ForeignFileError) as error:
            self.refused = f"{self._folder.path}: {error}"
            return False
        self._ready = FrontierCache(
            self._model,
            self.prefix,
            table,
            self._writer if writable else None,
            gate=self.gate,
            prefetch=self._prefetch,
            counters=self._counters,
            tolerance=2e-2 if self._compact else None,
        )
        return True
