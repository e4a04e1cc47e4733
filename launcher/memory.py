"""Recognises that the kernel killed a process for want of memory.

The kernel says so only by a counter of the cgroup: it is read at the start and again when a rank died of SIGKILL that
nobody here sent, or failed otherwise, for a process it had started may have been the one that was killed.

Under cgroup v1 the counter of a group leaves out the groups below it; ranks are in the launcher's own.
"""

from __future__ import annotations

from pathlib import Path


def out_of_memory_kills(root: Path = Path("/")) -> int | None:
    """Processes of this cgroup (and, v2, those below) killed for memory so far; None where it cannot be read."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            base, name = root / "sys/fs/cgroup", "memory.events"
        elif "memory" in controllers.split(","):
            base, name = root / "sys/fs/cgroup/memory", "memory.oom_control"
        else:
            continue
        # A container may see its own group as the top of the tree, under a path that is the host's.
        for place in (base / path.strip("/"), base):
            found = _counter(place / name, "oom_kill")
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
