"""The hang watchdog: who is silent, the stacks of all, and stopping on request."""

from __future__ import annotations

import pytest

from kgtrun.contract.events import read_events

pytestmark = pytest.mark.integration

SCRIPT = """
import os, pathlib, sys, time
from kgtrun.contract import heartbeat
def stuck_here():
    time.sleep(float(sys.argv[1]))
for step in range(60):
    heartbeat.beat(step)
    time.sleep(0.05)
    if os.environ["RANK"] == "1" and step == 3:
        stuck_here()
"""


def test_a_silent_rank_is_reported_with_the_stacks_of_all(runs):
    done = runs.run("--nproc-per-node", "2", "--hang-timeout", "1", runs.script(SCRIPT), "3")
    assert done.code == 0
    assert "no progress for" in done.err and "rank 1" in done.err and "stuck_here" in done.err
    assert "stack of rank 0" in done.err and "last step" in done.err
    hangs = [e for e in read_events(done.run_dir) if e["kind"] == "hang"]
    assert len(hangs) == 1 and hangs[0]["silent"] == [1]


def test_a_hung_run_is_stopped_when_asked(runs):
    args = ("--hang-timeout", "1", "--hang-action", "stop", "--shutdown-timeout", "2")
    done = runs.run("--nproc-per-node", "2", *args, runs.script(SCRIPT), "100")
    assert done.code == 124 and "made no progress" in done.err


def test_a_stopped_rank_is_named(runs):
    script = runs.script("import os, signal, time\nos.kill(os.getpid(), signal.SIGSTOP)\n")
    args = ("--hang-timeout", "1", "--hang-action", "stop", "--shutdown-timeout", "2")
    done = runs.run(*args, script)
    assert "state T" in done.err and done.code == 124
