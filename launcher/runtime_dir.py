"""The short node-local directory of one launch: sockets, heartbeats, stacks, error files.

Never in the run directory, which may be on NFS and whose path may be longer than the 108 bytes a Unix socket allows.
Mode 0700, removed at the end of the launch by the launcher, by the reaper when the launcher was killed, or by the next
launch when both were (`launcher.leftovers`).
"""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from launcher import leftovers

_LONGEST_BASE = 60


def _base() -> str:
    base = tempfile.gettempdir()
    return base if len(base) <= _LONGEST_BASE else "/tmp"


def shared_directory(name: str) -> Path:
    """Path of a directory that launchers of one node find by the same name; only the one that owns it makes it."""
    return Path(_base()) / f"kgtrun-{os.getuid()}-{name}"


def make_shared(directory: Path) -> None:
    """Make it anew. What an earlier run of the same name left is removed, if it is ours: the name can be guessed.

    Raises:
        ValueError: somebody else has it.
    """
    try:
        if directory.lstat().st_uid != os.getuid():
            raise ValueError(
                f"{directory} belongs to another user: references need it; set TMPDIR, or --ref-per-node 0"
            )
        shutil.rmtree(directory)
    except FileNotFoundError:
        pass
    directory.mkdir(mode=0o700)


@dataclass(frozen=True)
class RuntimeDir:
    """Paths inside the runtime directory of one launch."""

    root: Path

    @classmethod
    def create(cls) -> RuntimeDir:
        """Make a fresh one under TMPDIR, or under /tmp where TMPDIR is too long for sockets."""
        leftovers.remove_abandoned(Path(_base()))
        made = cls(Path(tempfile.mkdtemp(prefix="kgtrun-", dir=_base())))
        made.reference.mkdir(mode=0o700)
        return made

    @property
    def reference(self) -> Path:
        """Directory of the side-cars' sockets."""
        return self.root / "ref"

    def heartbeat(self, local_rank: int) -> Path:
        return self.root / f"beat{local_rank}"

    def stacks(self, local_rank: int) -> Path:
        return self.root / f"stacks{local_rank}"

    def error(self, local_rank: int, attempt: int) -> Path:
        return self.root / f"error{attempt}.{local_rank}"
