"""Layout of a run directory.

    RUN_DIR/
      plan.json             what the launcher was asked to start
      events/NAME.jsonl     one file per process; hosts may share the directory over NFS
      logs/                 output per rank, restart and reference
      result.json           how the run ended, written by the launcher of node 0

Nothing here creates or deletes anything but the directories it is asked to make.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunDir:
    """Paths inside one run directory."""

    root: Path

    @property
    def events(self) -> Path:
        return self.root / "events"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def plan(self) -> Path:
        return self.root / "plan.json"

    @property
    def result(self) -> Path:
        return self.root / "result.json"

    def create(self) -> RunDir:
        """Make the directories; existing ones are kept."""
        self.events.mkdir(parents=True, exist_ok=True)
        self.logs.mkdir(parents=True, exist_ok=True)
        return self

    def event_file(self, role: str, index: int) -> Path:
        """File of one process, unique among hosts, restarts and processes that share the directory."""
        return self.events / f"{socket.gethostname()}-{role}{index}-{os.getpid()}.jsonl"
