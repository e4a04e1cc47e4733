"""Shares the cores of this node among ranks and side-cars. A pure function of numbers, but for `taken_by_others`.

With two physical cores or more for each rank and one for each side-car, and no cgroup quota or grant of a scheduler below
that (under which a core of one's own is not one), ranks get disjoint runs of neighbouring cores in NUMA order, none
across two nodes where runs of that length fit so, and side-cars the last cores that are left. Otherwise nothing is
pinned: on a crowded machine the scheduler does better than any fixed share. Data-loader workers inherit the cores of
their rank; from four cores on, one is left to them when threads are counted.

A rank that has the node to itself is left alone, as torchrun leaves it, unless the scheduler of a cluster says which part
of the node is the job's. OMP_NUM_THREADS otherwise follows the share and is not 1 for everyone. What the user has set
himself is never touched: that is decided by the caller, who knows the environment.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass

from launcher import process_tree
from launcher.topology import Topology, format_cpus, parse_cpus

_CORES_WORTH_A_LOADER = 4


@dataclass(frozen=True, kw_only=True)
class Shares:
    """What each process gets."""

    ranks: tuple[frozenset[int], ...]
    """Logical cores by local rank; empty sets where nothing is pinned."""
    sidecars: tuple[frozenset[int], ...]
    rank_threads: int
    """0: leave it to the library."""
    sidecar_threads: int
    words: str
    """One line for the user."""


def share(topology: Topology, *, num_ranks: int, num_sidecars: int, taken: Iterable[int] = ()) -> Shares:
    """Divide the cores. `taken` are logical cores that another launch has pinned."""
    busy = frozenset(taken)
    cores = topology.physical()
    free = [core for core in cores if not core & busy]
    limit = topology.limit
    allowed = len(cores) if limit is None else min(len(cores), max(1, math.ceil(limit)))
    if num_ranks == 1 and not num_sidecars and not busy and topology.granted is None:
        return Shares(ranks=(frozenset(),), sidecars=(), rank_threads=0, sidecar_threads=1, words="one rank, all cores")
    enough = len(free) >= 2 * num_ranks + num_sidecars
    if limit is not None and limit < len(cores):
        who = "the cgroup" if limit == topology.quota else "the job"
        return _unpinned(allowed, num_ranks, num_sidecars, f"{who} grants {limit:g} of {len(cores)} cores")
    if not enough:
        why = f"{len(free)} of {allowed} cores are free" if busy & frozenset().union(*cores) else f"{allowed} cores"
        return _unpinned(allowed, num_ranks, num_sidecars, why)
    node_of = {cpu.number: cpu.node for cpu in topology.cpus}
    return _pinned(free, [node_of[min(core)] for core in free], num_ranks, num_sidecars)


def _unpinned(allowed: int, num_ranks: int, num_sidecars: int, why: str) -> Shares:
    left = allowed - num_sidecars if allowed - num_sidecars >= num_ranks else allowed
    threads = max(1, left // num_ranks)
    return Shares(
        ranks=(frozenset(),) * num_ranks,
        sidecars=(frozenset(),) * num_sidecars,
        rank_threads=threads,
        sidecar_threads=1,
        words=f"{why}: none pinned, OMP_NUM_THREADS={threads} for each of {num_ranks} ranks",
    )


def _pinned(free: list[frozenset[int]], nodes: list[int], num_ranks: int, num_sidecars: int) -> Shares:
    size = (len(free) - num_sidecars) // num_ranks
    starts = _starts(nodes, size, num_ranks)
    ranks = tuple(frozenset().union(*free[start : start + size]) for start in starts)
    left = [core for core in free if not any(core <= cores for cores in ranks)]
    sidecars = tuple(left[len(left) - num_sidecars :])
    threads = size - 1 if size >= _CORES_WORTH_A_LOADER else size
    words = f"{num_ranks} ranks get {size} cores each ({'; '.join(map(format_cpus, ranks))}), OMP_NUM_THREADS={threads}"
    if sidecars:
        words += f"; references get {'; '.join(map(format_cpus, sidecars))}"
    return Shares(ranks=ranks, sidecars=sidecars, rank_threads=threads, sidecar_threads=1, words=words)


def _starts(nodes: list[int], size: int, num_ranks: int) -> list[int]:
    """Where the run of each rank begins. `nodes`: NUMA node of each core, ascending."""
    inside, at = [], 0
    while at + size <= len(nodes):
        if nodes[at] == nodes[at + size - 1]:
            inside.append(at)
            at += size
        else:
            at += 1
    return inside[:num_ranks] if len(inside) >= num_ranks else [rank * size for rank in range(num_ranks)]


def taken_by_others(variable: str) -> frozenset[int]:
    """Cores that processes of this user name in `variable` in their environment: other launches on this node."""
    found: set[int] = set()
    for pid in process_tree.pids():
        for value in process_tree.variable(pid, variable):
            try:
                found |= parse_cpus(value) & os.sched_getaffinity(pid)
            except (ValueError, OSError):
                continue
    return frozenset(found)
