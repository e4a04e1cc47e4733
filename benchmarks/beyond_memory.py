"""The activation cache over more records than the page cache may hold: does it work, how fast, and in how much memory.

A model whose first two blocks make a large output out of a small input trains with them frozen, on one rank, under a memory
limit that covers everything it allocates and every page of the cache's file from then on: writing, then shuffled epochs of
hits through `CachedLoader`. The file is ten times the limit, so nearly every read goes to the disk. The same with a data set
whose file fits is measured first.

The limit is a memory cgroup of version 1 inside the one that this process is in, which takes root. Where there is none, the
file is dropped from the page cache before each epoch, and memory is what the process itself allocates.

Figures: `samples_per_s` and `mb_per_s` of hits, `samples_per_s_in_memory`, `hit_rate` of the measured epochs and `missed`, the
samples that had to be computed; `file_over_limit`, `limit_mb`, `peak_mb` (of the limited group, page cache included) and
`grown_mb` (what the process itself has allocated under the limit, at its highest).
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.harness import Figures, parser

MIB = 1 << 20
CHANNELS, SIDE, BATCH = 192, 16, 32
RECORD_BYTES = CHANNELS * SIDE * SIDE * 2
_CGROUPS = Path("/sys/fs/cgroup/memory")
_MOST_EPOCHS_OF_WRITING = 8
_ROOM = 8
"""Slots for a record: with few of them some find no place, and each epoch computes these. Files are sparse."""


class Widen(nn.Module):
    """(batch, 1, side, side) to (batch, channels, side, side), for next to nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(CHANNELS, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.widen = Widen()
        self.scale = Widen()
        self.head = nn.Linear(CHANNELS, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.scale(self.widen(x)).mean((2, 3)))


@contextmanager
def memory_group() -> Iterator[Path | None]:
    """A memory cgroup inside our own; None where none can be made."""
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    own = next((line.split(":", 2)[2] for line in lines if line.split(":")[1] == "memory"), None)
    made = _CGROUPS / (own or "").lstrip("/") / f"kgtrun-bench-{os.getpid()}"
    try:
        if own is None or not made.parent.is_dir():
            raise FileNotFoundError(made.parent)
        made.mkdir()
    except OSError:
        yield None
        return
    try:
        yield made
    finally:
        made.rmdir()


def sync(folder: Path, *, drop: bool = False) -> None:
    """Have the cache's file on the disk, and no more in the page cache if `drop`."""
    for file in folder.glob("*.kgtcache"):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            if drop:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def hits(folder: Path, num_samples: int, epochs: int, *, drop: bool) -> dict[str, Any]:
    """Train until all records are there, then `epochs` epochs of hits."""
    from kgt_ddp import CachedLoader, FreezeAwareDDP

    os.environ.update(KGTRUN_CACHE="on", KGTRUN_CACHE_DIR=str(folder), KGTRUN_CACHE_DTYPE="bf16")
    os.environ["KGTRUN_CACHE_BYTES"] = str(_ROOM * num_samples * RECORD_BYTES)
    torch.manual_seed(0)
    ddp: Any = FreezeAwareDDP(Network(), blocks=["widen", "scale"], policy="static:blocks=2", total_steps=100_000)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=1e-4)
    data = TensorDataset(torch.randn(num_samples, 1, SIDE, SIDE), torch.randint(0, 10, (num_samples,)))
    loader = CachedLoader(DataLoader(data, BATCH, shuffle=True, drop_last=True), ddp)
    cache = ddp.freezing.cache

    def epoch() -> None:
        for step, (x, y) in enumerate(loader):
            optimizer.zero_grad()
            nn.functional.cross_entropy(ddp(x), y).backward()
            optimizer.step()
            if step % 8 == 0 and not cache.counters.hits:
                # Nothing is to be dropped while the file is filled. And a group of version 1 does not slow down who writes
                # faster than the disk: what is not written back yet counts as its memory, and may end it.
                cache.drain(60.0)
                sync(folder)
        cache.drain(60.0)

    for _ in range(_MOST_EPOCHS_OF_WRITING):
        before = cache.counters.misses
        epoch()
        if cache.counters.misses - before <= num_samples // 1000 and cache.counters.hits:
            break
    else:
        raise SystemExit(f"the cache does not fill: {cache.summary()}")
    counters = cache.counters
    hits_before, misses_before = counters.hits, counters.misses
    samples_per_s, mb_per_s = [], []
    for _ in range(epochs):
        if drop:
            sync(folder, drop=True)
        bytes_before, started = counters.bytes_read, time.perf_counter()
        epoch()
        seconds = time.perf_counter() - started
        samples_per_s.append(num_samples // BATCH * BATCH / seconds)
        mb_per_s.append((counters.bytes_read - bytes_before) / seconds / 1e6)
    found, missed = counters.hits - hits_before, counters.misses - misses_before
    file_bytes = sum(f.stat().st_blocks * 512 for f in folder.iterdir())
    ddp.freezing.close()
    return {
        "samples_per_s": samples_per_s,
        "mb_per_s": mb_per_s,
        "hit_rate": found / (found + missed),
        "missed": missed,
        "file_bytes": file_bytes,
    }


def limited(group: Path | None, limit_bytes: int, times: float, epochs: int, folder: Path, pipe: Any) -> None:
    """Both measurements, in a process of their own."""
    torch.set_num_threads(1)
    os.environ.update(RANK="0", WORLD_SIZE="1")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    small = hits(folder / "small", limit_bytes // 8 // RECORD_BYTES, epochs, drop=False)
    gc.collect()
    peak_bytes = 0
    if group is not None:
        # What was charged before stays where it was: the limit covers the file's pages and what is allocated from now on.
        (group / "memory.limit_in_bytes").write_text(str(limit_bytes))
        (group / "cgroup.procs").write_text(str(os.getpid()))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    large = hits(folder / "large", int(times * limit_bytes / RECORD_BYTES), epochs, drop=group is None)
    if group is not None:
        peak_bytes = int((group / "memory.max_usage_in_bytes").read_text())
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    pipe.send({"small": small, "large": large, "peak_bytes": peak_bytes, "grown_bytes": grown_kib * 1024})
    dist.destroy_process_group()


def measure(limit_bytes: int, times: float, epochs: int) -> tuple[dict[str, Any], bool]:
    """The figures of the limited process, and whether a limit was set."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory(prefix="kgtrun-bench-") as place, memory_group() as group:
        process = context.Process(target=limited, args=(group, limit_bytes, times, epochs, Path(place), theirs))
        process.start()
        theirs.close()
        try:
            return ours.recv(), group is not None
        except EOFError:
            process.join()
            raise SystemExit(f"the limited process ended with {process.exitcode}") from None
        finally:
            process.join(30)
            process.kill()
            process.join()


def main() -> None:
    options = parser(__doc__).parse_args()
    # The limit leaves room for what the cache itself may take: 64 MiB of records waiting, and three batches ahead.
    limit_bytes, times, epochs = (192 * MIB, 1.5, 1) if options.quick else (256 * MIB, 10.0, 3)
    figures = Figures("beyond_memory")
    started = time.monotonic()
    found, has_limit = measure(limit_bytes, times, epochs)
    small, large = found["small"], found["large"]
    figures.sampled("samples_per_s", large["samples_per_s"])
    figures.sampled("mb_per_s", large["mb_per_s"])
    figures.sampled("samples_per_s_in_memory", small["samples_per_s"])
    figures.exact("hit_rate", large["hit_rate"])
    figures.exact("missed", large["missed"])
    figures.exact("file_over_limit", large["file_bytes"] / limit_bytes)
    figures.exact("limit_mb", limit_bytes / 1e6)
    figures.exact("peak_mb", found["peak_bytes"] / 1e6 if has_limit else None)
    figures.exact("grown_mb", found["grown_bytes"] / 1e6)
    figures.fact("limited_by", "memory cgroup" if has_limit else "posix_fadvise before each epoch")
    figures.fact("record_bytes", RECORD_BYTES)
    figures.fact("batch", BATCH)
    figures.fact("epochs", epochs)
    figures.fact("seconds", time.monotonic() - started)
    figures.publish(quick=options.quick)


if __name__ == "__main__":
    main()
