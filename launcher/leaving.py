"""A launch in a batch job that has to go before it is done: ranks save and end, then the job starts again later.

States: staying; warned (USR1 reached ranks that handle it: no restarts, no failure while ranks end with 0 or 75); and,
at the end, requeued or not. `launcher.requeue` says what each signal means.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable
from dataclasses import replace

from launcher import requeue
from launcher.attempt import Attempt
from launcher.config import BatchJob
from launcher.outcome import REQUEUED, SIGNALLED, SUCCEEDED, Outcome
from launcher.peers import Peers

logger = logging.getLogger(__name__)

WARNING = signal.SIGUSR1


class Leaving:
    """Decides for one launch; `batch` None (no batch job, or the user does not want it) decides nothing."""

    def __init__(self, batch: BatchJob | None, *, forbid_restarts: Callable[[], object]) -> None:
        self.batch, self._forbid_restarts = batch, forbid_restarts
        self.warned = False

    def forwarded(self, signum: signal.Signals, num_ranks: int) -> None:
        """A user signal reached `num_ranks` ranks that handle it."""
        if self.batch is None or signum != WARNING or self.warned:
            return
        if not num_ranks:
            logger.warning("%s: no rank handles it, so nothing is saved and nothing requeued", signum.name)
            return
        self.warned = True
        self._forbid_restarts()
        logger.info("%s: ranks are asked to save and end; the job will be requeued when they have", signum.name)

    @property
    def excused(self) -> tuple[int, ...]:
        """Exit codes of ranks that did as they were asked, besides 0."""
        return (requeue.EXIT_CODE,) if self.warned else ()

    def running(self, attempt: Attempt | None) -> int | None:
        """How many ranks are still to end after the warning; None when there was none, or a rank failed."""
        if not self.warned or attempt is None or not requeue.can_go_on(attempt.codes()):
            return None
        running = len(attempt.running())
        return running if running or any(attempt.codes()) else None  # all with 0: an ordinary end, torch's own

    def conclude(self, outcome: Outcome, peers: Peers | None, *, grace_s: float) -> Outcome:
        """The outcome, once nothing of the launch runs any more: requeued, where that is to be."""
        if self.batch is None:
            return outcome
        if outcome.status == SIGNALLED:
            # Warned and then ended: by the next signal of a preemption, or by a user who wants to be rid of it.
            state = requeue.look(self.batch.job)
            wanted = state.running if self.warned else state.preempted
        else:
            wanted = self.warned and outcome.status == SUCCEEDED
        if not wanted:
            return outcome
        if peers is not None:
            peers.ended(wait_s=grace_s)  # whoever is still saving would be killed by the requeue
        if self.batch.leader:
            logger.info("asking Slurm to requeue job %s", self.batch.job)  # before: it may end us before we return
        try:
            words = requeue.requeue(self.batch, linger_s=grace_s)
        except OSError as error:
            words = f"the job is not requeued: {error}; submit it again, with --requeue"
            return replace(outcome, message=f"{outcome.message}\n{words}".strip())
        return replace(outcome, status=REQUEUED, exit_code=requeue.EXIT_CODE, failures=(), message=words)
