from __future__ import annotations

import signal

import pytest

from launcher import leaving, requeue
from launcher.config import BatchJob
from launcher.leaving import Leaving
from launcher.outcome import FAILED, REQUEUED, SIGNALLED, SUCCEEDED, Outcome

LEADER, OTHER = BatchJob(job="17", leader=True), BatchJob(job="17", leader=False)
RUNNING = "JobId=17 JobName=x JobState=RUNNING Reason=None PreemptEligibleTime=2026-01-01T00:00:00 PreemptTime=None"
PREEMPTED = RUNNING.replace("PreemptTime=None", "PreemptTime=2026-01-01T00:00:09")
CANCELLED = RUNNING.replace("RUNNING", "CANCELLED")


class Scontrol:
    def __init__(self, state=RUNNING):
        self.state, self.asked = state, []

    def __call__(self, *words):
        self.asked.append(words)
        if words[0] == "requeue":
            return ""
        if self.state is None:
            raise OSError("no scontrol here")
        return self.state


class Ranks:
    """An attempt whose ranks have ended with `codes`; `num_running` have not."""

    def __init__(self, codes, num_running=0):
        self._codes, self._running = codes, list(range(num_running))

    def codes(self):
        return self._codes

    def running(self):
        return self._running


@pytest.fixture
def slurm(monkeypatch):
    """Puts an answer of Slurm in place of the real one."""
    made = Scontrol()
    monkeypatch.setattr(requeue.look, "__kwdefaults__", {"call": made})
    monkeypatch.setattr(requeue.requeue, "__kwdefaults__", {"call": made})
    return made


def ended(status, code, signum=None):
    return Outcome(status=status, exit_code=code, seconds=1.0, signal=signum)


def conclude(batch, outcome, *, warned=False, num_handling=2):
    one = Leaving(batch, forbid_restarts=lambda: None)
    if warned:
        one.forwarded(signal.SIGUSR1, num_handling)
    return one.conclude(outcome, None, grace_s=0.1)


def test_a_warning_that_ranks_handle_ends_in_one_requeue(slurm):
    found = conclude(LEADER, ended(SUCCEEDED, 0), warned=True)
    assert (found.status, found.exit_code, found.message) == (REQUEUED, 75, "job 17 is requeued")
    assert slurm.asked == [("requeue", "17")]
    found = conclude(OTHER, ended(SUCCEEDED, 0), warned=True)
    assert found.exit_code == 75 and slurm.asked.count(("requeue", "17")) == 1


def test_a_warning_that_nobody_handles_changes_nothing(slurm):
    assert conclude(LEADER, ended(SUCCEEDED, 0), warned=True, num_handling=0).exit_code == 0
    assert conclude(None, ended(SUCCEEDED, 0), warned=True).exit_code == 0
    assert slurm.asked == []


def test_a_rank_that_fails_after_the_warning_is_a_failure(slurm):
    assert conclude(LEADER, ended(FAILED, 3), warned=True).exit_code == 3
    assert slurm.asked == []


@pytest.mark.parametrize(
    ("state", "warned", "code"),
    [
        (PREEMPTED, False, 75),
        (RUNNING, False, 143),  # a user's `scancel -s TERM`
        (CANCELLED, False, 143),
        (CANCELLED, True, 143),
        (RUNNING, True, 75),
        (None, False, 143),
    ],
)
def test_term_is_followed_by_a_requeue_only_where_slurm_takes_the_nodes_away(slurm, state, warned, code):
    slurm.state = state
    assert conclude(LEADER, ended(SIGNALLED, 143, "SIGTERM"), warned=warned).exit_code == code
    assert slurm.asked.count(("requeue", "17")) == (code == 75)


def test_a_requeue_that_slurm_refuses_is_told_and_is_no_requeue(monkeypatch):
    def refuse(*_):
        raise OSError("Job is not requeueable")

    monkeypatch.setattr(requeue.requeue, "__kwdefaults__", {"call": refuse})
    found = conclude(LEADER, ended(SUCCEEDED, 0), warned=True)
    assert found.exit_code == 0 and "not requeueable; submit it again" in found.message


def test_ranks_end_one_by_one_after_the_warning():
    restarts = []
    one = Leaving(LEADER, forbid_restarts=lambda: restarts.append(0))
    assert one.running(Ranks([75], 1)) is None  # not warned: an ordinary failure
    one.forwarded(signal.SIGUSR2, 1)
    assert not one.warned
    one.forwarded(signal.SIGUSR1, 2)
    one.forwarded(signal.SIGUSR1, 2)
    assert restarts == [0]
    assert one.running(Ranks([], 2)) == 2
    assert one.running(Ranks([75], 1)) == 1
    assert one.running(Ranks([75, 0])) == 0
    assert one.running(Ranks([0, 0])) is None  # torch's own end
    assert one.running(Ranks([75, 1], 1)) is None
    assert leaving.WARNING == signal.SIGUSR1


def test_scontrol_is_bounded_and_its_absence_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(OSError):
        requeue.scontrol("show", "job", "1")
    program = tmp_path / "scontrol"
    program.write_text("#!/bin/sh\necho slurm_load_jobs error: Invalid job id >&2\nexit 1\n")
    program.chmod(0o755)
    with pytest.raises(OSError, match="Invalid job id"):
        requeue.scontrol("show", "job", "1")
    program.write_text("#!/bin/sh\n/bin/sleep 30\n")
    monkeypatch.setattr(requeue, "COMMAND_TIMEOUT_S", 0.2)
    with pytest.raises(OSError, match="took longer"):
        requeue.scontrol("show", "job", "1")
