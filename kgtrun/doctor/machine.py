"""Cores, memory, limits and directories of this node."""

from __future__ import annotations

import os
import resource
import shutil
import tempfile
from pathlib import Path

import psutil

from kgtrun.contract import environment as names
from kgtrun.doctor.finding import Finding
from launcher import affinity
from launcher.topology import format_cpus, read_topology

_GIB = 2**30
_LONGEST_SOCKET_BASE = 60


def cores() -> list[Finding]:
    """What this process may use of the node, and how two ranks would share it."""
    topology = read_topology()
    allowed = format_cpus(cpu.number for cpu in topology.cpus)
    words = f"{len(topology.cpus)} of {os.cpu_count()} allowed ({allowed}), {len(topology.physical())} physical"
    if topology.quota is not None:
        words += f"; the cgroup grants {topology.quota:g}"
    found = [Finding("cores", words)]
    taken = affinity.taken_by_others(names.CPUS)
    if taken:
        found.append(Finding("cores", f"{format_cpus(taken)} are pinned by another launch"))
    shares = affinity.share(topology, num_ranks=2, num_sidecars=1, taken=taken)
    found.append(Finding("cores", f"2 ranks and a reference here: {shares.words}"))
    if "OMP_NUM_THREADS" in os.environ:
        found.append(Finding("cores", f"OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']} is set and will be kept"))
    return found


def memory() -> list[Finding]:
    """RAM, and /dev/shm, through which data-loader workers hand over batches."""
    ram = psutil.virtual_memory()
    found = [Finding("memory", f"{ram.available / _GIB:.1f} of {ram.total / _GIB:.1f} GiB available")]
    try:
        free = shutil.disk_usage("/dev/shm").free
    except OSError:
        return [*found, Finding("/dev/shm", "not there", "mount a tmpfs: data-loader workers need it")]
    small = free < _GIB
    cure = "give the container more (docker run --shm-size 8g), or num_workers=0" if small else ""
    return [*found, Finding("/dev/shm", f"{free / _GIB:.1f} GiB free", cure)]


def limits() -> list[Finding]:
    """Open files and processes."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    cure = "ulimit -n 65536: many data-loader workers run out of descriptors" if 0 < files < 1024 else ""
    return [Finding("open files", "no limit" if files < 0 else str(files), cure)]


def directories() -> list[Finding]:
    """Where runtime files, runs and the activation cache would go."""
    base = tempfile.gettempdir()
    long = len(base) > _LONGEST_SOCKET_BASE
    found = [Finding("TMPDIR", base + (" is too long for sockets: /tmp is used for them" if long else ""))]
    for topic, place, flag in (
        ("runs", Path("runs"), "--run-dir"),
        ("cache", Path(os.environ.get(names.CACHE_DIR) or base), "--cache-dir"),
    ):
        existing = next(parent for parent in (place.absolute(), *place.absolute().parents) if parent.exists())
        free = shutil.disk_usage(existing).free
        writable = os.access(existing, os.W_OK)
        cure = "" if writable else f"choose another directory with {flag}"
        if writable and free < _GIB:
            cure = f"less than 1 GiB free: make room or choose another directory with {flag}"
        found.append(
            Finding(topic, f"{place} ({free / _GIB:.0f} GiB free{'' if writable else ', not writable'})", cure)
        )
    return found
