"""Job of the tests that break something at a chosen moment: it stops there, says so, and waits to be let on.

    aimed_job.py DIRECTORY STEPS none|step|gradients|decision|scores

`step`: rank 1 stops inside the forward of a step, the others wait for its gradients. `gradients`: there too, with
gradients of some 5 MB: on a slow link the test can meet them on their way when the job goes on. `decision`: rank 0's
policy stops while it decides: the scores have been summed, the mask has not been sent. `scores`: there too, and the
policy freezes its second block by scores alone (under --deterministic they are waited for). Files in DIRECTORY: `held`
(written by the job when it has stopped), `go on` (written by the test), `end` (frontier and checksum of the weights of
every rank).
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from kgt_ddp import FreezeAwareDDP
from kgt_ddp.policies.policy import Decision, Observation, Schedule
from kgt_ddp.reference.protocol import socket_path

AIM = 20
"""Step of the moment."""
AFTER = 6
"""`scores`: steps until what was on its way at that moment has been heard: two decisions."""
directory, steps, moment = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
width = 512 if moment == "gradients" else 32


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 240
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.02)


def hold() -> None:
    (directory / "held").write_text("")
    wait_for(directory / "go on")


class Holding(Schedule):
    """One block from the start, two from the moment on."""

    signals = ("grad_norm",)
    held = False

    def decide(self, observation: Observation) -> Decision:
        if moment in ("decision", "scores") and not self.held and observation.step >= AIM:
            self.held = True
            hold()
        scores = list(observation.signals.get("plasticity", ()))
        if moment == "scores":
            due = observation.step >= AIM + AFTER and scores[0] is not None
        else:
            due = observation.step >= AIM
        return Decision(frontier=2 if due else 1, reason="the test's", numbers={"plasticity": scores})


class Listening(Holding):
    signals = ("plasticity",)


if moment == "scores":
    wait_for(socket_path(os.environ["KGTRUN_REFERENCE_DIR"], 0))  # slow to start where there is other work
dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)
model = torch.nn.Sequential(*[torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.Tanh()) for _ in range(6)])
ddp = FreezeAwareDDP(model, policy=Listening() if moment == "scores" else Holding(), interval=3)
optimizer = torch.optim.SGD(ddp.parameters(), lr=0.05, momentum=0.9)
now = [0]
if moment in ("step", "gradients") and rank == 1:
    model[3].register_forward_hook(lambda *_: hold() if now[0] == AIM else None)
for step in range(steps):
    now[0] = step
    x = torch.randn(8, width, generator=torch.Generator().manual_seed(1000 * step + rank))
    optimizer.zero_grad()
    (ddp(x) - x.flip(1)).square().mean().backward()
    optimizer.step()
mine = [ddp.freezing.frontier, *(float(p.detach().double().sum()) for p in model.parameters())]
everyone: list = [None] * world
dist.all_gather_object(everyone, mine)
if rank == 0:
    (directory / "end").write_text(json.dumps(everyone))
dist.destroy_process_group()
