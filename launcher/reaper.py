"""The process that outlives a killed launcher just long enough to leave nothing behind.

Forked before anything heavy is imported and before any thread exists. It holds the reading end of a pipe whose writing
end only the launcher holds. The launcher tells it which sessions it started (`s PID`), and at last that it ended in
order (`q`): nothing to do. End of file without that means the launcher was killed: every process of the launch gets
TERM, the grace, then KILL, and the runtime directory is removed.

A parent-death signal alone would not do: it covers direct children only and is lost on exec of a set-uid program.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterable

from launcher import process_tree

_ORDERLY = "q\n"


class Reaper:
    """Handle of the launcher on its reaper."""

    def __init__(self, *, marker: str, directories: Iterable[str], grace_s: float) -> None:
        self._marker, self._directories, self._grace_s = marker, list(directories), grace_s
        reading, self._writing = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._writing)
            code = 1
            try:
                self._watch(reading)
                code = 0
            finally:
                os._exit(code)
        os.close(reading)

    def _watch(self, reading: int) -> None:
        os.setsid()
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(signum, signal.SIG_IGN)
        # Whoever reads the launcher's output must see its end when the launcher ends, not when we do.
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        os.chdir("/")
        sessions: set[int] = set()
        with os.fdopen(reading) as lines:
            for line in lines:
                if line == _ORDERLY:
                    return
                sessions.add(int(line[1:]))

        def find() -> set[int]:
            return process_tree.members(self._marker, sessions)

        process_tree.terminate(find, polite=find(), signum=signal.SIGTERM, grace_s=self._grace_s)
        for directory in self._directories:
            shutil.rmtree(directory, ignore_errors=True)

    def watch(self, session: int) -> None:
        """A process that leads a session of its own was started."""
        self._tell(f"s {session}\n")

    def dismiss(self) -> None:
        """Tell it that the launch ended in order, and reap it."""
        self._tell(_ORDERLY)
        os.close(self._writing)
        try:
            os.waitpid(self.pid, 0)
        except ChildProcessError:
            pass

    def _tell(self, line: str) -> None:
        try:
            os.write(self._writing, line.encode())
        except BrokenPipeError:
            pass  # someone killed the reaper: the launch goes on without this one safety
