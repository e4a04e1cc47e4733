"""How a trainer tells the launcher that it moves, for a microsecond a step.

    from kgtrun.contract import heartbeat
    heartbeat.beat(step, frontier=3, saved_s=12.5)

A beat is 32 bytes in a memory-mapped file whose path comes in KGTRUN_HEARTBEAT; without the variable it does nothing.
The launcher reads the file from outside the process, so a trainer stuck in C++ is seen, too. Nothing is ever waited
for, no failure is raised into training.

Layout, little endian: step (uint64), CLOCK_MONOTONIC in nanoseconds (uint64), frontier (int64, blocks frozen), seconds
saved so far (float64). All zero until the first beat.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from dataclasses import dataclass
from pathlib import Path

from kgtrun.contract.environment import HEARTBEAT

_LAYOUT = struct.Struct("<QQqd")
_pack_into = _LAYOUT.pack_into

_map: mmap.mmap | None = None
_pid: int | None = None


@dataclass(frozen=True)
class Beat:
    """The last beat of one trainer."""

    step: int
    monotonic_s: float
    frontier: int
    saved_s: float


def beat(step: int, *, frontier: int = 0, saved_s: float = 0.0) -> None:
    """Note that `step` is done. Costs about a microsecond."""
    if _pid != os.getpid():  # first call, or a fork (a data-loader worker): never beat for the parent
        _open()
    if _map is not None:
        _pack_into(_map, 0, step, time.monotonic_ns(), frontier, saved_s)


def _open() -> None:
    global _map, _pid
    first, _map, _pid = _pid is None, None, os.getpid()
    path = os.environ.get(HEARTBEAT)
    if not path or not first:
        return
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(fd, _LAYOUT.size)
            _map = mmap.mmap(fd, _LAYOUT.size)
        finally:
            os.close(fd)
    except OSError:
        return


def read(path: Path) -> Beat | None:
    """The last beat in a file; None before the first."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    if len(data) < _LAYOUT.size:
        return None
    step, monotonic_ns, frontier, saved_s = _LAYOUT.unpack_from(data)
    return Beat(step, monotonic_ns / 1e9, frontier, saved_s) if monotonic_ns else None
