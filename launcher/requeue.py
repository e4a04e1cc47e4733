"""Whether a Slurm job is to start again after this launch, and asking Slurm for it, once.

Two things lead to it. The job was *warned* (USR1, as `--signal=USR1@90` sends it before the time limit), ranks have a
handler for that, and all of them then ended with 0 or 75 (EX_TEMPFAIL, "later"). Or it is *preempted*: TERM came while
Slurm has a time of preemption for the running job; ended early, it would be taken for finished, not requeued. A TERM
without that is a user's scancel or the time limit itself: nobody may bring that job back.

Only the leader of the step asks; the others wait (for a bounded time) until the job is no longer running, because a
step may be set up to kill all tasks when one exits. Every call of scontrol is bounded. No state.
"""

from __future__ import annotations

import logging
import re
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from launcher.config import BatchJob

logger = logging.getLogger(__name__)

EXIT_CODE = 75
COMMAND_TIMEOUT_S = 10.0
_POLL_S = 1.0
_NO_TIME = ("", "None", "Unknown", "N/A")

Scontrol = Callable[..., str]


def scontrol(*words: str) -> str:
    """Output of one scontrol command.

    Raises:
        OSError: there is no scontrol, it failed (the message is its own), or it took too long.
    """
    try:
        done = subprocess.run(
            ["scontrol", *words], capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        raise OSError(f"scontrol {words[0]} took longer than {COMMAND_TIMEOUT_S:g} s") from None
    if done.returncode:
        raise OSError((done.stderr or done.stdout).strip() or f"scontrol {words[0]} failed")
    return done.stdout


def _fields(job: str, call: Scontrol) -> dict[str, str]:
    return dict(re.findall(r"(\w+)=(\S*)", call("-o", "show", "job", job)))


@dataclass(frozen=True)
class JobState:
    """What Slurm says of the job at this moment."""

    running: bool
    """Nobody has cancelled it and its time is not over."""
    preempted: bool
    """Its nodes are being taken for another job."""


def look(job: str, *, call: Scontrol = scontrol) -> JobState:
    """Ask for the state of the job; all False where Slurm cannot be asked."""
    try:
        fields = _fields(job, call)
    except OSError as error:
        logger.warning("cannot tell why the job is being ended: %s", error)
        return JobState(running=False, preempted=False)
    running = fields.get("JobState") == "RUNNING"
    return JobState(running, running and fields.get("PreemptTime", "") not in _NO_TIME)


def can_go_on(codes: Iterable[int]) -> bool:
    """Whether ranks that ended with these exit codes after a warning left something to go on from."""
    return all(code in (0, EXIT_CODE) for code in codes)


def requeue(batch: BatchJob, *, call: Scontrol = scontrol, linger_s: float) -> str:
    """Have the job start again; returns what to tell the user.

    Raises:
        OSError: Slurm refuses, or cannot be asked.
    """
    if batch.leader:
        call("requeue", batch.job)
        return f"job {batch.job} is requeued"
    deadline = time.monotonic() + linger_s
    while time.monotonic() < deadline:
        try:
            if _fields(batch.job, call).get("JobState") != "RUNNING":
                break
        except OSError:
            break
        time.sleep(_POLL_S)
    return f"job {batch.job} is requeued by the first launcher of the step"
