"""Jobs hand over at their epochs: what runs is paid for by the one whose turn it is, and nothing runs meanwhile."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from benchmarks import turns
from benchmarks.epoch_gate import __file__ as gate
from benchmarks.turns import Job, JobFailed

pytestmark = pytest.mark.integration

SCRIPT = """
import subprocess, sys, time
from torch.utils.data import DistributedSampler
def burn(cpu_s):
    end = time.process_time() + cpu_s
    while time.process_time() < end: pass
if sys.argv[1] == "reference":
    burn(60)
reference = subprocess.Popen([sys.executable, __file__, "reference", "kgt_ddp.reference.worker"])
sampler = DistributedSampler(range(4), num_replicas=1, rank=0)
try:
    for epoch in range(3):
        sampler.set_epoch(epoch)
        sampler.set_epoch(epoch)
        print(sys.argv[1], "epoch", epoch, flush=True)
        if sys.argv[1] == "stuck": time.sleep(60)
        if sys.argv[1] == "broken": raise ValueError("as asked for")
        burn(0.3)
finally:
    reference.kill()
    reference.wait()
"""


@pytest.fixture
def job(tmp_path: Path) -> Iterator[object]:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    env = {**os.environ, "RANK": "0", "WORLD_SIZE": "1", "OMP_NUM_THREADS": "1"}
    with ExitStack() as stack:

        def make(name: str, turn_timeout_s: float = 120.0) -> Job:
            command = [sys.executable, gate, str(script), name]
            log = tmp_path / f"{name}.log"
            return stack.enter_context(Job(command, env=env, cwd=tmp_path, log=log, turn_timeout_s=turn_timeout_s))

        yield make
    assert not [p for p in psutil.Process().children(recursive=True) if str(script) in p.cmdline()]


def test_jobs_run_in_turns_and_each_pays_for_its_own(job: object, tmp_path: Path) -> None:
    jobs = [job(name) for name in ("one", "two")]  # type: ignore[operator]
    while not all(j.ended for j in jobs):
        for mine in jobs:
            others = [tree_cpu_s(j) for j in jobs if j is not mine and j.turns and not j.ended]
            before_s = time.perf_counter()
            turn = mine.turn()
            assert turn.wall_s <= time.perf_counter() - before_s
            assert [tree_cpu_s(j) for j in jobs if j is not mine and j.turns and not j.ended] == others
        time.sleep(1)  # time in which both are stopped is in no turn
    for mine in jobs:
        assert [turn.place for turn in mine.turns] == ["start", "0", "1", "2", "exit"]
        for turn in mine.turns[1:3]:
            # In whole ticks of 10 ms: 0.67 - 0.38 is not 0.29 in binary.
            own_s = round(turn.cpu_s - turn.reference_cpu_s, 2)
            assert 0.29 <= own_s < 1.5
            assert 0 < turn.reference_cpu_s <= turn.wall_s + 0.5
            assert turn.cpu_s <= 2 * turn.wall_s + 0.5
    assert (tmp_path / "one.log").read_text().split("\n")[:3] == ["one epoch 0", "one epoch 1", "one epoch 2"]


def tree_cpu_s(job: Job) -> float:
    assert job._process is not None
    return job._cost_so_far(job._process.pid)[0]


def test_a_job_that_breaks_is_named_with_its_last_lines(job: object) -> None:
    broken = job("broken")  # type: ignore[operator]
    broken.turn()
    with pytest.raises(JobFailed, match="(?s)broken ended with exit code 1 in 0:.*as asked for"):
        broken.turn()


def test_a_job_that_is_stuck_is_killed_when_its_turn_has_taken_too_long(job: object) -> None:
    stuck = job("stuck")  # type: ignore[operator]
    stuck.turn()
    root = stuck._process.pid
    stuck._timeout_s = 1.0
    with pytest.raises(JobFailed, match="stuck did not come to the end of 0 within 1 s"):
        stuck.turn()
    assert not psutil.pid_exists(root)


def test_a_stopped_job_can_be_killed(job: object) -> None:
    mine = job("killed")  # type: ignore[operator]
    mine.turn()
    tree = turns._descendants(mine._process.pid)
    assert tree and all(process.status() == psutil.STATUS_STOPPED for process in tree)
    mine.close()
    assert not [process for process in tree if process.is_running()]
