"""Which cores this process may use, where they sit, and how much of them the cgroup grants.

Reads /proc and /sys below `root` (a test gives its own tree); decides nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, order=True)
class Cpu:
    """One logical core; equal (node, package, core) means siblings on one physical core."""

    node: int
    package: int
    core: int
    number: int


@dataclass(frozen=True, kw_only=True)
class Topology:
    """The cores of this process."""

    cpus: tuple[Cpu, ...]
    """Allowed ones, ordered by NUMA node, package, core."""
    quota: float | None = None
    """Cores' worth of time that the cgroup grants; None without a limit."""
    granted: int | None = None
    """Cores that the scheduler of a cluster grants without enforcing it; None where it does not say."""

    def physical(self) -> list[frozenset[int]]:
        """Logical numbers by physical core, in order."""
        groups: dict[tuple[int, int, int], set[int]] = {}
        for cpu in self.cpus:
            groups.setdefault((cpu.node, cpu.package, cpu.core), set()).add(cpu.number)
        return [frozenset(group) for group in groups.values()]

    @property
    def limit(self) -> float | None:
        """The smaller of both limits."""
        return min((limit for limit in (self.quota, self.granted) if limit is not None), default=None)


def parse_cpus(text: str) -> frozenset[int]:
    """`0-3,8` as a set.

    Raises:
        ValueError: it is no such list.
    """
    found: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        if not first.isdecimal() or not (last or first).isdecimal():
            raise ValueError(f"{text!r} is not a list of cores like 0-3,8")
        found.update(range(int(first), int(last or first) + 1))
    return frozenset(found)


def format_cpus(cpus: Iterable[int]) -> str:
    """The reverse: `0-3,8`."""
    runs: list[list[int]] = []
    for cpu in sorted(cpus):
        if runs and runs[-1][1] == cpu - 1:
            runs[-1][1] = cpu
        else:
            runs.append([cpu, cpu])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _number(path: Path, default: int) -> int:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return default


def _nodes(root: Path) -> dict[int, int]:
    found = {}
    for directory in sorted((root / "sys/devices/system/node").glob("node[0-9]*")):
        try:
            for cpu in parse_cpus((directory / "cpulist").read_text()):
                found[cpu] = int(directory.name[4:])
        except (OSError, ValueError):
            continue
    return found


def cgroup_quota(root: Path = Path("/")) -> float | None:
    """The tightest CPU limit on the way from this process's cgroup to the root, in cores (cgroup v2, then v1)."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    limits = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        base = root / "sys/fs/cgroup"
        if "cpu" in controllers.split(","):
            base /= "cpu"
        elif controllers:
            continue
        directory = base / path.strip("/")
        while directory == base or base in directory.parents:
            limits.append(_limit(directory))
            directory = directory.parent
    return min((limit for limit in limits if limit), default=None)


def _limit(directory: Path) -> float | None:
    try:
        if (directory / "cpu.max").exists():
            quota, period = (directory / "cpu.max").read_text().split()
        else:
            quota = (directory / "cpu.cfs_quota_us").read_text().strip()
            period = (directory / "cpu.cfs_period_us").read_text().strip()
        return None if quota == "max" or int(quota) <= 0 else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def read_topology(*, allowed: Iterable[int] | None = None, root: Path = Path("/")) -> Topology:
    """The topology of `allowed` cores, by default those of this process."""
    numbers = os.sched_getaffinity(0) if allowed is None else set(allowed)
    nodes = _nodes(root)
    cpus = []
    for number in numbers:
        place = root / f"sys/devices/system/cpu/cpu{number}/topology"
        package = _number(place / "physical_package_id", 0)
        cpus.append(Cpu(nodes.get(number, 0), package, _number(place / "core_id", number), number))
    return Topology(cpus=tuple(sorted(cpus)), quota=cgroup_quota(root))
