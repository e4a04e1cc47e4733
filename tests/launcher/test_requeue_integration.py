"""A warned launch in a batch job, with a stand-in for scontrol: who saves may take its time, one requeue, exit code 75."""

from __future__ import annotations

import os
import signal

import pytest

from tests.launcher.slurm_environments import batch_script

pytestmark = pytest.mark.integration

SAVES = """
import os, pathlib, signal, sys, time
rank, here = os.environ["RANK"], pathlib.Path(sys.argv[1])
def leave(*_):
    if rank == "0":
        time.sleep(2)
        (here / "saved").write_text("all of it")
    sys.exit(75)
signal.signal(signal.SIGUSR1, leave)
(here / ("up" + rank)).write_text("x")
time.sleep(100)
"""


@pytest.fixture
def asked(runs):
    """The requeues that a stand-in for scontrol was asked for."""
    programs = runs.directory / "bin"
    programs.mkdir()
    (programs / "scontrol").write_text(
        f'#!/bin/sh\necho "$@" >>{runs.directory}/asked\necho JobState=RUNNING PreemptTime=None\n'
    )
    (programs / "scontrol").chmod(0o755)
    runs.path = f"{programs}:{os.environ['PATH']}"
    return runs.directory / "asked"


def warned(runs, *options: str):
    process = runs.start(
        *options, "--nproc-per-node", "2", runs.script(SAVES), str(runs.directory), PATH=runs.path, **batch_script()
    )
    for rank in range(2):
        runs.wait_for(runs.directory / f"up{rank}")
    process.send_signal(signal.SIGUSR1)
    return runs.finish(process)


def test_a_warned_job_is_requeued_once_when_all_ranks_have_saved(runs, asked):
    done = warned(runs, "--max-restarts", "2")
    assert done.code == 75, done.err
    assert (runs.directory / "saved").read_text() == "all of it"  # rank 1 had ended two seconds before
    assert asked.read_text().splitlines() == ["requeue 17"] and "job 17 is requeued" in done.err
    assert done.result["status"] == "requeued" and done.result["restarts"] == 0


def test_without_requeue_75_is_a_code_like_any_other(runs, asked):
    assert warned(runs, "--requeue", "never").code == 75
    assert not asked.exists()
