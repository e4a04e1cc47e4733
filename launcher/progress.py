"""How far the ranks of this node have come, from their heartbeats.

The rate is that of the steps of about the last half minute, between the moments at which ranks made them: the moments of
the looks, and how many there were, do not matter, but the first one can know no rate. A rank that makes no step for a
while has no rate, either; what is told instead is for how long.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from kgtrun.contract.heartbeat import Beat, read

_WINDOW_S = 30.0
_PATIENCE_S = 10.0
_LONGEST_PATIENCE_S = 60.0
"""Not above the time between two plain lines (`kgtrun.live`), or one could repeat the one before it."""
_PATIENCE_STEPS = 3


@dataclass(frozen=True)
class Progress:
    """One look."""

    step: int
    """Of the slowest rank."""
    steps_per_s: float | None
    """None as long as it is not known."""
    frontier: int
    saved_s: float
    silent_s: float = 0.0
    """Since the slowest rank's last step."""

    def words(self) -> str:
        """`step 1200 · 35.2 steps/s · 3 blocks frozen · 12 s saved`."""
        parts = [f"step {self.step}"]
        if self._silent():
            parts.append(f"no step for {self.silent_s:.0f} s")
        elif self.steps_per_s:
            parts.append(describe_rate(self.steps_per_s))
        if self.frontier:
            parts.append(f"{self.frontier} block{'s' if self.frontier > 1 else ''} frozen")
        if self.saved_s >= 1:
            parts.append(f"{self.saved_s:.0f} s saved")
        return " · ".join(parts)

    def _silent(self) -> bool:
        usual_s = _PATIENCE_STEPS / self.steps_per_s if self.steps_per_s else _LONGEST_PATIENCE_S
        return self.silent_s >= min(max(usual_s, _PATIENCE_S), _LONGEST_PATIENCE_S)


def describe_rate(steps_per_s: float) -> str:
    """`35.2 steps/s`, or `2.5 s a step` for less than one step a second."""
    return f"{_short(steps_per_s)} steps/s" if steps_per_s >= 1 else f"{_short(1 / steps_per_s)} s a step"


def _short(number: float) -> str:
    return f"{number:.3g}" if number < 100 else f"{number:.0f}"


class ProgressMeter:
    """Turns beats into a rate; `look` may be called as often as one likes."""

    def __init__(self) -> None:
        self._beats: deque[Beat] = deque()
        """Of the slowest rank at each look, one a step: those of the window, and the one before them."""

    def look(self, paths: Iterable[Path], *, now_s: float | None = None) -> Progress | None:
        """The slowest rank's progress; None without ranks and before the first beat of each.

        Args:
            paths: heartbeats of the ranks that run.
            now_s: monotonic time, now by default.
        """
        beats = [read(path) for path in paths]
        if not beats or None in beats:
            return None
        slowest = min((beat for beat in beats if beat), key=lambda beat: beat.step)
        self._take(slowest)
        now_s = time.monotonic() if now_s is None else now_s
        silent_s = max(0.0, now_s - slowest.monotonic_s)
        return Progress(slowest.step, self._rate(), slowest.frontier, slowest.saved_s, silent_s)

    def _take(self, beat: Beat) -> None:
        if self._beats and beat.step < self._beats[-1].step:  # a restart
            self._beats.clear()
        if not self._beats or beat.step > self._beats[-1].step:
            self._beats.append(beat)
        while len(self._beats) > 2 and beat.monotonic_s - self._beats[1].monotonic_s >= _WINDOW_S:
            self._beats.popleft()

    def _rate(self) -> float | None:
        if len(self._beats) < 2:
            return None
        first, last = self._beats[0], self._beats[-1]
        passed_s = last.monotonic_s - first.monotonic_s
        # Beats of two ranks may stand in the other order than their steps.
        return (last.step - first.step) / passed_s if passed_s > 0 else None
