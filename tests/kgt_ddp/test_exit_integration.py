"""Whole interpreters that end while reductions have just been under way: none aborts. (A hook that runs Python on a gloo
thread aborts about every fifth time.) KGT_EXIT_RUNS sets how often."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration

SCRIPT = """
import os, sys
import torch, torch.distributed as dist
from kgt_ddp import FreezeAwareDDP
rank, store = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
model = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(8)])
ddp = FreezeAwareDDP(model, policy="static:blocks=3,step=3", interval=3, bucket_cap_mb=0.02)
optimizer = torch.optim.SGD(ddp.parameters(), lr=0.01)
for _ in range(8):
    optimizer.zero_grad()
    ddp(torch.randn(8, 64)).square().mean().backward()
    optimizer.step()
assert ddp.freezing.frontier == 3
"""


def run_two_ranks(script: str, store: Path, what: str) -> None:
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(rank), str(store)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=Path(__file__).resolve().parents[2],
        )
        for rank in range(2)
    ]
    for rank, process in enumerate(ranks):
        _, stderr = process.communicate(timeout=90)
        assert process.returncode == 0, f"{what}, rank {rank}: {process.returncode}\n{stderr.decode()[-2000:]}"
        assert b"terminate called" not in stderr


def test_interpreters_end_without_an_abort(tmp_path):
    for run in range(int(os.environ.get("KGT_EXIT_RUNS", "2"))):
        run_two_ranks(SCRIPT, tmp_path / f"store{run}", f"run {run}")


SLOW_TO_PUT_AWAY = """
# The last collective is the user's own. The threads that carried it out get no core any more, as on a busy machine, until
# the interpreter is going; a rival for the only core sees to that.
def total():
    value = torch.ones(1000)
    dist.all_reduce(value)
import subprocess
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
rival = "import os; parent = os.getppid(); any(os.getppid() != parent for _ in iter(int, 1))"
subprocess.Popen([sys.executable, "-c", rival])
for thread in os.listdir("/proc/self/task"):
    if "gloo" in open(f"/proc/self/task/{thread}/comm").read():
        os.sched_setscheduler(int(thread), os.SCHED_IDLE, os.sched_param(0))
total()
"""
NOT_LOOKED_AFTER = "import kgt_ddp.gloo_exit\nkgt_ddp.gloo_exit._registered = True\n"


def test_a_collective_of_the_users_just_before_the_end_does_not_abort(tmp_path):
    """Without our exit handler a run may abort here (one of seven did); `KGT_EXIT_UNSAFE=1` shows it."""
    unsafe = NOT_LOOKED_AFTER if os.environ.get("KGT_EXIT_UNSAFE") else ""
    for run in range(int(os.environ.get("KGT_EXIT_RUNS", "1"))):
        run_two_ranks(unsafe + SCRIPT + SLOW_TO_PUT_AWAY, tmp_path / f"store{run}", f"run {run}")
