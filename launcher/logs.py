"""Shows the log files of ranks and side-cars on the console while they grow, whole lines only, each with its prefix.

Processes write to files, never to a pipe of ours: a launcher that is stopped or killed must not block or break them.
One thread looks at all files. A line is printed when it is complete, so that output of several ranks never mixes
within a line; of a progress bar that redraws itself with carriage returns the last state is printed. What is left
without an end of line is printed at `stop`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

_POLL_S = 0.05
_CHUNK_BYTES = 1 << 16


@dataclass
class Source:
    """One file that is followed."""

    path: Path
    prefix: str
    write: Callable[[str], object]
    position: int = 0
    rest: bytes = field(default=b"", repr=False)


def console(stream: TextIO) -> Callable[[str], object]:
    """A writer that survives a console that has gone away (a closed pipe, a lost terminal)."""

    def write(text: str) -> None:
        try:
            stream.write(text)
            stream.flush()
        except (OSError, ValueError):
            pass

    return write


def matching(words: Iterable[str], path: Path) -> Callable[[str], object]:
    """A writer that appends the lines that hold one of `words` to a file."""
    wanted = tuple(words)

    def write(text: str) -> None:
        lines = [line for line in text.splitlines(keepends=True) if any(word in line for word in wanted)]
        if lines:
            with open(path, "a") as f:
                f.writelines(lines)

    return write


class Follower:
    """Follows files from their beginning until `stop`."""

    def __init__(self) -> None:
        self._sources: list[Source] = []
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def follow(self, path: str | os.PathLike[str], prefix: str, write: Callable[[str], object]) -> None:
        """Add a file, which need not exist yet."""
        with self._lock:
            self._sources.append(Source(Path(path), prefix, write))
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="logs", daemon=True)
            self._thread.start()

    def drain(self) -> None:
        """Print all there is, unfinished lines too, and forget the files: their writers have ended."""
        with self._lock:
            for source in self._sources:
                while self._read(source):
                    pass
                if source.rest:
                    self._print(source, source.rest + b"\n")
                    source.rest = b""
            self._sources.clear()

    def stop(self) -> None:
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(timeout=5)
        self.drain()

    def _run(self) -> None:
        while not self._stopping.wait(_POLL_S):
            with self._lock:
                for source in self._sources:
                    self._read(source)

    def _read(self, source: Source) -> bool:
        """Print the whole lines of one chunk; False at the end of the file."""
        try:
            with open(source.path, "rb") as f:
                if os.fstat(f.fileno()).st_size < source.position:
                    source.position, source.rest = 0, b""  # somebody truncated it
                f.seek(source.position)
                chunk = f.read(_CHUNK_BYTES)
        except OSError:
            return False
        source.position += len(chunk)
        complete, end, rest = (source.rest + chunk).rpartition(b"\n")
        source.rest = rest
        if end:
            self._print(source, complete + end)
        return bool(chunk)

    @staticmethod
    def _print(source: Source, data: bytes) -> None:
        lines = data.decode(errors="replace").split("\n")[:-1]
        shown = (line.rstrip("\r").rpartition("\r")[2] for line in lines)
        source.write("".join(f"{source.prefix}{line}\n" for line in shown))
