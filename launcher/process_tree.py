"""Finds and ends whole trees of processes on this host, grandchildren included.

Owns: who belongs to a launch, and TERM, bounded wait, KILL. A process belongs to a launch when it carries the launch's
marker in its initial environment (inherited through fork and exec, whatever its parent and session have become), is in
the session of one of the given processes (a child that cleared its environment), or descends from any of these. Only
processes of the same user are ever looked at: others' environments cannot be read.

Standard library only and no other module of ours: the reaper runs this after the launcher has died.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

_POLL_S = 0.02


def pids() -> list[int]:
    """All processes of this host."""
    return [int(name) for name in os.listdir("/proc") if name.isdecimal()]


@dataclass(frozen=True)
class Stat:
    """What /proc/PID/stat says of one process."""

    state: str
    """R running, S sleeping, D uninterruptible, T stopped, t traced, Z zombie, X dead."""
    parent: int
    session: int


def stat(pid: int) -> Stat | None:
    """Read one process, None when there is none."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as f:
            text = f.read()
    except OSError:
        return None
    # The name stands in parentheses and may itself hold spaces and parentheses: the last one ends it.
    fields = text[text.rindex(b")") + 2 :].split()
    return Stat(fields[0].decode(), int(fields[1]), int(fields[3]))


def alive(pid: int) -> bool:
    """Whether the process runs; a zombie does not."""
    found = stat(pid)
    return found is not None and found.state not in "ZX"


def variable(pid: int, name: str) -> list[str]:
    """Value of a variable in the environment a process was started with, as a list of one or none."""
    try:
        with open(f"/proc/{pid}/environ", "rb") as f:
            items = f.read().split(b"\0")
    except OSError:
        return []
    start = name.encode() + b"="
    return [item[len(start) :].decode(errors="replace") for item in items if item.startswith(start)]


def carries(pid: int, marker: str) -> bool:
    """Whether the process was started with `marker` (NAME=VALUE) in its environment; nobody carries the empty one."""
    name, _, value = marker.partition("=")
    return bool(marker) and value in variable(pid, name)


def members(marker: str, roots: Iterable[int] = (), *, exclude: Iterable[int] = ()) -> set[int]:
    """Living processes that carry `marker`, are in the session of one of `roots`, or descend from either."""
    table = {pid: its for pid in pids() if (its := stat(pid)) and its.state not in "ZX"}
    sessions = set(roots)
    found = {pid for pid, its in table.items() if its.session in sessions or carries(pid, marker)}
    children: dict[int, list[int]] = {}
    for pid, its in table.items():
        children.setdefault(its.parent, []).append(pid)
    todo = list(found)
    while todo:
        for child in children.get(todo.pop(), ()):
            if child not in found:
                found.add(child)
                todo.append(child)
    return found - {*exclude, os.getpid()}


def zombies() -> set[int]:
    """Children of this process, adopted ones included, that have ended and not been waited for."""
    try:
        if os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
            return set()  # asked often, and rarely otherwise: it spares a look at all processes of the host
    except ChildProcessError:
        return set()
    me = os.getpid()
    return {pid for pid in pids() if (its := stat(pid)) and its.state == "Z" and its.parent == me}


def reap(zombies: Iterable[int]) -> None:
    """Wait for children that have ended."""
    for pid in zombies:
        try:
            os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:
            pass


def send(pids: Iterable[int], signum: int) -> None:
    """Signal each process that still exists."""
    for pid in pids:
        try:
            os.kill(pid, signum)
        except (ProcessLookupError, PermissionError):
            continue


def _ask(pids: Iterable[int], signum: int) -> None:
    send(pids, signum)
    send(pids, signal.SIGCONT)


def terminate(
    find: Callable[[], set[int]],
    *,
    polite: Iterable[int],
    signum: int,
    grace_s: float,
    hurry: Callable[[], bool] = lambda: False,
    kill_wait_s: float = 10.0,
    between: Callable[[], object] = lambda: None,
) -> set[int]:
    """End every process `find` returns: `signum` to `polite`, up to `grace_s`, then KILL until none is left.

    A process that passes nothing on (a shell around the program) ends at once and leaves those that it started: they get
    `signum` then, once, and the rest of the grace. Those of a process that was no more are not waited for.

    Stopped processes are continued, or they could not act on the polite signal. `find` is asked again and again,
    because a process may fork while it is being ended. `hurry` cuts the grace short; `between` runs at each poll
    (zombies to reap). Returns what could not be ended within `kill_wait_s`, normally nothing.
    """
    asked = {pid for pid in polite if alive(pid)}
    passed_on = not asked
    _ask(asked, signum)
    deadline = time.monotonic() + grace_s
    while time.monotonic() < deadline and not hurry():
        between()
        if not any(alive(pid) for pid in asked):
            if passed_on:
                break
            passed_on, asked = True, find()
            _ask(asked, signum)
            continue
        time.sleep(_POLL_S)
    deadline = time.monotonic() + kill_wait_s
    while True:
        between()
        left = find()
        if not left or time.monotonic() > deadline:
            return left
        send(left, signal.SIGKILL)
        time.sleep(_POLL_S)
