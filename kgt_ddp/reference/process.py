"""What a reference process does to itself before it works: least priority, cores and threads of its own, no
accelerator, and an end when its parent ends or a signal asks for it.

Called before torch is imported, where that matters.
"""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Final

from kgtrun.contract import environment

NICENESS: Final = 19
_PR_SET_PDEATHSIG: Final = 1
_PARENT_DIED: Final = signal.SIGUSR1


def settle(environ: Mapping[str, str]) -> int | None:
    """Lower the priority and take the cores named by KGTRUN_CPUS.

    Returns:
        Threads to compute with: one per core of its own; None where OMP_NUM_THREADS says it; 1 otherwise, because cores
        are then shared with the trainers.

    Raises:
        ValueError: KGTRUN_CPUS is not a list of cores.
    """
    os.nice(NICENESS)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    cpus = parse_cpus(environ.get(environment.CPUS, ""))
    if cpus:
        with suppress(OSError):  # cores that this container does not have: better anywhere than not at all
            os.sched_setaffinity(0, cpus)
        return len(cpus)
    return None if environ.get("OMP_NUM_THREADS", "").isdecimal() else 1


def parse_cpus(text: str) -> set[int]:
    """Cores from a list like "0-3,8"; empty text, no cores.

    Raises:
        ValueError: it is no such list.
    """
    cpus: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, dash, last = part.partition("-")
        if not first.strip().isdecimal() or (dash and not last.strip().isdecimal()):
            raise ValueError(f"{environment.CPUS}={text!r} is not a list of cores like 0-3,8")
        cpus.update(range(int(first), int(last or first) + 1))
    return cpus


class Stop(BaseException):
    """A signal asks the process to end. Not an `Exception`: no model's code may swallow it."""


class StopSignals:
    """SIGTERM and SIGINT interrupt whatever runs with `Stop`, and leave a note for the case that it gets lost there (an
    exception raised inside a destructor goes nowhere)."""

    def __init__(self) -> None:
        self.received: str | None = None
        signal.signal(signal.SIGTERM, self._handle)
        signal.signal(signal.SIGINT, self._handle)

    def _handle(self, signum: int, _frame: Any) -> None:
        self.received = signal.Signals(signum).name
        raise Stop(self.received)


class ParentWatch:
    """Tells whether the process that started this one is gone.

    The kernel's parent-death signal comes when the *thread* that started us ends, which a launcher's thread may do in
    good health. So the signal only wakes us up, and the parent's process id decides.
    """

    def __init__(self) -> None:
        self._parent = os.getppid()
        signal.signal(_PARENT_DIED, lambda *_: None)
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(_PARENT_DIED), 0, 0, 0)

    def gone(self) -> bool:
        return os.getppid() != self._parent
