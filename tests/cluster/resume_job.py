"""Job of the tests that stop and resume: trains a small model, saves when it is asked to end, goes on where it was.

    resume_job.py DIRECTORY STEPS SECONDS_PER_STEP [--save-every N]

Files in DIRECTORY: `step` (the last finished one), `starts` (a line for each start), `checkpoint.pt`, `final.pt`. Data
are a function of step and rank alone. USR1 or TERM: all ranks agree on a step, rank 0 saves, all exit with 75.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from kgt_ddp import FreezeAwareDDP

LATER = 75
directory, steps, step_s = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
save_every = int(sys.argv[5]) if "--save-every" in sys.argv else 0
asked: list[int] = []
for signum in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(signum, lambda signum, _: asked.append(signum))

dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)
model = torch.nn.Sequential(*[torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Tanh()) for _ in range(6)])
ddp = FreezeAwareDDP(model, interval=3)
optimizer = torch.optim.SGD(ddp.parameters(), lr=0.05, momentum=0.9)
first, checkpoint = 0, directory / "checkpoint.pt"
if checkpoint.exists():
    saved = torch.load(checkpoint, weights_only=True)
    first = saved["step"]
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    ddp.freezing.load_state_dict(saved["freezing"])
if rank == 0:
    with open(directory / "starts", "a") as f:
        print(json.dumps({"step": first, "world": world, "host": os.uname().nodename}), file=f)


def save(step: int) -> None:
    """Replace the checkpoint as a whole: a kill may come at any moment."""
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
    partial = directory / "checkpoint.partial"
    torch.save({**state, "freezing": ddp.freezing.state_dict()}, partial)
    partial.replace(checkpoint)


def all_are_asked() -> bool:
    """Whether any rank was asked to end; ranks hear of it in different steps and must stop in the same one."""
    flag = torch.tensor(float(bool(asked)))
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag.item())


for step in range(first, steps):
    if all_are_asked():
        if rank == 0:
            save(step)
            print(f"saved before step {step}", flush=True)
        sys.exit(LATER)
    if rank == 0 and save_every and step % save_every == 0:
        save(step)
    generator = torch.Generator().manual_seed(1000 * step + rank)
    x = torch.randn(8, 32, generator=generator)
    optimizer.zero_grad()
    (ddp(x) - x.flip(1)).square().mean().backward()
    optimizer.step()
    time.sleep(step_s)
    if rank == 0:
        (directory / "step").write_text(str(step + 1))
if rank == 0:
    summary = ddp.freezing.summary()
    torch.save({"model": model.state_dict(), "freezes": summary["freezes"]}, directory / "final.partial")
    (directory / "final.partial").replace(directory / "final.pt")
    print("finished", flush=True)
dist.destroy_process_group()
