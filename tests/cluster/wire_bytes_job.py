"""Job of `test_wire_bytes`: two ranks on two hosts; rank 0 prints what the hook counted and what its interface sent."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.distributed as dist

from kgt_ddp import FreezeAwareDDP

STEPS = 36


def sent() -> int:
    return int(Path("/sys/class/net/eth0/statistics/tx_bytes").read_text())


dist.init_process_group("gloo")
torch.manual_seed(0)
model = torch.nn.Sequential(*[torch.nn.Linear(512, 512) for _ in range(6)])
ddp = FreezeAwareDDP(model, interval=3)
optimizer = torch.optim.SGD(ddp.parameters(), lr=1e-3)
marks = []
for step in range(STEPS):
    if step in (4, 16, 22, 34):
        dist.barrier()
        marks.append((sum(ddp.freezing.hook.reduced_bytes), sent(), ddp.freezing.frontier))
    optimizer.zero_grad()
    ddp(torch.randn(4, 512)).square().mean().backward()
    optimizer.step()
if dist.get_rank() == 0:
    print("MARKS " + json.dumps(marks), flush=True)
dist.destroy_process_group()
