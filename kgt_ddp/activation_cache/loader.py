"""A data loader that tells the cache which samples come, so that their records are read ahead.

    loader = kgt_ddp.CachedLoader(DataLoader(dataset, batch_size=64, sampler=sampler), model)
    for images, labels in loader:
        ...

Same batches in the same order. The ids are the indices that the sampler draws; they are hints (see `prefetch`), so a data
set whose sample i is random is slow at worst, never wrong. Without a cache it is the loader that it was given.

Over a `dataset.CachedDataset` the ids are more than hints: samples whose records are there are not decoded.
"""

from __future__ import annotations

import time
import weakref
from collections import deque
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.utils.data import DataLoader, IterableDataset, Sampler

from kgt_ddp.activation_cache.arrival import Arrival
from kgt_ddp.activation_cache.dataset import CachedDataset
from kgt_ddp.activation_cache.prefetch import DEPTH


class CachedLoader:
    """See the module docstring.

    Args:
        loader: over a data set with indices, in order; it is not changed.
        model: the `FreezeAwareDDP` that its batches are for.

    Raises:
        ValueError: the loader has no batches of indices (an iterable data set, or `batch_size=None`), or yields them
            out of order.
    """

    def __init__(self, loader: DataLoader[Any], model: nn.Module) -> None:
        if loader.batch_sampler is None or isinstance(loader.dataset, IterableDataset):
            raise ValueError("CachedLoader needs a loader that draws batches of indices")
        if not getattr(loader, "in_order", True):
            raise ValueError("CachedLoader needs batches in the order in which they were drawn: in_order=True")
        self._drawn: deque[list[int]] = deque()
        self._num_announced = 0  # of the batches in front of `_drawn`: workers draw further ahead than is read
        self._model = weakref.ref(model)
        cache = self._cache()
        self._dataset = loader.dataset
        if cache is not None and cache.off is None and isinstance(loader.dataset, CachedDataset):
            self._dataset = loader.dataset.bound(cache.folder)
        self._loader = DataLoader(
            self._dataset,
            batch_sampler=_Ahead(loader.batch_sampler, self),
            num_workers=loader.num_workers,
            collate_fn=loader.collate_fn,
            pin_memory=loader.pin_memory,
            timeout=loader.timeout,
            worker_init_fn=loader.worker_init_fn,
            multiprocessing_context=loader.multiprocessing_context,
            generator=loader.generator,
            prefetch_factor=loader.prefetch_factor,
            persistent_workers=loader.persistent_workers,
        )
        self.dataset = loader.dataset
        self.sampler = loader.sampler
        self.batch_sampler = loader.batch_sampler

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        self._drawn.clear()
        self._num_announced = 0
        started: float | None = None  # the first batch also waits for workers to start
        for batch in self._loader:
            waited_s = time.perf_counter() - started if started is not None else None
            ids = self._drawn.popleft()
            self._num_announced -= 1
            self._announce()
            cache = self._cache()
            if cache is not None:
                cache.comes(ids, self._arrival(ids, batch, cache.watching, waited_s))
            yield batch
            started = time.perf_counter()

    def drawn(self, ids: list[int]) -> None:
        """The sampler drew a batch that will come."""
        self._drawn.append(ids)
        self._announce()

    def _announce(self) -> None:
        cache = self._cache()
        while self._num_announced < min(len(self._drawn), DEPTH):
            if cache is not None:
                cache.expect(self._drawn[self._num_announced])
            self._num_announced += 1

    def _arrival(self, ids: list[int], batch: Any, watched: bool, waited_s: float | None) -> Arrival | None:
        """The batch of a data set with stable ids."""
        if not isinstance(self._dataset, CachedDataset) or not self._dataset.is_bound:
            return None
        arrival = Arrival(ids, self._dataset, self._loader.collate_fn, batch, watched=watched)
        if waited_s is not None and not arrival.waiting:
            arrival.ids.waited(waited_s / len(ids))
        model = self._model()
        if not watched:
            arrival.give_up()
        elif model is None or not model.training:
            arrival.fill()
        return arrival

    def _cache(self) -> Any:
        return getattr(getattr(self._model(), "freezing", None), "cache", None)


class _Ahead(Sampler[list[int]]):
    """A batch sampler that is `DEPTH` batches ahead of what it yields."""

    def __init__(self, inner: Any, owner: CachedLoader) -> None:
        self._inner = inner
        self._owner = weakref.ref(owner)

    def __len__(self) -> int:
        return len(self._inner)

    def __iter__(self) -> Iterator[list[int]]:
        waiting: deque[list[int]] = deque()
        for ids in self._inner:
            owner = self._owner()
            if owner is not None:
                owner.drawn(ids)
            waiting.append(ids)
            if len(waiting) >= DEPTH:
                yield waiting.popleft()
        yield from waiting
