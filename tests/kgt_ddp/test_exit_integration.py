"""Whole interpreters that end while reductions have just been under way: none aborts. (A hook that runs Python on a gloo
thread aborts about every fifth time.) KGT_EXIT_RUNS sets how often; the soak runs 50."""

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


def test_interpreters_end_without_an_abort(tmp_path):
    for run in range(int(os.environ.get("KGT_EXIT_RUNS", "3"))):
        store = tmp_path / f"store{run}"
        ranks = [
            subprocess.Popen(
                [sys.executable, "-c", SCRIPT, str(rank), str(store)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=Path(__file__).resolve().parents[2],
            )
            for rank in range(2)
        ]
        for rank, process in enumerate(ranks):
            _, stderr = process.communicate(timeout=90)
            assert process.returncode == 0, f"run {run}, rank {rank}: {process.returncode}\n{stderr.decode()[-2000:]}"
            assert b"terminate called" not in stderr
