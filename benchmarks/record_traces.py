"""Record what the policies would be fed, while a job trains in this one process: traces for tests and calibration.

    python -m benchmarks.record_traces --workload resnet --schedule cosine --out resnet-cosine.json
    python -m benchmarks.record_traces --workload resnet --schedule cosine --policy kgt --out closed-loop.json

What a trace holds is in `benchmarks.traces`. Plasticity is that between two bf16 snapshots on a retained probe in evaluation
mode, as a reference process would answer it.

Without `--policy` nothing is frozen. With it the policy's decisions are carried out: frozen blocks get no gradient and
stay in evaluation mode. Blocks are those that the runtime makes of the model. `--reinit BLOCK@STEP` gives a block fresh
random weights in mid-run.

One thread; a run takes two minutes of a core with the ResNet-20, and half a minute with the small one.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.ordered_blocks import ordered_blocks
from benchmarks.pairing_workloads import WORKLOADS, Workload
from benchmarks.traces import SIGNALS, rounded, write
from kgt_ddp.policies.policy import Observation, Policy
from kgt_ddp.policy_spec import parse_policy
from kgt_ddp.reference.arena import named_tensors
from kgt_ddp.reference.model import model_from, pickled_structure
from kgt_ddp.reference.pairing import compare
from kgt_ddp.reference.runner import Similarities, make_runner
from kgt_ddp.reference.samples import sub_batch
from kgt_ddp.signals import score_lags
from kgt_ddp.weight_mean import WeightMean

FLOOR_EVERY = 8
JOBS: dict[str, dict[str, Any]] = {
    "resnet": {"learning_rate": 0.05, "batch_size": 32, "num_samples": 4_000, "epochs": 6}
    | {"num_probe": 64, "decisions": 150, "num_held_out": 2_000},
    "small-resnet": {"learning_rate": 0.05, "batch_size": 32, "num_samples": 4_000, "epochs": 6}
    | {"num_probe": 64, "decisions": 150, "num_held_out": 2_000},
    "minilm": {"learning_rate": 5e-5, "batch_size": 8, "num_samples": 1_200, "epochs": 2}
    | {"num_probe": 32, "decisions": 75, "num_held_out": 400},
}
NUM_TOKENS = 24

SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "step": lambda done: 0.1 ** ((done >= 0.5) + (done >= 0.75)),
    "warmup-linear": lambda done: min(done / 0.1, (1 - done) / 0.9),
    "cyclic": lambda done: 0.5 * (1 + math.cos(math.pi * (3 * done % 1))),
    "constant": lambda done: 1.0,
}
"""Share of the job done to share of the peak learning rate. `cyclic` is three cosines with warm restarts."""


def job_of(workload: str, total_steps: int) -> Workload:
    """The job that a workload's name stands for: those of `benchmarks.pairing`, made smaller where they are slow.

    `small-resnet` has half the channels and sees images of half the size; `minilm` sees the first tokens of its texts.
    """
    if workload == "minilm":
        job = WORKLOADS["minilm"](total_steps, quick=False)
        return replace(job, call=lambda indices: ((), {k: v[:, :NUM_TOKENS] for k, v in job.call(indices)[1].items()}))
    job = WORKLOADS["resnet"](total_steps, quick=False)
    if workload == "resnet":
        return job
    from resnet import ResNet  # an example: importable once the workload above has been made

    net = ResNet(blocks_per_stage=3, width=8)
    halved = functional.avg_pool2d(job.call(torch.arange(job.num_samples))[0][0], 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0, momentum=0.9, weight_decay=5e-4)
    return replace(job, net=net, optimizer=optimizer, call=lambda indices: ((halved[indices],), {}))


class Recorder:
    """One job, trained and looked at; `record` adds an entry, `decide` asks the policy."""

    def __init__(
        self, job: Workload, *, interval: int, total_steps: int, num_probe: int, policy: Policy | None
    ) -> None:
        self._probe = sub_batch(*job.call(torch.arange(num_probe)), num_probe)
        self.blocks = ordered_blocks(job.net, *self._probe.args, **self._probe.kwargs)
        self.names = [block.name for block in self.blocks.blocks]
        watched = [block.name for block in self.blocks.blocks if block.unit is not None]
        structure = pickled_structure(job.net)
        self._half = make_runner(model_from(structure), watched, "bf16")
        self._exact = make_runner(model_from(structure), watched, "fp32")
        self._remembered: dict[int, Similarities] = {}
        self._floor: list[float | None] = []
        self._job = job
        self._interval, self._total_steps = interval, total_steps
        self._policy = policy
        share = policy.weight_mean if policy is not None else 0.0
        self._mean = WeightMean(self.blocks, share) if share else None
        self._norms = torch.zeros(len(self.blocks))
        self._losses: list[float] = []
        self.records: list[dict[str, Any]] = []

    def step_ended(self, step: int, learning_rate: float, loss: float) -> None:
        """`step` steps are finished. Before the gradients go."""
        if self._mean is not None:
            self._mean.note(step, lambda: learning_rate)
        self._losses.append(loss)
        for index, block in enumerate(self.blocks.blocks):
            for _, parameter in block.parameters:
                if parameter.grad is not None:
                    self._norms[index] += parameter.grad.abs().sum()

    def record(self, step: int, learning_rate: float) -> None:
        signals = self._scores(step)
        norms = [None if i < self.blocks.frontier else norm for i, norm in enumerate(self._norms.tolist())]
        entry = {
            "step": step,
            "learning_rate": learning_rate,
            "loss": rounded(sum(self._losses) / max(len(self._losses), 1)),
            "grad_norm": [rounded(v) for v in norms],
            **{name: [rounded(v) for v in values] for name, values in signals.items()},
        }
        self._norms.zero_()
        self._losses.clear()
        if self._policy is not None:
            entry["frontier"] = self._decide(step, learning_rate, {**signals, "grad_norm": norms})
        self.records.append(entry)

    def _scores(self, step: int) -> dict[str, list[float | None]]:
        """What a reference would answer: an exact distance or None, and the floor, measured now and then."""
        weights = named_tensors(self._job.net)
        self._half.load(weights)
        now = self._half.similarities(self._probe)
        if len(self._remembered) % FLOOR_EVERY == 0:
            self._exact.load(weights)
            self._floor = self._compare(self._exact.similarities(self._probe), now)
        lag = score_lags(self._interval)[0]
        unknown: list[float | None] = [None] * len(self.blocks)
        signals = {
            name: self._compare(self._remembered[step - times * lag], now)
            if step - times * lag in self._remembered
            else unknown
            for name, times in SIGNALS.items()
        }
        self._remembered[step] = now
        return signals | {"floor": self._floor}

    def add_what_was_to_come(self) -> None:
        """To every record, how far each block still was from what it became in the end."""
        final = self._remembered[self.records[-1]["step"]]
        for entry in self.records:
            values = self._compare(self._remembered[entry["step"]], final)
            entry["to_end"] = [rounded(v) for v in values]

    def _compare(self, first: Similarities, second: Similarities) -> list[float | None]:
        return compare(self.names, first, second)

    def _decide(self, step: int, learning_rate: float, signals: dict[str, list[float | None]]) -> int:
        assert self._policy is not None
        observation = Observation(
            step=step,
            apply_step=step,
            total_steps=self._total_steps,
            num_blocks=len(self.blocks),
            frontier=self.blocks.frontier,
            learning_rate=learning_rate,
            lag_steps=score_lags(self._interval)[0],
            signals={name: tuple(values) for name, values in signals.items()},
        )
        decision = self._policy.decide(observation)
        if decision.frontier != self.blocks.frontier:
            print(f"  step {step}: {self.blocks.frontier} -> {decision.frontier}: {decision.reason}", flush=True)
            old = self.blocks.frontier
            self.blocks.move_to(decision.frontier)
            if self._mean is not None:
                self._mean.moved_from(old, put=decision.at_mean)
        return decision.frontier


def reinitialise(module: nn.Module) -> None:
    """Fresh random weights in place, as torch's own layers begin."""
    for part in module.modules():
        reset = getattr(part, "reset_parameters", None)
        if reset is not None:
            reset()


@torch.no_grad()
def held_out(job: Workload, indices: Tensor) -> dict[str, float]:
    """Accuracy and mean loss on these samples. Only the job's loss knows their labels: a sample is classified rightly
    where its label's probability is the largest one."""
    job.net.eval()
    right, losses = 0, 0.0
    for chosen in indices.split(100):
        args, kwargs = job.call(chosen)
        output = job.net(*args, **kwargs)
        logits = output if isinstance(output, Tensor) else output.logits
        for row, index in zip(logits.split(1), chosen.split(1), strict=True):
            loss = float(job.loss(row if isinstance(output, Tensor) else SimpleNamespace(logits=row), index))
            right += math.exp(-loss) >= float(row.softmax(-1).max()) - 1e-4
            losses += loss
    job.net.train()
    return {"accuracy": right / len(indices), "held_out_loss": round(losses / len(indices), 4)}


def train(args: argparse.Namespace) -> dict[str, Any]:
    """Train as told; the trace."""
    torch.manual_seed(args.seed)
    job_facts = JOBS[args.workload] | ({"epochs": args.epochs} if args.epochs else {})
    rate, size, count = job_facts["learning_rate"], job_facts["batch_size"], job_facts["num_samples"]
    total_steps = job_facts["epochs"] * (count // size)
    interval = min(max(total_steps // job_facts["decisions"], 3), 50)
    job = job_of(args.workload, total_steps)
    order = torch.randperm(job.num_samples, generator=torch.Generator().manual_seed(0))
    chosen, tested = order[:count], order[count : count + job_facts["num_held_out"]]
    recorder = Recorder(
        job,
        interval=interval,
        total_steps=total_steps,
        num_probe=job_facts["num_probe"],
        policy=parse_policy(args.policy) if args.policy else None,
    )
    block, _, when = (args.reinit or "").partition("@")
    generator = torch.Generator().manual_seed(args.seed)
    batches: list[Tensor] = []
    started = time.perf_counter()
    job.net.train()
    for step in range(total_steps + 1):
        learning_rate = rate * SCHEDULES[args.schedule](step / total_steps)
        if block and step == int(when):
            reinitialise(job.net.get_submodule(block))
        if step % interval == 0:
            recorder.record(step, learning_rate)
            if step % (25 * interval) == 0:
                print(f"  step {step} of {total_steps}: loss {recorder.records[-1]['loss']}", flush=True)
        if step == total_steps:
            break
        if not batches:
            batches = list(chosen[torch.randperm(count, generator=generator)].split(size)[: count // size])
        batch = batches.pop()
        for group in job.optimizer.param_groups:
            group["lr"] = learning_rate
        inputs, keywords = job.call(batch)
        job.optimizer.zero_grad(set_to_none=True)
        loss = job.loss(job.net(*inputs, **keywords), batch)
        loss.backward()
        job.optimizer.step()
        recorder.step_ended(step + 1, learning_rate, loss.item())
    recorder.add_what_was_to_come()
    return {
        "workload": args.workload,
        "schedule": args.schedule,
        "seed": args.seed,
        "policy": args.policy,
        "reinit": args.reinit,
        **job_facts,
        "blocks": recorder.names,
        "total_steps": total_steps,
        "interval": interval,
        "lag_steps": score_lags(interval)[0],
        **held_out(job, tested),
        "wall_s": round(time.perf_counter() - started, 1),
        "records": recorder.records,
    }


def main() -> None:
    command = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    command.add_argument("--workload", choices=JOBS, default="resnet")
    command.add_argument("--schedule", choices=SCHEDULES, default="cosine")
    command.add_argument("--policy", help="carry its decisions out; left out: nothing is frozen")
    command.add_argument("--reinit", metavar="BLOCK@STEP", help="give this block fresh weights at that step")
    command.add_argument("--epochs", type=int, help="instead of the workload's own number")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--out", type=Path, required=True)
    args = command.parse_args()
    torch.set_num_threads(1)
    trace = train(args)
    write(trace, args.out)
    print(f"{args.out.name}: accuracy {trace['accuracy']:.1%}, {trace['wall_s']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
