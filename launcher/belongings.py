"""What belongs to one launch on this node besides its own process: processes, directories, and the reaper over both.

Owns the marker that every process of the launch carries, who is found by it, and that nothing of it is left: ends,
collects and removes. It knows no ranks and no order of things, which is `launcher.supervisor`'s.

Made before the launcher has threads, for it forks the reaper.
"""

from __future__ import annotations

import ctypes
import logging
import shutil
import signal
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from kgtrun.contract import environment as names
from launcher import leftovers, process_tree
from launcher.reaper import Reaper

logger = logging.getLogger(__name__)


class Belongings:
    """Processes that carry the launch's marker or are in the session of one that was told to `watch`, and directories.

    Args:
        grace_s: between TERM and KILL, for the reaper.
    """

    def __init__(self, launch_id: str, directories: Iterable[Path], *, grace_s: float) -> None:
        self._marker = f"{names.LAUNCH_ID}={launch_id}"
        self._directories = list(directories)
        # Before the reaper is forked, which holds them too.
        self._holds = [leftovers.hold(directory) for directory in self._directories]
        self._reaper = Reaper(marker=self._marker, directories=map(str, self._directories), grace_s=grace_s)
        self._ended: set[int] = set()
        _become_subreaper()

    def watch(self, pid: int) -> None:
        """A process that leads a session of its own was started: the reaper must know it."""
        self._reaper.watch(pid)

    def find(self, roots: Iterable[int], *, spare: Collection[int] = ()) -> set[int]:
        """All processes of the launch; `roots` and `spare` lead sessions, and those of `spare` are left out."""
        spared = process_tree.members("", spare) if spare else ()
        return process_tree.members(self._marker, roots, exclude={*spared, self._reaper.pid})

    def collect(self, *, owned: Iterable[int]) -> None:
        """Reap orphans: as their subreaper we are their parent now. `owned` have somebody who waits for them.

        Only those that were there at the last call, too: a thread may have started a child and not told of it yet.
        """
        found = process_tree.zombies() - {self._reaper.pid, *owned}
        process_tree.reap(found & self._ended)
        self._ended = found

    def end(
        self,
        roots: Iterable[int],
        *,
        grace_s: float,
        hurry: Callable[[], bool],
        between: Callable[[], object],
    ) -> None:
        """TERM to `roots`, up to `grace_s`, then KILL for whatever of the launch is left."""
        roots = list(roots)
        process_tree.terminate(
            lambda: self.find(roots), polite=roots, signum=signal.SIGTERM, grace_s=grace_s, hurry=hurry, between=between
        )

    def kill(self, roots: Callable[[], Iterable[int]]) -> None:
        """KILL for all of it, at once."""
        process_tree.terminate(lambda: self.find(roots()), polite=(), signum=signal.SIGKILL, grace_s=0)

    def remove_directories(self) -> None:
        for directory in self._directories:
            shutil.rmtree(directory, ignore_errors=True)
        for hold in self._holds:
            hold.close()

    def dismiss_reaper(self) -> None:
        """The launch has ended in order, and this is its last act."""
        self._reaper.dismiss()


def _become_subreaper() -> None:
    """Have orphaned grandchildren handed to this process instead of to init, so that they are found and collected."""
    pr_set_child_subreaper = 36
    try:
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_child_subreaper, 1, 0, 0, 0)
    except (OSError, AttributeError):
        logger.debug("no prctl: orphans are found by their environment alone")
