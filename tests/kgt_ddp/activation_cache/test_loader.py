"""The loader yields what the loader inside it yields, and what it announces is read ahead; wrong ids cost, and no more."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, TensorDataset

from kgt_ddp import CachedLoader
from kgt_ddp.activation_cache.prefetch import DEPTH
from tests.kgt_ddp.activation_cache.jobs import equal, job
from tests.kgt_ddp.networks import SmallResNet

DATA = TensorDataset(torch.randn(24, 1, 8, 8, generator=torch.Generator().manual_seed(1)))


def loader(dataset=DATA, **options):
    generator = torch.Generator().manual_seed(2)
    return DataLoader(dataset, 4, sampler=RandomSampler(dataset, generator=generator), **options)


class Freezing:
    def __init__(self, cache):
        self.cache = cache


@pytest.fixture
def cached(tmp_path):
    with job(SmallResNet, ((DATA[:4][0],), {}), 3, tmp_path) as made:
        made.wrapper.freezing = Freezing(made.cache)
        yield made
    deadline = time.monotonic() + 5
    while any(t.name.startswith("kgtrun-cache") for t in threading.enumerate()):
        assert time.monotonic() < deadline, "threads end by themselves"
        time.sleep(0.05)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_and_their_order_are_the_loaders(cached, workers):
    ours, theirs = CachedLoader(loader(num_workers=workers), cached.wrapper), loader(num_workers=workers)
    assert len(ours) == len(theirs) == 6
    for _ in range(2):
        assert equal(list(ours), list(theirs))


def test_what_is_announced_is_read_ahead(cached, tmp_path):
    with job(SmallResNet, ((DATA[:4][0],), {}), 3, tmp_path, mode="off") as plain:
        other = loader()
        for _ in range(4):
            for (x,), (y,) in zip(CachedLoader(loader(), cached.wrapper), other, strict=False):
                cached.cache.drain()
                cached.cache._prefetch.drain()
                ours = cached.step(((x,), {}))
                if torch.equal(x, y):
                    assert equal([ours], [plain.step(((x,), {}))])
    counters = cached.cache.counters
    assert counters.prefetched >= 24
    assert counters.prefetched >= counters.hits - 8
    assert cached.cache.refused is None


def test_wrong_ids_never_yield_another_sample(cached, tmp_path):
    """The data set is a random one: its ids mean nothing."""

    class Random(torch.utils.data.Dataset):
        def __len__(self):
            return 24

        def __getitem__(self, index):
            return DATA[torch.randint(24, ()).item()]

    torch.manual_seed(3)
    with job(SmallResNet, ((DATA[:4][0],), {}), 3, tmp_path, mode="off") as plain:
        for _ in range(6):
            for (x,) in CachedLoader(loader(Random()), cached.wrapper):
                cached.cache.drain()
                cached.cache._prefetch.drain()
                ours, theirs = cached.step(((x,), {})), plain.step(((x,), {}))
                assert torch.allclose(ours[0], theirs[0], rtol=1e-4, atol=1e-6)
    assert cached.cache.counters.hits > 0


def test_memory_is_bounded_when_nobody_takes_what_was_read(cached):
    batches = CachedLoader(loader(), cached.wrapper)
    for _ in range(3):
        for (x,) in batches:
            cached.step(((x,), {}))
    prefetch = cached.cache._prefetch
    for _ in range(50):
        cached.cache.expect(range(4))
        prefetch.drain()
    assert len(prefetch._done) <= DEPTH


def test_loaders_that_cannot_be_announced_say_so(cached):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(())

    for bad in (DataLoader(Stream()), DataLoader(DATA, batch_size=None)):
        with pytest.raises(ValueError, match="batches of indices"):
            CachedLoader(bad, cached.wrapper)


def test_without_a_cache_it_is_the_loader_that_it_was_given():
    assert equal(list(CachedLoader(loader(), torch.nn.Linear(1, 1))), list(loader()))
