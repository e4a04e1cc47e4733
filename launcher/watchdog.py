"""Reports ranks that make no progress, with a stack of every rank.

Progress is a heartbeat (`kgtrun.contract.heartbeat`), which a rank's optimizer steps write. A rank is watched from its
first beat on, so that a script without beats is never accused; one in state T (stopped) is reported in any case. One
stall is reported once; it ends when every rank has moved again.

The stacks come from the ranks themselves: the boot step registers faulthandler on a signal, which runs even while the
main thread is inside C++. Only ranks that have a handler for that signal are asked, for others would die of it.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from kgtrun.contract.heartbeat import Beat, read
from launcher import process_tree
from launcher.signals import handles

STACKS_SIGNAL = 64
"""SIGRTMAX; `kgtrun.boot` registers the same."""
_WAIT_FOR_STACKS_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Stall:
    """What was found."""

    silent: tuple[int, ...]
    """Ranks without progress."""
    stopped: tuple[int, ...]
    """Ranks in state T."""
    steps: Mapping[int, int]
    """Last step by rank."""
    longest_s: float
    stacks: Mapping[int, str]

    def report(self) -> str:
        """For the console."""
        who = ", ".join(map(str, self.silent or self.stopped))
        lines = [f"no progress for {self.longest_s:.0f} s on rank {who}"]
        if self.steps:
            lines.append(
                "  last step: " + ", ".join(f"rank {rank}: {step}" for rank, step in sorted(self.steps.items()))
            )
        if self.stopped:
            lines.append(f"  stopped by a signal (state T): rank {', '.join(map(str, self.stopped))}")
        for rank, stack in sorted(self.stacks.items()):
            lines += [f"  stack of rank {rank}:", *(f"    {line}" for line in stack.splitlines())]
        return "\n".join(lines)


class Watchdog:
    """Looks at all ranks once a `period_s` in a thread of its own and calls `on_stall`."""

    def __init__(
        self,
        *,
        timeout_s: float,
        pids: Mapping[int, int],
        beats: Mapping[int, Path],
        stacks: Mapping[int, Path],
        on_stall: Callable[[Stall], object],
    ) -> None:
        self._timeout_s, self._pids, self._beats, self._stacks = timeout_s, dict(pids), beats, stacks
        self._on_stall = on_stall
        self._stopped_since: dict[int, float] = {}
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closing.set()
        self._thread.join(timeout=5)

    def _run(self) -> None:
        reported = False
        while not self._closing.wait(min(1.0, self._timeout_s / 4)):
            silent, stopped, longest_s, steps = self._look()
            if not silent and not stopped:
                reported = False
            elif not reported:
                reported = True
                stall = Stall(
                    silent=silent, stopped=stopped, steps=steps, longest_s=longest_s, stacks=self._collect_stacks()
                )
                if not self._closing.is_set():
                    self._on_stall(stall)

    def _look(self) -> tuple[tuple[int, ...], tuple[int, ...], float, dict[int, int]]:
        now = time.monotonic()
        beats: dict[int, Beat] = {rank: beat for rank, path in self._beats.items() if (beat := read(path))}
        ages = {rank: now - beat.monotonic_s for rank, beat in beats.items() if process_tree.alive(self._pids[rank])}
        stopped = []
        for rank, pid in self._pids.items():
            found = process_tree.stat(pid)
            if found is None or found.state != "T":
                self._stopped_since.pop(rank, None)
            elif now - self._stopped_since.setdefault(rank, now) > self._timeout_s:
                stopped.append(rank)
        silent = tuple(rank for rank, age in sorted(ages.items()) if age > self._timeout_s)
        longest_s = max((ages[rank] for rank in silent), default=self._timeout_s)
        return silent, tuple(stopped), longest_s, {rank: beat.step for rank, beat in beats.items()}

    def _collect_stacks(self) -> dict[int, str]:
        before = {rank: _size(path) for rank, path in self._stacks.items()}
        asked = [rank for rank, pid in self._pids.items() if handles(pid, STACKS_SIGNAL)]
        for rank in asked:
            try:
                os.kill(self._pids[rank], STACKS_SIGNAL)
            except ProcessLookupError:
                continue
        self._closing.wait(_WAIT_FOR_STACKS_S)
        return {rank: text for rank in asked if (text := _text_after(self._stacks[rank], before[rank]))}


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _text_after(path: Path, position: int) -> str:
    try:
        return path.read_bytes()[position:].decode(errors="replace")
    except OSError:
        return ""
