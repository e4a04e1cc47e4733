"""An estimate of the time that freezing has saved: what steps took before, less what they take now.

Pure: times in, seconds out. The measure of an unfrozen step is the median of the last ones before the first block froze;
a step that took many times as long (validation, a checkpoint in between) counts on neither side. It is an estimate and
must be called one: a machine that slows down or a batch that grows is not told from freezing.
"""

from __future__ import annotations

import statistics
from collections import deque

_REMEMBERED = 64
_PAUSE = 4.0
"""A step this many times as long as the usual one was interrupted by something else."""


class SavedTime:
    """Feed it the time of every finished step; see the module docstring."""

    def __init__(self) -> None:
        self.seconds = 0.0
        """Saved so far."""
        self._last_s: float | None = None
        self._unfrozen: deque[float] = deque(maxlen=_REMEMBERED)
        self._usual_s: float | None = None

    @property
    def unfrozen_step_s(self) -> float | None:
        """Usual duration of a step with nothing frozen; None before enough of them were seen."""
        if self._usual_s is None and len(self._unfrozen) >= 5:
            return statistics.median(self._unfrozen)
        return self._usual_s

    def step_ended(self, now_s: float, *, frozen: bool) -> None:
        """A step ended at `now_s` (a monotonic clock); `frozen`: some block was frozen in it."""
        duration = None if self._last_s is None else now_s - self._last_s
        self._last_s = now_s
        if duration is None:
            return
        if not frozen:
            self._usual_s = None
            self._unfrozen.append(duration)
            return
        if self._usual_s is None:
            self._usual_s = self.unfrozen_step_s
        if self._usual_s is not None and duration < _PAUSE * self._usual_s:
            self.seconds += self._usual_s - duration
