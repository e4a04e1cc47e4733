"""What a disk does to a cache in real training: it fills up, it is read-only, another job has its files there too.

Training is the same bit for bit, whatever of a batch was there: the frozen blocks of `Scaled` multiply and add element by
element, so that a sample's output does not depend on the batch that it is computed in.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.kgt_ddp.activation_cache.test_cache_integration import SAMPLES, train

pytestmark = pytest.mark.integration

RECORD_BYTES = 8 * 8 * 8 * 4


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 1, 1))
        self.bias = nn.Parameter(torch.randn(8, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x * self.weight + self.bias)


class Scaled(nn.Module):
    """See the module docstring. Input (batch, 1, 8, 8), output (batch, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Scale() for _ in range(4)])
        self.head = nn.Linear(8 * 64, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x.flatten(1))


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a tmpfs of so many KiB at a new folder; `mount` and `umount` need root."""
    mounted = []

    def mount(kib):
        place = tmp_path / f"disk{len(mounted)}"
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={kib}k,mode=700", "kgtrun-test", str(place)]
        if os.getuid() != 0 or shutil.which("mount") is None:
            pytest.skip("mounting a tmpfs takes root")
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
        if done.returncode:
            pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
        mounted.append(place)
        return place

    yield mount
    for path in mounted:
        subprocess.run(["umount", "-l", str(path)], check=True, timeout=30)


def fill(folder: Path) -> None:
    """Take what is left of the disk, as some other program would."""
    with (folder / "filler").open("wb", buffering=0) as file:
        file.write(bytes(4 << 20))  # comes out short
    assert os.statvfs(folder).f_bavail == 0


class Lines(logging.Handler):
    """What the cache says."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []
        logging.getLogger("kgt_ddp").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def told(rank, world, runs):
    """Each training with the warnings of its rank; a callable between them runs on rank 0."""
    said, results = Lines(), []
    for item in runs:
        dist.barrier()
        if callable(item):
            if rank == 0:
                item()
            continue
        folder, epochs, options = item
        said.lines = []
        results.append((*train(rank, world, folder, epochs, make=Scaled, **options), said.lines))
    return results


def same(run, plain):
    return run[0] == plain[0] and all(torch.equal(run[1][n], plain[1][n]) for n in plain[1])


@pytest.mark.parametrize("world", [1, 2])
def test_a_disk_that_fills_up_ends_writing_with_one_line_and_reading_goes_on(world, run_ranks, small_disk):
    """A file of 192 KiB of records on a disk of 96 KiB: the kernel says ENOSPC in the middle of an epoch."""
    disk = small_disk(96)
    runs = [(disk / "cache", 5, {}), (disk / "cache", 5, {"mode": "off"})]
    for cached, plain in run_ranks(world, told, runs):
        assert same(cached, plain)
        _, _, totals, summary, lines = cached
        assert summary["reason"] is None
        assert len(lines) == 1, lines
        assert "nothing more is written" in lines[0]
        assert "No space left on device" in lines[0] or "only part of a record" in lines[0]
        # What there was room for is read in every later epoch, and the rest is computed.
        for before, after in zip(totals[1:], totals[2:], strict=False):
            assert 0 < after.hits - before.hits < SAMPLES // world
            assert after.misses > before.misses
        assert plain[4] == []
    assert os.statvfs(disk).f_bavail * 4096 < 2 * RECORD_BYTES + 4096, "the disk was full"


def remount_read_only(disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True, timeout=30)


def test_a_full_or_read_only_disk_is_read_and_holds_nothing_new(run_ranks, small_disk):
    """What was written before is read; of a job with other weights nothing can be kept, not even a file."""
    full, read_only = small_disk(1024), small_disk(1024)
    runs = [(full / "cache", 3, {}), lambda: fill(full), (read_only / "cache", 3, {})]
    runs += [lambda: remount_read_only(read_only)]
    runs += [(disk / "cache", 2, {"seed": seed}) for disk in (full, read_only) for seed in (0, 1)]
    runs += [(full / "cache", 2, {"mode": "off", "seed": seed}) for seed in (0, 1)]
    ((first, second, *results, plain, other_plain),) = run_ranks(1, told, runs, timeout_s=180)
    assert first[4] == second[4] == []
    for again, other, why in ((*results[:2], "No space left on device"), (*results[2:], "Read-only file system")):
        assert same(again, plain)
        assert again[2][-1].misses == 0
        assert again[3]["bytes_written"] == 0
        assert again[4] == []
        assert same(other, other_plain)
        assert other[3]["hits"] == 0
        assert len(other[4]) == 1
        assert why in other[3]["reason"]


def alone(rank, world, folder, budgets):
    """Each rank is a job of its own; both run at the same time, on one folder."""
    dist.barrier()
    dist.destroy_process_group()
    os.environ.update(RANK="0", WORLD_SIZE="1")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store{rank}", rank=0, world_size=1)
    # The same model at the same time, then each job its own: the smaller budget is too small for both.
    seeds = [0, 2 + rank, 0]
    runs = [(folder / str(budget), 3, {"budget": budget, "seed": seed}) for budget in budgets for seed in seeds]
    return told(0, 1, [*runs, *((folder, 3, {"mode": "off", "seed": seed}) for seed in seeds)])


def test_two_jobs_on_one_folder(run_ranks, tmp_path):
    budgets = (32 << 20, 200_000)
    for *cached, a, b, c in run_ranks(2, alone, tmp_path, budgets, timeout_s=180):
        assert all(same(run, plain) for run, plain in zip(cached, [a, b, c] * 2, strict=True))
        assert all(run[3]["hits"] > 0 for run in cached[:3])
        assert cached[2][2][-1].misses == 0
    for budget in budgets:
        taken = sum(f.stat().st_blocks * 512 for f in (tmp_path / str(budget)).iterdir())
        assert taken <= budget + (1 << 20)
