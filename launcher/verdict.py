"""How a launch ended, decided from what the last attempt and the other nodes have told.

Owns the choice of status, exit code and message, and of the failure that goes first when several nodes have failed: the
earliest one, by wall-clock time, where a lost connection counts later than it happened (`launcher.first_failure`). It
reads attempts and peers and changes neither, ends nothing, writes nothing.

    a stop signal            signalled   128 + signal
    a hang that was stopped  failed      124
    a failure, here or not   failed      that of the first one, 1 where none is known
    otherwise                succeeded   0
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable
from typing import Any

from launcher import first_failure
from launcher.attempt import Attempt
from launcher.outcome import FAILED, HUNG_EXIT_CODE, SIGNALLED, SUCCEEDED, Failure, Outcome
from launcher.peers import Peers


class Verdict:
    """Makes the `Outcome` of one launch.

    Args:
        begun_s: monotonic time of the launch.
        hang_timeout_s: for the message about a hang.
        sidecars: what became of the side-cars, asked at the end.
    """

    def __init__(self, *, begun_s: float, hang_timeout_s: float, sidecars: Callable[[], dict[str, Any]]) -> None:
        self._begun_s, self._hang_timeout_s, self._sidecars = begun_s, hang_timeout_s, sidecars

    def unix_time(self, failure: Failure) -> float:
        """When it happened, or counts as if it had, for comparison with other hosts."""
        return time.time() - (time.monotonic() - self._begun_s) + failure.after_s + first_failure.delay_s(failure)

    def signalled(self, attempt: Attempt | None, signum: signal.Signals, message: str = "") -> Outcome:
        """A stop signal ended the launch."""
        message = message or f"ended by {signum.name}"
        return self._outcome(attempt, SIGNALLED, 128 + signum, signal=signum.name, message=message)

    def ended(self, attempt: Attempt | None, peers: Peers | None, *, failed: bool) -> Outcome:
        """The agent has come to an end; `failed` says how it sees its worker group."""
        if attempt is not None and attempt.hung.is_set():
            return self._hung(attempt)
        if failed:
            return self.failed(attempt, peers, "the worker group failed")
        if peers is not None and peers.others_failed:
            return self.failed(attempt, peers, "the worker group failed on another node")
        return self._outcome(attempt, SUCCEEDED, 0)

    def failed(self, attempt: Attempt | None, peers: Peers | None, message: str) -> Outcome:
        """Name the earliest failure of all nodes; its code is ours. `message` is for where no failure is known."""
        failures = attempt.failures if attempt else ()
        remote = peers.earliest() if peers else None
        own_moment_s = self.unix_time(failures[0]) if failures and not failures[0].consequence else math.inf
        causes = [its for its in (remote, *failures) if its and not (its.consequence or its.reaction)]
        if peers and peers.hung() and not causes:
            return self._hung(attempt)  # all hang in one collective, and the watchdog there was the first
        if peers and remote and peers.earliest_moment() < own_moment_s:
            failures = (remote, *failures)
        lost = peers.words() if peers else ""
        if not failures or (lost and failures[0].consequence):
            return self._outcome(attempt, FAILED, 1, message=lost or message)
        return self._outcome(attempt, FAILED, failures[0].exit_status(), failures=failures)

    def _hung(self, attempt: Attempt | None) -> Outcome:
        message = f"stopped: a rank made no progress for {self._hang_timeout_s:g} s"
        failures = attempt.failures if attempt else ()
        return self._outcome(attempt, FAILED, HUNG_EXIT_CODE, failures=failures, message=message)

    def _outcome(self, attempt: Attempt | None, status: str, code: int, **fields: Any) -> Outcome:
        return Outcome(
            status=status,
            exit_code=code,
            seconds=round(time.monotonic() - self._begun_s, 3),
            restarts=attempt.number if attempt else 0,
            sidecars=self._sidecars(),
            **fields,
        )
