"""Writes records behind the training thread's back, in bounded memory.

What would exceed the bound is dropped: a record not written is a miss later, no more. One batch is always taken when nothing
waits, however large it is: else batches larger than the bound would be dropped for ever. The thread starts with the first
record and ends by itself after a second without work, so nothing has to be stopped for a process to end. The first
failure (disk full, file too large, device error) ends writing with one line; reading goes on. `resume` tries again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from kgt_ddp.activation_cache.store import Table

logger = logging.getLogger(__name__)

QUEUE_BYTES = 64 << 20
_IDLE_S = 1.0
_CHECK_EVERY_BYTES = 1 << 20

Record = tuple[bytes, list[memoryview]]


class Writer:
    """See the module docstring.

    Args:
        may_grow: asked now and then whether budget and disk allow more.
        limit_bytes: of records waiting, if they are more than one batch's.

    Attributes:
        stopped: why nothing is written any more, or None.
        seconds, num_bytes: spent and written so far.
    """

    def __init__(self, may_grow: Callable[[], bool], limit_bytes: int = QUEUE_BYTES) -> None:
        self.stopped: str | None = None
        self.seconds = 0.0
        self.num_bytes = 0
        self._may_grow = may_grow
        self._limit = limit_bytes
        self._queue: deque[tuple[Table, Sequence[Record], int]] = deque()
        self._waiting = 0
        self._until_check = 0
        self._changed = threading.Condition()
        self._running = False

    def add(self, table: Table, records: Sequence[Record]) -> bool:
        """Hand over records; returns False if they were dropped. Never blocks on the disk."""
        size = sum(len(piece) for _, pieces in records for piece in pieces)
        with self._changed:
            if self.stopped is not None or (self._waiting and self._waiting + size > self._limit):
                return False
            self._queue.append((table, records, size))
            self._waiting += size
            if not self._running:
                self._running = True
                threading.Thread(target=self._work, name="kgtrun-cache-writer", daemon=True).start()
            self._changed.notify_all()
        return True

    def resume(self) -> None:
        """Try again: another file is written from now on, and the one before has given its room back."""
        with self._changed:
            self.stopped, self._until_check = None, 0

    def drain(self, timeout_s: float = 10.0) -> bool:
        """Wait, at most so long, until all is written; whether it is."""
        with self._changed:
            return self._changed.wait_for(lambda: self._waiting == 0, timeout_s)

    def _work(self) -> None:
        while True:
            with self._changed:
                if not self._changed.wait_for(lambda: self._queue, _IDLE_S):
                    self._running = False
                    return
                table, records, size = self._queue.popleft()
            started = time.perf_counter()
            try:
                if self.stopped is None:
                    self._write(table, records)
            except Exception as error:
                self._stop(str(error))
            with self._changed:
                self.seconds += time.perf_counter() - started
                self._waiting -= size
                self._changed.notify_all()

    def _write(self, table: Table, records: Sequence[Record]) -> None:
        for key, pieces in records:
            if self._until_check <= 0:
                self._until_check = _CHECK_EVERY_BYTES
                if not self._may_grow():
                    self._stop("its budget, or what it may take of the disk, is used up")
                    return
            written = table.put(key, pieces)
            self.num_bytes += written
            self._until_check -= written

    def _stop(self, reason: str) -> None:
        self.stopped = reason
        logger.warning("activation cache: nothing more is written: %s", reason)
