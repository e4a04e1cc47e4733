"""The cache on one GPU: training with it is training without it; records are read ahead through pinned memory and a stream.

Skipped without a CUDA device; docs/development.md says where they ran.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from kgt_ddp import CachedLoader
from tests.kgt_ddp.activation_cache.jobs import both, equal, farthest, job
from tests.kgt_ddp.activation_cache.test_models import CASES
from tests.kgt_ddp.networks import Residual, SmallResNet, SmallViT

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(autouse=True)
def same_kernels(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def on_gpu(batches):
    return tree_map(lambda leaf: leaf.cuda() if isinstance(leaf, torch.Tensor) else leaf, batches)


@pytest.mark.parametrize(("name", "frontier"), [(n, k) for n, (_, _, ks) in CASES.items() for k in ks])
def test_outputs_and_gradients_are_those_without_the_cache(name, frontier, tmp_path):
    """Attention's backward adds up in any order, which no reader of a cache is to blame for."""
    make, batches, _ = CASES[name]
    ours, theirs, summary = both(lambda: make().cuda(), on_gpu(batches), frontier, tmp_path)
    assert summary["reason"] is None
    assert summary["full_batches"] >= 5
    assert equal(ours, theirs) if name == "resnet" else farthest(ours, theirs) < 2e-5


@pytest.mark.parametrize("kind", ["tf32", "autocast inside", "autocast outside"])
def test_kernels_that_round_within_fp32_are_not_taken_for_samples_that_depend_on_each_other(
    kind, tmp_path, monkeypatch
):
    """Convolutions in TF32 (torch's default) and layers under autocast, whose outputs are fp32: half a batch differs from
    the whole by a thousandth and more."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)

    class Wide(SmallViT):
        def __init__(self):
            super().__init__(width=256)

        def forward(self, x):
            with torch.autocast("cuda", torch.bfloat16, enabled=kind == "autocast inside"):
                return super().forward(x).float()

    batches = [((torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(i)).cuda(),), {}) for i in range(4)]
    make = WideResNet if kind == "tf32" else Wide
    with torch.autocast("cuda", torch.bfloat16, enabled=kind == "autocast outside"):
        ours, theirs, summary = both(lambda: make().cuda(), batches, 3, tmp_path)
    assert summary["reason"] is None and summary["full_batches"] >= 5
    assert farthest(ours, theirs) < 3e-2


class WideResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 128, 3, padding=1)
        self.blocks = nn.ModuleList([Residual(128) for _ in range(4)])
        self.head = nn.Linear(128, 5)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


def test_random_numbers_of_the_device_are_noticed_however_small_they_are(tmp_path):
    """Within the tolerance for kernels that round."""

    class Noisy(SmallResNet):
        def forward(self, x):
            return super().forward(x + 1e-4 * torch.randn_like(x))

    _, _, summary = both(lambda: Noisy().cuda(), on_gpu(CASES["resnet"][1]), 2, tmp_path)
    assert "compute with random numbers" in summary["reason"]


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_compact_records_under_autocast(precision, tmp_path):
    """The blocks' outputs are of that precision already: nothing is lost by records of it."""
    make, batches, _ = CASES["resnet"]

    class Cast(SmallResNet):
        def forward(self, x):
            with torch.autocast("cuda", precision):
                return super().forward(x).float()

    ours, theirs, summary = both(lambda: Cast().cuda(), on_gpu(batches), 3, tmp_path, exact=False)
    assert summary["reason"] is None and summary["full_batches"] >= 5
    assert farthest(ours, theirs) < (1e-6 if precision == torch.bfloat16 else 2e-2)


@pytest.mark.parametrize("pinned", [False, True])
def test_what_is_announced_is_read_ahead_onto_the_device(pinned, tmp_path):
    data = TensorDataset(torch.randn(24, 1, 8, 8, generator=torch.Generator().manual_seed(1)))

    class Freezing:
        def __init__(self, cache):
            self.cache = cache

    def loader():
        sampler = RandomSampler(data, generator=torch.Generator().manual_seed(2))
        return DataLoader(data, 4, sampler=sampler, pin_memory=pinned)

    example = ((data[:4][0].cuda(),), {})
    make = lambda: SmallResNet().cuda()  # noqa: E731
    with job(make, example, 3, tmp_path) as cached, job(make, example, 3, tmp_path, mode="off") as plain:
        cached.wrapper.freezing = Freezing(cached.cache)
        for _ in range(4):
            for (x,), (y,) in zip(CachedLoader(loader(), cached.wrapper), loader(), strict=True):
                assert torch.equal(x, y)
                cached.cache.drain()
                cached.cache._prefetch.drain()
                arguments = ((x.cuda(non_blocking=True),), {})
                ours = cached.step(arguments)
                torch.cuda.synchronize()
                assert equal([ours], [plain.step(arguments)])
        assert cached.cache.counters.prefetched >= 24
        assert cached.cache.refused is None
