"""How a launch ended: the data, its file and its words.

`Outcome` is what the supervisor returns; `write` puts it into the run directory's result.json, merging what others (the
policy's summary, for instance) may have put there. Nothing here decides anything.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from launcher.errors import describe_exit, exit_status

SUCCEEDED, FAILED, SIGNALLED, REQUEUED = "succeeded", "failed", "signalled", "requeued"
HUNG_EXIT_CODE = 124
"""As timeout(1) has it."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """One rank that ended badly."""

    rank: int
    local_rank: int
    host: str
    pid: int
    returncode: int
    """As the operating system has it: negative for a signal."""
    after_s: float
    """Since the launch began."""
    traceback: str = ""
    log_path: str = ""
    last_lines: tuple[str, ...] = ()
    hint: str = ""
    """What else is known, an out-of-memory kill for instance."""
    consequence: bool = False
    """Ended after the first failure, most likely because of it."""
    reaction: bool = False
    """Looks like the consequence of another rank's end, whichever came first: a lost connection, for instance."""

    def exit_status(self) -> int:
        """As a shell reports it."""
        return exit_status(self.returncode)

    def title(self) -> str:
        return f"rank {self.rank} on {self.host} (local rank {self.local_rank}, pid {self.pid})"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The end of one launch on this node."""

    status: str
    exit_code: int
    seconds: float
    restarts: int = 0
    signal: str | None = None
    failures: tuple[Failure, ...] = ()
    """The first failure first."""
    sidecars: dict[str, Any] = field(default_factory=dict)
    message: str = ""

    def write(self, path: Path) -> None:
        """Write result.json, whole or not at all; what is in the file and not ours stays."""
        try:
            known = json.loads(path.read_text())
        except (OSError, ValueError):
            known = {}
        known.update(asdict(self))
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(known, indent=2) + "\n")
        partial.replace(path)

    def report(self) -> str:
        """What to print at the end of a run that did not succeed."""
        if not self.failures:
            return self.message
        first, *others = self.failures
        lines = [f"First failure: {first.title()}: {describe_exit(first.returncode)} after {first.after_s:.1f} s"]
        if first.hint:
            lines.append(f"  {first.hint}")
        if first.traceback:
            lines += ["  traceback:", *(f"    {line}" for line in first.traceback.rstrip().splitlines())]
        elif first.last_lines:
            lines += ["  last lines of its stderr:", *(f"    {line}" for line in first.last_lines)]
        if first.log_path:
            lines.append(f"  log: {first.log_path}")
        if others:
            lines.append("Ended after it, most likely as a consequence:")
            lines += [f"  {other.title()}: {describe_exit(other.returncode)}" for other in others]
        if self.message:
            lines.append(self.message)
        return "\n".join(lines)
