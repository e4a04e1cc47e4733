"""With stable ids samples whose records are there are not decoded, and training is what it is without them."""

from __future__ import annotations

import logging
import os
import time

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, get_worker_info

from kgt_ddp import CachedDataset, CachedLoader, FreezeAwareDDP
from kgt_ddp.activation_cache import arrival, session
from kgt_ddp.activation_cache.arrival import ChangedBatchError
from kgt_ddp.activation_cache.dataset import marked, stand_in
from kgt_ddp.activation_cache.sample_ids import CHECK_EVERY, SampleIds
from kgt_ddp.policies.schedules import Replay
from tests.kgt_ddp.activation_cache.jobs import job
from tests.kgt_ddp.networks import SmallResNet
from tests.kgt_ddp.training import descend

SAMPLES, BATCH = 160, 8
IMAGES = torch.randn(SAMPLES, 1, 8, 8, generator=torch.Generator().manual_seed(1))
LABELS = torch.randint(0, 5, (SAMPLES,), generator=torch.Generator().manual_seed(2)).tolist()


class Counting(Dataset):
    """Counts what is decoded, by any process."""

    def __init__(self, kind="tuple", transform=None):
        # By the first worker, by this process, by the second worker: no two add to one number, or some would be lost.
        self.decoded = torch.zeros(3, dtype=torch.int64).share_memory_()
        self.kind, self.transform = kind, transform

    def __len__(self):
        return SAMPLES

    def __getitem__(self, index):
        worker = get_worker_info()
        self.decoded[1 if worker is None else 2 * worker.id] += 1
        image = IMAGES[index] if self.transform is None else self.transform(IMAGES[index])
        return (image, LABELS[index]) if self.kind == "tuple" else {"image": image, "label": LABELS[index]}


class Freezing:
    def __init__(self, cache):
        self.cache = cache


def with_ids(dataset):
    if dataset.kind == "tuple":
        return CachedDataset(dataset, light=lambda i: (None, LABELS[i]))
    return CachedDataset(dataset, light=lambda i: {"label": LABELS[i]}, input="image")


class Batches:
    """The same batches in every epoch, in another order: a batch is computed as a whole or not at all, bit for bit."""

    def __init__(self):
        self._generator = torch.Generator().manual_seed(3)
        self._batches = torch.randperm(SAMPLES, generator=self._generator).reshape(-1, BATCH).tolist()

    def __len__(self):
        return len(self._batches)

    def __iter__(self):
        return (self._batches[i] for i in torch.randperm(len(self), generator=self._generator).tolist())


def loader(dataset, workers=0):
    return DataLoader(dataset, batch_sampler=Batches(), num_workers=workers)


def train(made, batches, epochs, at=lambda epoch, step: None, decoded=None):
    """Losses by epoch, and what was decoded in each."""
    torch.manual_seed(4)
    parameters = [p for p in made.model.parameters() if p.requires_grad]
    losses, counts = [], []
    for epoch in range(epochs):
        losses.append([])
        before = 0 if decoded is None else int(decoded.sum())
        for step, batch in enumerate(batches):
            at(epoch, step)
            x, y = batch if isinstance(batch, (list, tuple)) else (batch["image"], batch["label"])
            made.model.zero_grad()
            loss = nn.functional.cross_entropy(made.wrapper(x.clone()), y)  # as if copied to a device
            loss.backward()
            with torch.no_grad():
                for p in parameters:
                    if p.grad is not None:
                        p -= 0.01 * p.grad
            losses[-1].append(loss.item())
        made.cache.drain()
        counts.append(0 if decoded is None else int(decoded.sum()) - before)
    return losses, counts


@pytest.fixture
def cached(tmp_path):
    with job(SmallResNet, ((IMAGES[:4],), {}), 3, tmp_path / "cache") as made:
        made.wrapper.freezing = Freezing(made.cache)
        yield made


@pytest.fixture
def plain(tmp_path):
    with job(SmallResNet, ((IMAGES[:4],), {}), 3, tmp_path / "off", mode="off") as made:
        yield made


@pytest.mark.parametrize(("workers", "kind"), [(0, "tuple"), (2, "tuple"), (0, "dict")])
def test_losses_are_the_same_bit_for_bit_and_decoding_ends(cached, plain, workers, kind):
    data = Counting(kind)
    ours, counts = train(cached, CachedLoader(loader(with_ids(data), workers), cached.wrapper), 5, decoded=data.decoded)
    theirs, _ = train(plain, loader(Counting(kind)), 5)
    assert ours == theirs
    # The first epoch learns, the second one repeats for some batches; workers, newly started, decode one sample each.
    assert counts[0] == SAMPLES
    assert counts[1] < SAMPLES
    checks = (SAMPLES / CHECK_EVERY + 1) * max(workers, 1)  # workers race for the count: all may see the same turn
    assert all(count <= checks + workers for count in counts[3:]), counts
    assert cached.cache.refused is None


@pytest.mark.parametrize("workers", [0, 2])
def test_a_frontier_that_moves_under_prefetched_batches(cached, plain, workers):
    """What was left out for the old frontier is decoded by the training process."""
    data = Counting()

    def moving(made):
        def at(epoch, step):
            if (epoch, step) in ((3, 5), (4, 9)):
                made.blocks.move_to(2 if epoch == 3 else 1)

        return at

    ours, _ = train(cached, CachedLoader(loader(with_ids(data), workers), cached.wrapper), 7, moving(cached))
    theirs, _ = train(plain, loader(Counting()), 7, moving(plain))
    assert ours == theirs
    assert not workers or int(data.decoded[1]) > 0
    assert cached.cache.state == "open"


def test_records_that_go_between_look_and_use_are_decoded(cached, plain, tmp_path):
    """Their file is emptied in mid-epoch, with two workers' batches under way."""
    data = Counting()

    def at(epoch, step):
        if (epoch, step) == (3, 4):
            (file,) = (tmp_path / "cache").iterdir()
            os.truncate(file, 4096)
            os.truncate(file, cached.cache._session._ready._table.capacity_bytes)

    ours, _ = train(cached, CachedLoader(loader(with_ids(data), 2), cached.wrapper), 5, at)
    theirs, _ = train(plain, loader(Counting()), 5)
    assert ours[:3] == theirs[:3]
    # Some samples of a batch are computed by themselves: that moves last bits.
    assert torch.allclose(torch.tensor(ours), torch.tensor(theirs), rtol=1e-5)
    assert int(data.decoded[1]) > 0


def test_a_random_transform_is_found_before_anything_is_left_out(cached, plain, caplog):
    def flip(image):
        return image.flip(-1) if torch.rand(()) < 0.1 else image

    data = Counting(transform=flip)
    batches = CachedLoader(loader(with_ids(data)), cached.wrapper)
    with caplog.at_level(logging.WARNING):
        _, counts = train(cached, batches, 4, decoded=data.decoded)
    assert counts == [SAMPLES] * 4
    assert [r for r in caplog.messages if "ids" in r] == [
        "activation cache: sample ids are not used any more, all samples are decoded: "
        "a sample is not the same every time (a random transform?)"
    ]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_transform_that_becomes_random_is_found_by_the_checks(cached, workers):
    """Not one record of another sample's content is written, and ids are dropped within the bound."""
    noise = torch.zeros(1).share_memory_()

    def transform(image):
        fresh = np.random.default_rng()  # torch's is seeded alike in several epochs here: the same noise would be a hit
        return image + noise * torch.from_numpy(fresh.standard_normal(image.shape, np.float32))

    data = Counting(transform=transform)
    batches = CachedLoader(loader(with_ids(data), workers), cached.wrapper)
    _, counts = train(cached, batches, 4, decoded=data.decoded)
    assert counts[3] < SAMPLES / 8
    noise.fill_(0.1)
    _, counts = train(cached, batches, 2, decoded=data.decoded)
    assert batches.dataset.ids.dropped
    assert counts[1] == SAMPLES
    hits = cached.cache.counters.hits
    train(cached, batches, 1)
    assert cached.cache.counters.hits == hits


def test_a_batch_that_is_changed_on_its_way_ends_ids_or_raises(cached):
    class Changing:
        change = staticmethod(lambda x: x)

        def __init__(self, batches):
            self._batches = batches

        def __iter__(self):
            return ((self.change(x), y) for x, y in self._batches)

    batches = CachedLoader(loader(with_ids(Counting())), cached.wrapper)
    changing = Changing(batches)
    train(cached, changing, 3)
    changing.change = lambda x: x * 2
    with pytest.raises(ChangedBatchError, match="put the transform into the data set"):
        train(cached, changing, 1)
    other = CachedLoader(loader(with_ids(Counting())), cached.wrapper)
    changing._batches = other
    train(cached, changing, 2)
    assert other.dataset.ids.dropped


def test_forwards_that_do_not_train_see_real_samples(cached):
    data = Counting()
    batches = CachedLoader(loader(with_ids(data)), cached.wrapper)
    train(cached, batches, 3)
    seen = 0
    for x, _ in batches:
        seen += len(marked(x))
        with torch.no_grad():
            assert bool(torch.isfinite(cached.wrapper(x)).all())
        assert torch.isfinite(x).all()
    assert seen > SAMPLES / 2
    cached.wrapper.eval()
    assert all(bool(torch.isfinite(x).all()) for x, _ in batches)
    assert all(bool(torch.isfinite(x).all()) for x, _ in DataLoader(batches.dataset, BATCH))
    cached.wrapper.train()
    cached.cache.close()
    assert all(bool(torch.isfinite(x).all()) for x, _ in batches)


class ReadsItsInput(SmallResNet):
    def forward(self, x):
        return super().forward(x) + x.mean()


def test_a_model_that_reads_its_input_behind_the_frontier_gets_it(tmp_path, caplog):
    losses = []
    for mode in ("on", "off"):
        with job(ReadsItsInput, ((IMAGES[:4],), {}), 3, tmp_path, mode=mode) as made:
            made.wrapper.freezing = Freezing(made.cache)
            data = Counting()
            found, counts = train(made, CachedLoader(loader(with_ids(data)), made.wrapper), 4, decoded=data.decoded)
            losses.append(found)
            assert counts == [SAMPLES] * 4
            assert mode == "off" or made.cache.counters.hits > 0
    assert losses[0] == losses[1]
    assert "reads them from behind the frontier" in caplog.text


def test_a_model_that_goes_past_its_records_gets_its_input(cached, plain):
    """Its frontier block is called by another name from then on, with samples left out."""

    def leaving(made):
        block = made.blocks[2].unit

        class Other(type(block)):
            def __call__(self, x):
                return type(block).forward(self, x)

        def at(epoch, step):
            if (epoch, step) == (3, 5):
                block.__class__ = Other

        return at

    data = Counting()
    ours, counts = train(cached, CachedLoader(loader(with_ids(data)), cached.wrapper), 5, leaving(cached), data.decoded)
    theirs, _ = train(plain, loader(Counting()), 5, leaving(plain))
    assert counts[3] < SAMPLES
    assert ours == theirs
    assert "is not called as modules are any more" in cached.cache.refused


def test_decoding_saves_what_the_training_waits_for_and_no_more():
    ids = SampleIds(10)
    assert ids.decode_s_per_sample == 0.0
    ids.decoded(0.008, num_workers=0)
    assert ids.decode_s_per_sample == 0.0, "nobody waited yet"
    ids.waited(0.009)
    assert ids.decode_s_per_sample == pytest.approx(0.008)
    for _ in range(200):
        ids.decoded(0.008, num_workers=4)
    assert ids.decode_s_per_sample == pytest.approx(0.002, rel=0.01), "four at a time"
    for _ in range(200):
        ids.waited(1e-5)
    assert ids.decode_s_per_sample == pytest.approx(1e-5, rel=0.01), "workers keep up with the training"


@pytest.mark.parametrize("ids", [True, False])
def test_slow_decoding_opens_the_gate_if_samples_need_not_be_decoded(ids, tmp_path, monkeypatch):
    """A read is taken to cost much more than computing these few blocks, and less than decoding."""
    monkeypatch.setattr(session, "READ_S", 0.01)
    pause = [0.02 if ids else 0.0]

    def slow(image):
        time.sleep(pause[0])
        return image

    with job(SmallResNet, ((IMAGES[:4],), {}), 3, tmp_path, mode="auto") as made:
        made.wrapper.freezing = Freezing(made.cache)
        data = Counting(transform=slow)
        batches = CachedLoader(loader(with_ids(data) if ids else data), made.wrapper)
        train(made, batches, 1)
        assert made.cache.state == ("trying" if ids else "closed")
        if ids:
            pause[0] = 0.005
            _, counts = train(made, batches, 4, decoded=data.decoded)
            assert made.cache.state == "open"
            assert counts[-1] < SAMPLES / 8
            assert "reading" not in made.cache._session.gate.reason
        else:
            assert "reading a sample would take" in made.cache._session.gate.reason


@pytest.mark.parametrize("state", ["closed", "refused"])
def test_nothing_is_hashed_for_ids_while_there_is_no_use_for_them(state, tmp_path, monkeypatch):
    hashed = []
    monkeypatch.setattr(arrival, "_print", lambda tensor, print_=arrival._print: hashed.append(None) or print_(tensor))
    with job(SmallResNet, ((IMAGES[:4],), {}), 3, tmp_path, mode="auto") as made:
        made.wrapper.freezing = Freezing(made.cache)
        batches = CachedLoader(loader(with_ids(Counting())), made.wrapper)
        session = made.cache._session_now()
        if state == "closed":
            session.gate.give_up("nothing comes twice")
        else:
            session.refused = "it cannot be cached"
        train(made, batches, 1)
        assert made.cache.state == state
        assert not hashed


def test_what_light_gives_is_compared(cached, caplog):
    data = Counting()
    wrong = CachedDataset(data, light=lambda i: (None, 0))
    train(cached, CachedLoader(loader(wrong), cached.wrapper), 2)
    assert wrong.ids.dropped
    assert "`light` gives something else" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.int64, torch.float64])
def test_a_stand_in_is_known_by_its_mark_alone(dtype):
    real = torch.ones(3, 5, 7).to(dtype)
    batch = torch.stack([real, stand_in(real, 12), real, stand_in(real, 0)])
    assert marked(batch) == {1: 12, 3: 0}
    assert marked(batch[:, :, 1:]) == {}
    assert marked(batch[..., 0, :2]) == {}
    batch[1, 0, 0, 0] = 0
    assert marked(batch) == {3: 0}


def test_wrong_use_says_so():
    class Endless(Dataset):
        def __getitem__(self, index):
            return torch.zeros(8), 0

    with pytest.raises(ValueError, match="with a length"):
        CachedDataset(Endless(), light=lambda i: (None, 0))


def train_ranks(rank, world, folder, mode):
    """Losses of a real run, and what was decoded in each epoch."""
    os.environ.update(KGTRUN_CACHE=mode, KGTRUN_CACHE_DIR=str(folder), KGTRUN_CACHE_DTYPE="exact")
    os.environ["KGTRUN_CACHE_BYTES"] = str(32 << 20)
    torch.manual_seed(0)
    ddp = FreezeAwareDDP(SmallResNet(), policy=Replay([(1, 2)]), interval=3)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.05, momentum=0.9)
    data = Counting()
    sampler = DistributedSampler(data, world, rank, shuffle=False)
    # Forked: what is counted and `light` are made here, and cannot be pickled.
    options = {"num_workers": 1, "multiprocessing_context": "fork"}
    batches = CachedLoader(DataLoader(with_ids(data), BATCH, sampler=sampler, **options), ddp)
    losses, counts = [], []
    for _ in range(5):
        before = int(data.decoded.sum())
        for x, y in batches:
            losses.append(descend(ddp, optimizer, x, y))
        ddp.freezing.cache.drain()
        counts.append(int(data.decoded.sum()) - before)
    ddp.freezing.close()
    return losses, counts


@pytest.mark.integration
def test_two_ranks_with_workers(run_ranks, tmp_path):
    ours = run_ranks(2, train_ranks, tmp_path, "on")
    theirs = run_ranks(2, train_ranks, tmp_path, "off")
    for (losses, counts), (plain, all_decoded) in zip(ours, theirs, strict=True):
        assert losses == plain
        assert all_decoded == [SAMPLES // 2] * 5
        assert counts[4] <= 4
