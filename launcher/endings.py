"""The order in which processes ended.

A thread waits on the pidfd of each rank and notes the moment it becomes readable, so that the first failure is known by
order and not by timestamps of whole seconds. Exit codes are looked at without reaping: the process objects keep theirs.
Whoever owns these must not reap a process before it is noted here (`running` says so), or its code is lost to us.
"""

from __future__ import annotations

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
        self._fds: dict[int, tuple[int, int]] = {}
        self._noted: set[int] = set()
        """Keys of those that need no watching any more, those with an unknown code included."""
        self._poll = select.poll()
        for key, pid in children.items():
            fd = os.pidfd_open(pid)
            self._fds[fd] = (key, pid)
            self._poll.register(fd, select.POLLIN)
        self._wake_reading, self._wake_writing = os.pipe()
        self._poll.register(self._wake_reading, select.POLLIN)
        self._thread = threading.Thread(target=self._run, name="endings", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        open_fds = set(self._fds)
        while open_fds:
            for fd, _ in self._poll.poll():
                if fd == self._wake_reading:
                    return
                self._note(fd)
                self._noted.add(self._fds[fd][0])
                self._poll.unregister(fd)
                open_fds.discard(fd)

    def _note(self, fd: int) -> None:
        key, pid = self._fds[fd]
        now = time.monotonic()
        try:
            status = os.waitid(os.P_PIDFD, fd, os.WEXITED | os.WNOWAIT | os.WNOHANG)
        except ChildProcessError:
            return  # the kernel reaped it, where SIGCHLD is ignored: no one knows its code
        if status is None:
            return
        returncode = status.si_status if status.si_code == os.CLD_EXITED else -status.si_status
        self.endings.append(Ending(key, pid, returncode, now))
        if returncode:
            self.failed.set()

    def running(self) -> list[int]:
        """Pids that have not ended, or whose end has not been noted yet."""
        return [pid for key, pid in self._fds.values() if key not in self._noted]

    def codes(self) -> list[int]:
        """Exit codes so far."""
        return [ending.returncode for ending in self.endings]

    def children(self) -> list[tuple[int, int]]:
        """(key, pid) of all, ended or not."""
        return list(self._fds.values())

    def settle(self, timeout_s: float = 2.0) -> None:
        """Wait until every ending has been noted; all processes are known to have ended."""
        self._thread.join(timeout=timeout_s)

    def close(self) -> None:
        os.write(self._wake_writing, b"x")
        self._thread.join(timeout=5)
        for fd in (*self._fds, self._wake_reading, self._wake_writing):
            os.close(fd)
        self._fds = {}
