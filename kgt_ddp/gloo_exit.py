"""A process that ends while a gloo thread still works ends in order.

A gloo thread that is the last to hold a finished collective frees its tensors, for which it needs the interpreter's lock
where Python knows them. Once the interpreter is ending, CPython answers that by unwinding the thread, and C++ by
"terminate called without an active exception": the rank dies of SIGABRT after all its work is done. Torch does so without
us, too (an `all_reduce` just before the end is enough, on a machine whose cores are busy), but a rank that dies so fails
the whole job. So, before the interpreter goes: what is under way is never freed, and gloo's threads get the time to put
away what they have finished.

Owns that exit handler, of which there is one a process.
"""

from __future__ import annotations

import atexit
import ctypes
import glob
import time
import weakref
from typing import Any, Protocol

THREAD_NAME = "pt_gloo_runloop"
"""As torch 2.13 calls them; the kernel keeps 15 characters."""
_BOUND_S = 5.0
_NAP_S = 0.002
_QUIET_LOOKS = 3
"""A thread that waits for the interpreter's lock sleeps as well; each nap of ours lets it have it."""


class Holder(Protocol):
    """Something that may have collectives under way when the process ends."""

    def under_way(self) -> list[Any]: ...


_holders: weakref.WeakSet[Any] = weakref.WeakSet()
_registered = False


def expect(holder: Holder | None = None) -> None:
    """Have the exit of this process be in order, and, with a holder, what it has under way then be kept for ever."""
    global _registered
    if not _registered:
        _registered = True
        atexit.register(_settle)
    if holder is not None:
        _holders.add(holder)


def _settle() -> None:
    for holder in list(_holders):
        for work in holder.under_way():
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(work))
    deadline, quiet = time.monotonic() + _BOUND_S, 0
    while quiet < _QUIET_LOOKS and time.monotonic() < deadline:
        time.sleep(_NAP_S)
        quiet = 0 if _any_thread_is_busy() else quiet + 1


def _any_thread_is_busy() -> bool:
    """Whether a gloo thread runs, or would like to."""
    for path in glob.iglob("/proc/self/task/*/stat"):
        try:
            with open(path) as stat:
                name, _, rest = stat.read().partition("(")[2].rpartition(")")
        except OSError:  # a thread that has just ended
            continue
        if name == THREAD_NAME[:15] and rest.split()[0] == "R":
            return True
    return False
