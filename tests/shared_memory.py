"""What a test left in /dev/shm, while other tests use it, too: what they have there goes, and a leak stays."""

from __future__ import annotations

import os
import time


def names() -> set[str]:
    return set(os.listdir("/dev/shm"))


def left_since(before: set[str], timeout_s: float = 20) -> list[str]:
    """Names that were not there before and do not go within `timeout_s`; returns as soon as there is none."""
    left = names() - before
    end = time.monotonic() + timeout_s
    while left and time.monotonic() < end:
        time.sleep(0.05)
        left &= names()
    return sorted(left)
