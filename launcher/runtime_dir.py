"""The short node-local directory of one launch: sockets, heartbeats, stacks, error files.

Never in the run directory, which may be on NFS and whose path may be longer than the 108 bytes a Unix socket allows.
Mode 0700, removed at the end of the launch by the launcher, or by the reaper when the launcher was killed.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

_LONGEST_BASE = 60


@dataclass(frozen=True)
class RuntimeDir:
    """Paths inside the runtime directory of one launch."""

    root: Path

    @classmethod
    def create(cls) -> RuntimeDir:
        """Make a fresh one under TMPDIR, or under /tmp where TMPDIR is too long for sockets."""
        base = tempfile.gettempdir()
        made = cls(Path(tempfile.mkdtemp(prefix="kgtrun-", dir=base if len(base) <= _LONGEST_BASE else "/tmp")))
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

    def size_bytes(self) -> int:
        """What the files in it take."""
        return sum(os.path.getsize(p) for p in self.root.rglob("*") if p.is_file())
