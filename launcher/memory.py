"""Recognises that the kernel killed a process for want of memory.

The kernel says so only by a counter of the cgroup: it is read at the start and again when a rank died of SIGKILL that
nobody here sent.
"""

from __future__ import annotations

from pathlib import Path


def out_of_memory_kills(root: Path = Path("/")) -> int | None:
    """Processes of this cgroup (and those below) killed for memory so far; None where it cannot be read."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        _, controllers, path = line.split(":", 2)
        place = path.strip("/")
        if not controllers:
            found = _counter(root / "sys/fs/cgroup" / place / "memory.events", "oom_kill")
        elif "memory" in controllers.split(","):
            found = _counter(root / "sys/fs/cgroup/memory" / place / "memory.oom_control", "oom_kill")
        else:
            continue
        if found is not None:
            return found
    return _counter(root / "proc/vmstat", "oom_kill")


def _counter(path: Path, name: str) -> int | None:
    try:
        for line in path.read_text().splitlines():
            key, _, value = line.partition(" ")
            if key == name:
                return int(value)
    except (OSError, ValueError):
        pass
    return None
