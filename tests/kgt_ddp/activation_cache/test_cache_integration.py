"""The cache in real data-parallel training: shuffling samplers, two ranks on one folder, restarts, faults, resumes."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from kgt_ddp import FreezeAwareDDP
from kgt_ddp.activation_cache import cache as cache_module
from kgt_ddp.policies.schedules import Replay
from kgtrun.contract.events import read_events
from tests.kgt_ddp.networks import SmallResNet, SmallViT
from tests.kgt_ddp.training import descend

pytestmark = pytest.mark.integration

SAMPLES = 96
BATCH = 8


def data():
    g = torch.Generator().manual_seed(3)
    return TensorDataset(torch.randn(SAMPLES, 1, 8, 8, generator=g), torch.randint(0, 5, (SAMPLES,), generator=g))


def train(
    rank, world, folder, epochs, *, mode="on", exact=True, augment=False, make=SmallResNet, budget=32 << 20, seed=0
):
    """Losses, final weights, and the cache's totals after each epoch."""
    os.environ.update(KGTRUN_CACHE=mode, KGTRUN_CACHE_DIR=str(folder), KGTRUN_CACHE_BYTES=str(budget))
    os.environ["KGTRUN_CACHE_DTYPE"] = "exact" if exact else "bf16"
    torch.manual_seed(seed)
    ddp = FreezeAwareDDP(make(), policy=Replay([(1, 2)]), interval=3)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    sampler = DistributedSampler(data(), world, rank, shuffle=True, seed=4)
    losses, totals = [], []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for x, y in DataLoader(data(), BATCH, sampler=sampler):
            if augment:
                x = x + 0.01 * torch.randn_like(x)
            losses.append(descend(ddp, optimizer, x, y))
        ddp.freezing.cache.drain()
        torch.distributed.barrier()  # what one rank wrote, the other finds
        totals.append(copy.copy(ddp.freezing.cache.counters))
    state = {n: t.detach().clone() for n, t in ddp.module.state_dict().items()}
    summary = ddp.freezing.summary()["cache"]
    ddp.freezing.close()
    return losses, state, totals, summary


def run_all(rank, world, runs):
    """Several trainings, one after the other in the same ranks; a callable between them runs on rank 0."""
    results = []
    for item in runs:
        torch.distributed.barrier()
        if callable(item):
            if rank == 0:
                item()
            continue
        folder, epochs, options = item
        results.append(train(rank, world, folder, epochs, **options))
    return results


def test_two_ranks_that_shuffle_hit_in_every_later_epoch(run_ranks, tmp_path):
    """A sample that one rank wrote is the other's in the next epoch. Training is the same, bit for bit, and a second job
    with the same weights begins with hits."""
    folder = tmp_path / "cache"
    runs = [(folder, 5, {}), (folder, 5, {"mode": "off"}), (folder, 2, {})]
    for cached, plain, again in run_ranks(2, run_all, runs):
        losses, state, totals, summary = cached
        assert losses == plain[0]
        assert all(torch.equal(state[n], plain[1][n]) for n in state)
        assert plain[3]["state"] == "off"
        assert summary["reason"] is None
        # Epoch 0 freezes and checks, the next one writes what is left; then everything is there.
        for before, after in zip(totals[1:], totals[2:], strict=False):
            assert after.misses == before.misses
            assert after.full_batches - before.full_batches == SAMPLES // BATCH // 2
        assert again[2][1].misses == 0
        assert again[2][1].hits > 0
    assert len(list(folder.iterdir())) == 1, "one file for both ranks"


def test_another_model_other_weights_and_augmented_samples_never_hit(run_ranks, tmp_path):
    makes = [lambda: SmallViT(checkpointing="yes"), lambda: SmallResNet(depth=5), lambda: SmallResNet(width=4)]
    runs = [(tmp_path, 2, {}), *((tmp_path, 1, {"make": make}) for make in makes), (tmp_path, 1, {"seed": 1})]
    runs += [(tmp_path, 3, {"augment": True, "mode": mode}) for mode in ("on", "off")]
    ((first, *others, augmented, plain),) = run_ranks(1, run_all, runs)
    assert first[2][1].hits > 0
    assert [totals[0].hits for _, _, totals, _ in others] == [0, 0, 0, 0]
    assert augmented[0] == plain[0]
    assert augmented[3]["hits"] == 0
    assert augmented[3]["misses"] > 0


def damage(kind, folder):
    for file in Path(folder).iterdir():
        if kind == "flipped":
            blob = bytearray(file.read_bytes())
            blob[4096:] = blob[4096:].translate(bytes(255 - i for i in range(256)))
            file.write_bytes(blob)
        elif kind == "truncated":
            os.truncate(file, 5000)
        elif kind == "foreign":
            file.write_bytes(b"a thesis" * 1000)
        elif kind == "deleted":
            file.unlink()


def test_a_damaged_cache_changes_nothing_but_hits(run_ranks, tmp_path):
    kinds = ["flipped", "truncated", "foreign", "deleted"]
    runs = [(tmp_path / "plain", 2, {"mode": "off"})]
    for kind in kinds:
        folder = tmp_path / kind
        runs += [(folder, 2, {}), lambda kind=kind, folder=folder: damage(kind, folder), (folder, 2, {})]
    (tmp_path / "file").write_text("")
    runs += [(tmp_path / "file" / "cache", 2, {}), (tmp_path / "small", 2, {"budget": 4096})]
    ((plain, *results),) = run_ranks(1, run_all, runs)
    after = dict(zip([*kinds, "no_folder", "no_room"], [*results[1:8:2], *results[8:]], strict=True))
    for kind, (losses, state, totals, summary) in after.items():
        assert losses == plain[0], kind
        assert all(torch.equal(state[n], plain[1][n]) for n in state), kind
        assert totals[0].hits == 0, kind
        assert (summary["state"] == "refused") == (kind in ("foreign", "no_folder", "no_room")), kind


def damage_while_running(rank, world, folder):
    """The file loses its end, then its name, then its content, in the middle of an epoch of hits."""
    seen = []
    original = cache_module.ActivationCache.forward

    def forward(self):
        seen.append(None)
        files = list(Path(folder).glob("*.kgtcache"))
        if len(seen) == 28:
            os.truncate(files[0], 6000)
        elif len(seen) == 34:
            files[0].unlink()
        return original(self)

    cache_module.ActivationCache.forward = forward
    return train(rank, world, folder, 4), train(rank, world, folder, 4, mode="off")


def test_a_file_damaged_while_in_use_is_misses(run_ranks, tmp_path):
    (((losses, _, totals, _), plain),) = run_ranks(1, damage_while_running, tmp_path / "cache")
    # Batches of which some samples were lost compute those alone, in a smaller shape: that moves the last bits.
    assert losses == pytest.approx(plain[0], rel=1e-5)
    assert totals[1].hits > 0
    assert totals[-1].misses > totals[1].misses


def spoiled(rank, world, folder):
    """Weights of the frozen prefix are written past torch's notice; the spot check sees it."""
    from kgt_ddp.activation_cache import frontier_cache

    frontier_cache.SPOT_CHECK_EVERY = 3
    os.environ.update(KGTRUN_CACHE="on", KGTRUN_CACHE_DIR=str(folder))
    torch.manual_seed(0)
    ddp = FreezeAwareDDP(SmallResNet(), policy=Replay([(1, 2)]), interval=3)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.05)
    x = torch.randn(8, 1, 8, 8)
    states = []
    for step in range(40):
        if step == 12:
            with torch.no_grad():
                ddp.module.blocks[0].conv.weight.mul_(1.0)  # seen: looked at again, the same weights, the same file
        if step == 28:  # when nobody compares frozen weights with a copy any more
            ddp.module.blocks[0].conv.weight.data.mul_(1.5)
        optimizer.zero_grad()
        ddp(x).square().mean().backward()
        optimizer.step()
        ddp.freezing.cache.drain()
        states.append((ddp.freezing.cache.state, ddp.freezing.cache.counters.hits))
    return states, ddp.freezing.cache.refused, os.listdir(folder)


def test_weights_written_behind_the_back_end_the_cache(run_ranks, tmp_path):
    ((states, refused, files),) = run_ranks(1, spoiled, tmp_path)
    assert states[11][1] > 0
    assert states[17][1] > states[14][1], "the same weights again: hits go on"
    assert "is not what the block computes" in refused
    assert files == [], "its records are gone"
    assert states[-1][0] == "refused"


def moving(rank, world, folder):
    os.environ.update(KGTRUN_CACHE="on", KGTRUN_CACHE_DIR=str(folder), KGTRUN_CACHE_DTYPE="exact")
    os.environ["KGTRUN_RUN_DIR"] = str(Path(folder) / "run")
    results = []
    for mode in ("on", "off"):
        os.environ["KGTRUN_CACHE"] = mode
        torch.manual_seed(0)
        ddp = FreezeAwareDDP(SmallResNet(), policy=Replay([(1, 1), (13, 3), (25, 2), (37, 0), (43, 2)]), interval=3)
        optimizer = torch.optim.SGD(ddp.parameters(), lr=0.05, momentum=0.9)
        g = torch.Generator().manual_seed(rank)
        batches = [torch.randn(6, 1, 8, 8, generator=g) for _ in range(3)]
        losses, hits = [], {}
        for step in range(60):
            optimizer.zero_grad()
            loss = ddp(batches[step % 3]).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            ddp.freezing.cache.drain()
            if step % 3 == 0:
                ddp.eval()
                with torch.no_grad():
                    ddp(batches[0])
                ddp.train()
            hits[step // 12] = ddp.freezing.cache.counters.full_batches
        ddp.freezing.close()
        results.append((losses, hits))
    return results


def test_the_cache_follows_the_frontier_forward_and_back(run_ranks, tmp_path):
    for (ours, hits), (theirs, _) in run_ranks(2, moving, tmp_path):
        assert ours == theirs
        assert [hits[i + 1] - hits[i] for i in range(4)][:2] == [pytest.approx(5, abs=3)] * 2
        assert hits[4] > hits[3]
    kinds = [e["kind"] for e in read_events(tmp_path / "run")]
    assert kinds.count("cache_end") == 2


def moving_late(rank, world, folder):
    results = []
    for mode in ("on", "off"):
        os.environ.update(KGTRUN_CACHE=mode, KGTRUN_CACHE_DIR=str(folder), KGTRUN_CACHE_DTYPE="exact")
        torch.manual_seed(0)
        policy = Replay([(1, 1), (20, 2), (99, 3)])
        ddp = FreezeAwareDDP(SmallResNet(), policy=policy, interval=3, total_steps=120)
        optimizer = torch.optim.SGD(ddp.parameters(), lr=0.05, momentum=0.9)
        losses, counts = [], {}
        for step, (x, y) in enumerate(batch for _ in range(10) for batch in DataLoader(data(), BATCH, shuffle=True)):
            losses.append(descend(ddp, optimizer, x, y))
            ddp.freezing.cache.drain()
            counts[step] = copy.copy(ddp.freezing.cache.counters)
        frontier = ddp.freezing.frontier
        ddp.freezing.close()
        results.append((losses, counts, frontier, len(os.listdir(folder))))
    return results


def test_late_in_a_job_the_frontier_moves_on_and_the_cut_stays(run_ranks, tmp_path):
    """Blocks between cut and frontier are computed from the old records: all batches go on hitting, and nothing is lost."""
    (((ours, counts, frontier, num_files), (theirs, *_)),) = run_ranks(1, moving_late, tmp_path)
    assert ours == theirs
    assert frontier == 3
    assert num_files == 1, "the first cut's file is gone, and the third block never had one"
    assert counts[119].misses == counts[90].misses
    assert counts[119].full_batches - counts[90].full_batches == 29


def checkpointed(rank, world, folder):
    make = lambda: SmallViT(checkpointing="reentrant")  # noqa: E731
    runs = [train(rank, world, folder, 3, mode=mode, make=make) for mode in ("on", "off")]
    return [(losses, summary) for losses, _, _, summary in runs]


def test_reentrant_checkpoints_behind_the_frontier_recompute_from_cached_values(run_ranks, tmp_path):
    (((ours, summary), (theirs, _)),) = run_ranks(1, checkpointed, tmp_path)
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert summary["reason"] is None
    assert summary["full_batches"] > 0


class Gathers(SmallResNet):
    """Compares with the other ranks' features, as contrastive losses do."""

    def forward(self, x):
        features = super().forward(x)
        others = [torch.zeros_like(features) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(others, features.detach())
        return features - sum(others).mean(0)


def test_a_model_that_communicates_in_its_forward_is_not_run_on_the_side(run_ranks, tmp_path):
    """Rank 0 alone looks at its cache: a forward on the side would wait for rank 1 for ever."""
    runs = [(tmp_path, 2, {"make": Gathers, "mode": mode}) for mode in ("on", "off")]
    for cached, plain in run_ranks(2, run_all, runs):
        assert cached[0] == plain[0]
        assert "communicates in its own forward" in cached[3]["reason"]


def test_a_copy_and_a_pickle_of_the_wrapper_have_no_cache(run_ranks, tmp_path):
    def copies(rank, world, folder):
        os.environ.update(KGTRUN_CACHE="on", KGTRUN_CACHE_DIR=str(folder))
        ddp = FreezeAwareDDP(SmallResNet(), policy=Replay([(1, 2)]), interval=3)
        ddp(torch.randn(4, 1, 8, 8)).sum().backward()
        twin = copy.deepcopy(ddp)
        twin(torch.randn(4, 1, 8, 8)).sum().backward()
        return twin.freezing.active

    assert run_ranks(1, copies, tmp_path) == [False]
