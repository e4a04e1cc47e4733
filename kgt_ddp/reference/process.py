"""What a reference process does to itself before it works: least priority, cores and threads of its own, no
accelerator, and an end when its parent ends or a signal asks for it.

Imports torch only in `settle`, when the environment has been checked.
"""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from kgtrun.contract import environment

PRECISIONS: Final = ("bf16", "fp32")
AUTO: Final = "auto"
"""bf16 where this CPU computes it fast, fp32 where it does not. It depends on the CPU alone, so runs can be repeated."""
STARTING_NICENESS: Final = 5
WORKING_NICENESS: Final = 19
"""Only the first is kept while torch is imported: with the second, that takes minutes on a busy machine."""
_PR_SET_PDEATHSIG: Final = 1
_PARENT_DIED: Final = signal.SIGUSR1


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the environment says, checked."""

    directory: Path
    index: int
    precision: str
    """One of `PRECISIONS`, or `AUTO`."""
    run_dir: str
    """Empty: no events are written."""
    cpus: frozenset[int]
    """Cores of its own; empty: it shares."""
    omp_threads: bool
    """OMP_NUM_THREADS says how many threads to compute with."""

    @classmethod
    def read(cls, environ: Mapping[str, str]) -> Settings:
        """
        Raises:
            ValueError: a variable is missing or makes no sense; the message has its name.
        """
        if not environ.get(environment.REFERENCE_DIR):
            raise ValueError(f"{environment.REFERENCE_DIR} is not set: a reference is started by kgtrun")
        precision = environ.get(environment.REFERENCE_PRECISION, "") or AUTO
        if precision not in (AUTO, *PRECISIONS):
            raise ValueError(
                f"{environment.REFERENCE_PRECISION}={precision!r} is none of {AUTO}, {', '.join(PRECISIONS)}"
            )
        return cls(
            directory=Path(environ[environment.REFERENCE_DIR]),
            index=environment.integer(environment.REFERENCE_INDEX, environ=environ) or 0,
            precision=precision,
            run_dir=environ.get(environment.RUN_DIR, ""),
            cpus=frozenset(parse_cpus(environ.get(environment.CPUS, ""))),
            omp_threads=environ.get("OMP_NUM_THREADS", "").isdecimal(),
        )


def settle(settings: Settings) -> int | None:
    """Take the cores of its own, no accelerator, and import torch; then the least priority for good.

    Returns:
        Threads to compute with: one per core of its own; None where OMP_NUM_THREADS says it; 1 otherwise, because cores
        are then shared with the trainers.
    """
    os.nice(STARTING_NICENESS)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    threads = _take_cores(settings)
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    torch.compiler.set_stance("force_eager")  # a compiled submodule must not compile again, for a model run this rarely
    os.nice(WORKING_NICENESS - STARTING_NICENESS)
    return threads


def precision_of(settings: Settings) -> str:
    """One of `PRECISIONS`: the one asked for, or the one for this CPU. After `settle`, as it needs torch."""
    if settings.precision != AUTO:
        return settings.precision
    from kgt_ddp.torch_private import cpu_has_fast_bf16

    return "bf16" if cpu_has_fast_bf16() else "fp32"


def _take_cores(settings: Settings) -> int | None:
    cpus = settings.cpus
    if cpus:
        with suppress(OSError):  # cores that this container does not have: better anywhere than not at all
            os.sched_setaffinity(0, cpus)
        return len(cpus)
    return None if settings.omp_threads else 1


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
