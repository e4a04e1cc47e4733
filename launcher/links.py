"""Bounds how long a dead link can hold this process: every TCP connection that leaves the host gets a time limit.

Torch's stores wait in recv without a limit of their own. When the other host vanishes without a word (cable out, power
cut), the kernel repeats itself for a quarter of an hour before it gives the connection up, and the thread that waits is
deaf to signals meanwhile. Here a thread looks at the sockets of this process every `_LOOK_S` and sets, on those it has
not seen yet, TCP_USER_TIMEOUT (data sent, but not acknowledged) and keepalive (nothing to send): such a wait then
fails with an ordinary error of torch's after `timeout_s`.

Only options of sockets are touched, never their data. A link that comes back within the limit loses nothing.
"""

from __future__ import annotations

import os
import socket
import stat
import threading
from contextlib import suppress

_LOOK_S = 0.5
_PROBES = 3


def bound(connection: socket.socket, timeout_s: float) -> None:
    """Have the kernel give up a connection whose other end has been silent for `timeout_s`."""
    every_s = max(1, int(timeout_s / (_PROBES + 1)))
    for level, name, value in (
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, every_s),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, every_s),
        (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _PROBES),
        (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(timeout_s * 1000)),
    ):
        connection.setsockopt(level, name, value)


def leaves_host(connection: socket.socket) -> bool:
    """Whether it is a TCP connection to another host."""
    if connection.type != socket.SOCK_STREAM or connection.family not in (socket.AF_INET, socket.AF_INET6):
        return False
    try:
        here, there = connection.getsockname()[0], connection.getpeername()[0]
    except OSError:  # listening, or not connected yet
        return False
    return here != there


class Links:
    """Keeps all connections of this process bounded until `close`. `timeout_s` 0 does nothing."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._known: set[int] = set()
        """Inodes of sockets that are settled."""
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        if timeout_s:
            self._thread = threading.Thread(target=self._run, name="links", daemon=True)
            self._thread.start()

    def close(self) -> None:
        self._closing.set()
        if self._thread is not None:
            self._thread.join(timeout=5)

    def _run(self) -> None:
        while not self._closing.wait(_LOOK_S):
            self.look()

    def look(self) -> None:
        """Bound what is new."""
        present = set()
        for name in os.listdir("/proc/self/fd"):
            # A descriptor may be closed, or be another one, by the time we get to it: then this look skips it.
            with suppress(OSError):
                found = os.fstat(int(name))
                if stat.S_ISSOCK(found.st_mode):
                    present.add(found.st_ino)
                    if found.st_ino not in self._known and self._settle(int(name)):
                        self._known.add(found.st_ino)
        self._known &= present

    def _settle(self, fd: int) -> bool:
        with socket.socket(fileno=os.dup(fd)) as copy:
            if leaves_host(copy):
                bound(copy, self._timeout_s)
                return True
        return False
