"""The order in which processes ended.

A thread waits on the pidfd of each rank and notes the moment it becomes readable, so that the first failure is known by
order and not by timestamps of whole seconds. Where there are no pidfds (a kernel before 5.3, a Python built for one) each
rank has a thread that waits for it. Exit codes are looked at without reaping: the process objects keep theirs. Whoever
owns these must not reap a process before it is noted here (`running` says so), or its code is lost to us.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Ending:
    """One process has ended."""

    key: int
    pid: int
    returncode: int
    """Negative for a signal."""
    monotonic_s: float


class EndingWatch:
    """Watches a set of children, given as key → pid; `endings` grows in order."""

    def __init__(self, children: Mapping[int, int]) -> None:
        self.endings: list[Ending] = []
        self.failed = threading.Event()
        self._pids = dict(children)
        self._noted: set[int] = set()
        """Keys of those that need no watching any more, those with an unknown code included."""
        self._noting = threading.Lock()
        self._wake_reading, self._wake_writing = os.pipe()
        self._fds = _pidfds(self._pids)
        if self._fds:
            self._threads = [threading.Thread(target=self._poll, name="endings", daemon=True)]
        else:
            self._threads = [
                threading.Thread(target=self._wait, args=(key,), name=f"ending{key}", daemon=True) for key in self._pids
            ]
        for thread in self._threads:
            thread.start()

    def _poll(self) -> None:
        """Note all, until `close`."""
        poll, left = select.poll(), set(self._fds)
        for fd in (*self._fds, self._wake_reading):
            poll.register(fd, select.POLLIN)
        while left:
            for fd, _ in poll.poll():
                if fd == self._wake_reading:
                    return
                self._note(self._fds[fd])
                poll.unregister(fd)
                left.discard(fd)

    def _wait(self, key: int) -> None:
        """Note one; nothing but its end ends this."""
        with contextlib.suppress(ChildProcessError):
            os.waitid(os.P_PID, self._pids[key], os.WEXITED | os.WNOWAIT)
        self._note(key)

    def _note(self, key: int) -> None:
        with self._noting:  # so that the order of `endings` is that of its moments
            now = time.monotonic()
            try:
                status = os.waitid(os.P_PID, self._pids[key], os.WEXITED | os.WNOWAIT | os.WNOHANG)
            except ChildProcessError:
                status = None  # the kernel reaped it, where SIGCHLD is ignored: no one knows its code
            if status is not None:
                returncode = status.si_status if status.si_code == os.CLD_EXITED else -status.si_status
                self.endings.append(Ending(key, self._pids[key], returncode, now))
                if returncode:
                    self.failed.set()
            self._noted.add(key)

    def running(self) -> list[int]:
        """Pids that have not ended, or whose end has not been noted yet."""
        return [pid for key, pid in self._pids.items() if key not in self._noted]

    def codes(self) -> list[int]:
        """Exit codes so far."""
        return [ending.returncode for ending in self.endings]

    def children(self) -> list[tuple[int, int]]:
        """(key, pid) of all, ended or not."""
        return list(self._pids.items())

    def settle(self, timeout_s: float = 2.0) -> None:
        """Wait until every ending has been noted; all processes are known to have ended."""
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(timeout=max(0.0, deadline - time.monotonic()))

    def close(self) -> None:
        os.write(self._wake_writing, b"x")
        self.settle(5)
        for fd in (*self._fds, self._wake_reading, self._wake_writing):
            os.close(fd)
        self._fds = {}


def _pidfds(children: Mapping[int, int]) -> dict[int, int]:
    """A pidfd for each child, as pidfd → key; none where Python or the kernel has none."""
    fds: dict[int, int] = {}
    try:
        for key, pid in children.items():
            fds[os.pidfd_open(pid)] = key
    except (AttributeError, OSError):
        for fd in fds:
            os.close(fd)
        return {}
    return fds
