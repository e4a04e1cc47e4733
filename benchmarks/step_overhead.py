"""What freezing costs and saves in a step: FreezeAwareDDP against stock DDP, and against the same blocks frozen by hand.

Cases, all in one process group and interleaved round by round:

- `ddp`: stock DistributedDataParallel; `hook`: FreezeAwareDDP with policy none, its hook active;
- `hand_k`: stock DDP over a model whose first k blocks were frozen before wrapping (the ideal: no agreement, no guard);
- `frozen_k`: FreezeAwareDDP whose policy froze the same k blocks while it trained.

Network: the ResNet-20 of the example (10 blocks), random images of 1×28×28. A sample is the wall time of a few steps, on
rank 0; the agreement runs at the interval of a job of 1,560 steps.

Figures: `hook_over_ddp` and `hook_over_ddp_1rank`, `frozen_over_hand_k3|k6|k8` (goal ≤ 1.02), `frozen_over_ddp_k3|k6|k8`,
`mask_apply_steps` (time to apply a mask, in unfrozen steps; goal < 1).
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.harness import Figures, interleave, parser, ratios, seconds

KS = (3, 6, 8)
TOTAL_STEPS = 1560
EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def network() -> nn.Module:
    sys.path.insert(0, str(EXAMPLES))
    from resnet import resnet20

    torch.manual_seed(0)
    return resnet20()


class Job:
    """One training job that can be run a few steps at a time."""

    def __init__(self, ddp: DistributedDataParallel, batch: int, rank: int) -> None:
        self.ddp: Any = ddp
        self.optimizer = torch.optim.SGD(ddp.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
        g = torch.Generator().manual_seed(rank)
        self.images = torch.randn(batch, 1, 28, 28, generator=g)
        self.labels = torch.randint(0, 10, (batch,), generator=g)

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.optimizer.zero_grad()
            nn.functional.cross_entropy(self.ddp(self.images), self.labels).backward()
            self.optimizer.step()


def freeze_by_hand(model: nn.Module, parts: list[str]) -> nn.Module:
    """Blocks frozen as a user would, before wrapping. `parts`: qualified names of modules."""
    for name in parts:
        module = model.get_submodule(name).eval()
        for parameter in module.parameters():
            parameter.requires_grad_(False)
    train = model.train

    def keep_eval(mode: bool = True) -> nn.Module:
        train(mode)
        for name in parts:
            model.get_submodule(name).eval()
        return model

    model.train = keep_eval  # type: ignore[method-assign]
    return model


def front(model: nn.Module, k: int) -> list[str]:
    """The stem and the first k residual blocks of the ResNet, by name."""
    blocks = [f"stage{s}.{b}" for s in (1, 2, 3) for b in range(3)]
    return ["stem", *blocks[:k]]


def jobs(rank: int, batch: int, ks: tuple[int, ...]) -> dict[str, Job]:
    from kgt_ddp import FreezeAwareDDP

    made = {
        "ddp": Job(DistributedDataParallel(network()), batch, rank),
        "hook": Job(FreezeAwareDDP(network(), policy="none", total_steps=TOTAL_STEPS), batch, rank),
    }
    for k in ks:
        model = network()
        made[f"hand_k{k}"] = Job(DistributedDataParallel(freeze_by_hand(model, front(model, k))), batch, rank)
        policy = f"static:blocks={k}"
        made[f"frozen_k{k}"] = Job(FreezeAwareDDP(network(), policy=policy, total_steps=TOTAL_STEPS), batch, rank)
    for job in made.values():
        job.run(5)
    for k in ks:
        frontier = made[f"frozen_k{k}"].ddp.freezing.frontier
        assert frontier == k, f"{frontier} blocks are frozen, not {k}"
    return made


def mask_apply_seconds(rank: int, batch: int, changes: int) -> list[float]:
    """Wall time of each mask's application, from the events of a job that moves its frontier again and again."""
    from kgt_ddp import FreezeAwareDDP
    from kgt_ddp.policies.schedules import Replay
    from kgtrun.contract.events import read_events

    with tempfile.TemporaryDirectory() as folder:
        os.environ["KGTRUN_RUN_DIR"] = folder
        moves = Replay([(3 + 3 * i, 1 + i % 8) for i in range(changes)])
        job = Job(FreezeAwareDDP(network(), policy=moves, interval=3), batch, rank)
        job.run(6 + 3 * changes)
        return [e["seconds"] for e in read_events(folder) if e["kind"] == "apply" and e["index"] == rank]


def rank_main(
    rank: int, world: int, store: str, batch: int, steps: int, rounds: int, ks: tuple, pipe: Connection
) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
    torch.set_num_threads(max(1, (os.cpu_count() or 2) // world))
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    made = jobs(rank, batch, ks)

    def case(job: Job) -> Callable[[], float]:
        def measure() -> float:
            dist.barrier()
            return seconds(lambda: job.run(steps))

        return measure

    samples = interleave({name: case(job) for name, job in made.items()}, rounds=rounds)
    applied = mask_apply_seconds(rank, batch, 12) if ks else []
    pipe.send((samples, applied))
    dist.destroy_process_group()


def measure(world: int, batch: int, steps: int, rounds: int, ks: tuple[int, ...]) -> tuple[dict[str, list[float]], Any]:
    """Samples of rank 0, seconds for `steps` steps."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = context.Pipe(duplex=False)
        _, unused = context.Pipe(duplex=False)
        store = os.path.join(folder, "store")
        processes = [
            context.Process(
                target=rank_main, args=(r, world, store, batch, steps, rounds, ks, theirs if r == 0 else unused)
            )
            for r in range(world)
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + 1800
        while not ours.poll(1):
            dead = [p.exitcode for p in processes if p.exitcode]
            if dead or time.monotonic() > deadline:
                for process in processes:
                    process.kill()
                raise SystemExit(f"a rank of the benchmark ended with {dead or 'no result in time'}")
        result = ours.recv()
        for process in processes:
            process.join()
        return result


def main() -> None:
    options = parser(__doc__).parse_args()
    batch, steps, rounds = (16, 2, 3) if options.quick else (64, 6, 15)
    figures = Figures("step_overhead")
    figures.fact("batch_per_rank", batch)
    figures.fact("steps_per_sample", steps)
    one, _ = measure(1, batch, steps, rounds, ())
    two, applied = measure(2, batch, steps, rounds, KS)
    figures.sampled("hook_over_ddp", ratios(two["hook"], two["ddp"]))
    figures.sampled("hook_over_ddp_1rank", ratios(one["hook"], one["ddp"]))
    for k in KS:
        figures.sampled(f"frozen_over_hand_k{k}", ratios(two[f"frozen_k{k}"], two[f"hand_k{k}"]))
    for k in KS:
        figures.sampled(f"frozen_over_ddp_k{k}", ratios(two[f"frozen_k{k}"], two["ddp"]))
    step = statistics.median(two["ddp"]) / steps
    figures.sampled("mask_apply_steps", [a / step for a in applied])
    figures.publish(quick=options.quick)


if __name__ == "__main__":
    main()
