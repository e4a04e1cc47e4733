"""Event records: one JSON object a line, one file per process, merged by readers.

Every record carries `v` (schema version), `time` (unix seconds), `host`, `role` ("launcher", "trainer", "reference"),
`index` (rank, or index of the reference), `pid`, `kind`, and the fields of its kind. A reader skips a torn last line
(a process may be killed while it writes) and refuses nothing else that it does not know: new kinds and fields may come.

Writing never raises into training: the first failure is logged once and the writer goes quiet (a full disk must not end
a run).
"""

from __future__ import annotations

import json
import logging
import math
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kgtrun.contract.run_dir import RunDir

SCHEMA_VERSION = 1

logger = logging.getLogger(__name__)


def _plain(value: Any) -> Any:
    """JSON has no NaN or infinity: they travel as None, also inside lists and mappings."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value


class EventWriter:
    """Appends records of one process; `path=None` writes nowhere."""

    def __init__(self, path: Path | None, *, role: str, index: int) -> None:
        self._path = path
        self._fields = {"host": socket.gethostname(), "role": role, "index": index, "pid": os.getpid()}
        self._fd: int | None = None

    @classmethod
    def for_process(cls, run_dir: str | os.PathLike[str] | None, *, role: str, index: int) -> EventWriter:
        """Writer of this process in `run_dir`; without a run directory, one that writes nowhere."""
        path = RunDir(Path(run_dir)).event_file(role, index) if run_dir else None
        return cls(path, role=role, index=index)

    def write(self, kind: str, **fields: Any) -> None:
        """Append one record. Whole lines only: one `write` call on a descriptor opened for appending."""
        if self._path is None:
            return
        record = {
            "v": SCHEMA_VERSION,
            "time": round(time.time(), 6),
            **self._fields,
            "kind": kind,
            **_plain(fields),
        }
        try:
            if self._fd is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            os.write(self._fd, (json.dumps(record) + "\n").encode())
        except OSError as error:
            logger.warning("no more events are written to %s: %s", self._path, error)
            self._path = None

    def close(self) -> None:
        """Close the file; later writes are dropped."""
        self._path = None
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def read_events(run_dir: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """All records of a run, merged in order of time."""
    records = []
    for path in sorted(RunDir(Path(run_dir)).events.glob("*.jsonl")):
        for line in path.read_bytes().splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict) and "kind" in record:
                records.append(record)
    return iter(sorted(records, key=lambda r: r.get("time", 0.0)))
