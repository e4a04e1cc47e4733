"""Gradient accumulation with no_sync, autocast, GradScaler and clipping.    torchrun accumulation_and_amp.py"""

import contextlib
import os

import torch
import torch.distributed
from torch import nn

ACCUMULATE = 3


def main():
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    torch.manual_seed(2)
    model = nn.parallel.DistributedDataParallel(
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5))
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    generator = torch.Generator().manual_seed(10 + rank)
    losses = []
    for step in range(12):
        for micro in range(ACCUMULATE):
            x = torch.randn(8, 1, 8, 8, generator=generator)
            y = torch.randint(0, 5, (8,), generator=generator)
            last = micro == ACCUMULATE - 1
            with contextlib.nullcontext() if last else model.no_sync():
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    loss = nn.functional.cross_entropy(model(x).float(), y) / ACCUMULATE
                scaler.scale(loss).backward()
            losses.append(loss.item())
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=step % 2 == 0)
    if rank == 0:
        torch.save({"model": model.module.state_dict(), "losses": losses}, os.environ.get("OUTPUT", "out.pt"))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
