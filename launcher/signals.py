"""What the launcher does with signals.

Stop signals: the first makes the main thread raise, so that the agent forwards it to the ranks and waits out the grace;
the second hurries (the rest of the grace is dropped). Once the launch is `concluding` its ranks have ended, and a first
one changes nothing any more: Slurm sends one to the steps of a job that was requeued on our own request.

User signals are forwarded to those ranks that have a handler for them: the default action of USR1 is death, and a rank
that never heard of it must not die of it. `forwarded` is told how many there are, from the thread below.

The main thread may sit in C++ for minutes (a store whose host has gone), where Python's handlers do not run. So a
thread of its own reads the signal numbers from a wake-up socket: it forwards user signals, and calls `last_resort`
when the main thread has not come back within the grace and `_SLACK_S` (of the conclusion: within what that may take), or
at once (`_HURRY_S`) after the second signal.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable

from launcher.errors import LauncherError

_SLACK_S = 5.0
_HURRY_S = 2.0


class Stopped(LauncherError):
    """A stop signal arrived; `sigval` says which. Raised in the main thread, wherever it is."""

    def __init__(self, message: str, sigval: signal.Signals) -> None:
        Exception.__init__(self, message)  # not super(): torch's exception, a sibling in elastic, takes other arguments
        self.sigval = sigval


def handles(pid: int, signum: int) -> bool:
    """Whether the process has installed a handler of its own for `signum`."""
    try:
        with open(f"/proc/{pid}/status") as f:
            for line in f:
                if line.startswith("SigCgt:"):
                    return bool(int(line.split()[1], 16) >> (signum - 1) & 1)
    except OSError:
        pass
    return False


class SignalDesk:
    """Installs the handlers of one launch; `close` puts the former ones back."""

    def __init__(
        self,
        *,
        stop: Iterable[signal.Signals],
        forward: Iterable[signal.Signals],
        targets: Callable[[], Iterable[int]],
        last_resort: Callable[[signal.Signals], object],
        grace_s: float,
        forwarded: Callable[[signal.Signals, int], object] = lambda *_: None,
    ) -> None:
        self._forwarded = forwarded
        self.raises: type[Stopped] = Stopped
        self.received: list[signal.Signals] = []
        self._stop, self._forward = frozenset(stop), frozenset(forward) - frozenset(stop)
        self._targets, self._last_resort, self._grace_s = targets, last_resort, grace_s
        self._concluded_by = 0.0
        self._closed = threading.Event()
        self._reading, self._writing = socket.socketpair()
        self._writing.setblocking(False)
        self._former = {signum: signal.getsignal(signum) for signum in self._stop | self._forward}
        self.install()
        self._former_fd = signal.set_wakeup_fd(self._writing.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, name="signals", daemon=True)
        self._thread.start()

    def install(self) -> None:
        """Install the handlers; torch puts its own in place whenever it starts workers, so this runs again then."""
        for signum in self._stop:
            signal.signal(signum, self._on_stop)
        for signum in self._forward:
            signal.signal(signum, lambda *_: None)

    def concluding(self, bound_s: float) -> None:
        """The ranks have ended: the main thread is not to be interrupted any more, and is not stuck for `bound_s`."""
        self._concluded_by = time.monotonic() + bound_s

    def hurry(self) -> bool:
        """Whether the user has lost patience."""
        return len(self.received) > 1

    def close(self) -> None:
        self._closed.set()
        signal.set_wakeup_fd(self._former_fd)
        for signum, handler in self._former.items():
            signal.signal(signum, handler if handler is not None else signal.SIG_DFL)
        self._writing.close()
        self._thread.join(timeout=5)
        self._reading.close()

    def _on_stop(self, signum: int, _frame: object) -> None:
        first = not self.received
        self.received.append(signal.Signals(signum))
        if first and not self._concluded_by:
            raise self.raises(f"received {signal.Signals(signum).name}", signal.Signals(signum))

    def _watch(self) -> None:
        first: signal.Signals | None = None
        deadline: float | None = None
        hurried = False
        while not self._closed.is_set():
            self._reading.settimeout(None if deadline is None else max(0.01, deadline - time.monotonic()))
            try:
                numbers = self._reading.recv(64)
            except TimeoutError:
                numbers = b""
            if self._closed.is_set():
                return
            for number in numbers:
                signum = signal.Signals(number)
                if signum in self._forward:
                    willing = [pid for pid in self._targets() if handles(pid, signum)]
                    self._forwarded(signum, len(willing))
                    for pid in willing:
                        self._send(pid, signum)
                elif signum in self._stop:
                    hurried = first is not None
                    first = first or signum
                    wait_s = _HURRY_S if hurried else self._grace_s + _SLACK_S
                    deadline = min(deadline or float("inf"), time.monotonic() + wait_s)
            if first is not None and deadline is not None and time.monotonic() >= deadline:
                if not hurried and time.monotonic() < self._concluded_by:
                    deadline = self._concluded_by
                    continue
                self._last_resort(first)
                return

    @staticmethod
    def _send(pid: int, signum: int) -> None:
        try:
            os.kill(pid, signum)
        except ProcessLookupError:
            pass
