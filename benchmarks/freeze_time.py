"""What freezing costs in accuracy, by when and how much: branches of one training, apart from any policy.

    python -m benchmarks.freeze_time [--workload vision|text] [--quick] [--seeds 0,1,2,3]

`vision`: a ResNet-20 on 45,000 images of Fashion-MNIST at half their size, 10 epochs, cosine. `text`: all-MiniLM-L6-v2
fine-tuned on 4,000 texts of 20 Newsgroups, their first 64 tokens, 3 epochs, linear decay. It trains to the end in this
process. From copies of its weights and momentum on the way it trains on with front blocks frozen at fixed steps (`VISION`,
`TEXT`), as they are or at the mean of their weights, on the same batches in the same order. Each branch ends with its
accuracy on samples that it did not train on, 25,000 images or 10,000 texts: the differences looked for are tenths of a
point, which fewer hardly show.

Figures: `plain_accuracy_percent`; for each plan `NAME_accuracy_change` in points and `NAME_loss_change`, held-out, against
the same seed's training without freezing; `NAME_train_loss_change`, of the last epoch.

One thread; a seed takes three quarters of an hour: start a second process with other seeds on a second core. Each finished
seed is a line in `runs/freeze_time/WORKLOAD.jsonl`; a run takes up what is there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import run_log
from benchmarks.freeze_workloads import Job, TextJob, VisionJob, Workload, text, vision
from benchmarks.harness import Figures, parser
from benchmarks.machine import ROOT, commit
from benchmarks.ordered_blocks import ordered_blocks
from kgt_ddp.policies.kgt import Kgt
from kgt_ddp.weight_mean import WeightMean

RUNS = ROOT / "runs" / "freeze_time"


@dataclass(frozen=True)
class Plan:
    """What is frozen when, and how."""

    moves: tuple[tuple[float, int], ...]
    """(share of the job, front blocks frozen from there on), in order."""
    at_mean: bool = False
    """Whether a block is put to the mean of its weights as it freezes, as the policy kgt has it."""


KGT = ((0.48, 3), (0.50, 4), (0.53, 5), (0.56, 7), (0.68, 8))
AT_ONCE = ((0.56, 7), (0.68, 8))
VISION = {
    "tolerance_02": Plan(KGT),
    "tolerance_02_mean": Plan(KGT, at_mean=True),
    "tolerance_01": Plan(((0.48, 3), (0.50, 4), (0.53, 5), (0.56, 6), (0.71, 7), (0.75, 8))),
    "front": Plan(((0.48, 3), (0.56, 6))),
    "at_once": Plan(AT_ONCE),
    "at_once_mean": Plan(AT_ONCE, at_mean=True),
    "at_once_45_mean": Plan(((0.45, 7), (0.56, 8)), at_mean=True),
    "at_once_35_mean": Plan(((0.35, 7), (0.50, 8)), at_mean=True),
    "earlier_mean": Plan(((0.38, 3), (0.42, 5), (0.46, 7), (0.56, 8)), at_mean=True),
    "linear": Plan(tuple((0.3125 + 0.0625 * i, i + 1) for i in range(8))),
}
"""`tolerance_02` and `_01` are what the policy kgt does on the ResNet with a `late_tolerance` of 0.02 and 0.01; the last is
the policy `linear`."""

LATE_TEXT = ((0.68, 5), (0.75, 6))
TEXT = {
    "tolerance_02": Plan(LATE_TEXT),
    "tolerance_02_mean": Plan(LATE_TEXT, at_mean=True),
    "tolerance_004": Plan(((0.72, 4), (0.76, 5))),
    "early": Plan(((0.30, 4),)),
    "embeddings_early": Plan(((0.10, 1),)),
    "embeddings_late": Plan(((0.55, 1),)),
    "kgt": Plan(((0.55, 1), (0.56, 2), (0.70, 3), (0.76, 5), (0.84, 6))),
}
"""MiniLM has eight blocks: the embeddings, six layers, and the head. `tolerance_02` is what the policy kgt did there while its
`late_tolerance` held for all blocks, `tolerance_004` what it did before it had one, both while the embeddings belonged to the
first layer's block; `kgt` is what it did with seed 0 when they had become one, before `WANDERING` in its rule."""


@dataclass(frozen=True)
class Kind:
    """A kind of training."""

    plans: Mapping[str, Plan]
    load: Callable[[Any], Callable[[int], Workload]]
    """Reads the data for a job; makes the workload of a seed."""
    job: Job
    quick: Job


KINDS = {
    "vision": Kind(VISION, vision, VisionJob(), VisionJob(num_train=512, num_held_out=512, epochs=2, width=4)),
    "text": Kind(TEXT, text, TextJob(), TextJob(num_train=64, num_held_out=32, epochs=1, max_tokens=16)),
}


class Training:
    """A network, its optimizer, and the runtime's own blocks and mean, in this process alone."""

    def __init__(self, workload: Workload) -> None:
        self.net = workload.network()
        self._workload = workload
        self._optimizer = workload.optimizer(self.net)
        self._blocks = ordered_blocks(self.net, *workload.example())
        self._mean = WeightMean(self._blocks, Kgt.weight_mean)

    def freeze(self, frontier: int, *, at_mean: bool) -> None:
        """The first `frontier` blocks."""
        old = self._blocks.frontier
        if frontier == old:
            return
        self._blocks.move_to(frontier)
        if at_mean:
            self._mean.moved_from(old)

    def step(self, step: int) -> float:
        """Step number `step`; its loss."""
        rate = self._workload.rate(step)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        loss = self._workload.loss(self.net, step)
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        self._mean.note(step + 1, lambda: rate)
        return loss.item()

    def state_dict(self) -> dict[str, Any]:
        return {
            "net": self.net.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "mean": self._mean.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Of a training with nothing frozen."""
        self.net.load_state_dict(state["net"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._mean.load_state_dict(state["mean"])


class Branches:
    """One seed: the training without freezing, and the branches of it."""

    def __init__(self, workload: Workload) -> None:
        self._workload = workload
        self._job = workload.job

    def run(self, plans: Mapping[str, Plan]) -> dict[str, dict[str, float]]:
        """Figures of the training without freezing, as "plain", and of each plan."""
        begins = {name: int(plan.moves[0][0] * self._job.total_steps) for name, plan in plans.items()}
        copies: dict[int, Any] = {}
        found = {"plain": self._finish(self._begin(None), 0, Plan(()), copies, set(begins.values()))}
        for name, plan in plans.items():
            found[name] = self._finish(self._begin(copies[begins[name]]), begins[name], plan, {}, set())
        return found

    def _begin(self, saved: Mapping[str, Any] | None) -> Training:
        training = Training(self._workload)
        if saved is not None:
            training.load_state_dict(copy.deepcopy(saved))  # an optimizer takes the tensors of a state as its own
        return training

    def _finish(
        self, training: Training, begin: int, plan: Plan, copies: dict[int, Any], wanted: set[int]
    ) -> dict[str, float]:
        """Train from step `begin` to the end; `copies` takes its state at the wanted steps."""
        job = self._job
        losses: list[float] = []
        for step in range(begin, job.total_steps):
            if step % job.steps_per_epoch == 0:
                losses = []
            if step in wanted:
                copies[step] = copy.deepcopy(training.state_dict())
            frontier = max((blocks for share, blocks in plan.moves if step >= int(share * job.total_steps)), default=0)
            training.freeze(frontier, at_mean=plan.at_mean)
            losses.append(training.step(step))
        accuracy, held_out_loss = self._workload.quality(training.net)
        return {"accuracy": accuracy, "loss": held_out_loss, "train_loss": sum(losses) / len(losses)}


def summarise(name: str, plans: Mapping[str, Plan], runs: Sequence[Mapping[str, Any]]) -> Figures:
    """Medians over seeds, each plan against the training without freezing of its seed."""
    figures = Figures(name)
    figures.sampled("plain_accuracy_percent", [run["found"]["plain"]["accuracy"] for run in runs])
    for plan in plans:
        for key in ("accuracy", "loss", "train_loss"):
            figures.sampled(f"{plan}_{key}_change", [r["found"][plan][key] - r["found"]["plain"][key] for r in runs])
    figures.exact("num_seeds", len(runs))
    figures.fact("plans", {plan: asdict(what) for plan, what in plans.items()})
    figures.fact("runs", list(runs))
    return figures


def finished_runs(path: Path, job: Job, plans: Mapping[str, Plan]) -> dict[int, dict[str, Any]]:
    """Runs of this job with all these plans, by seed; a torn line is skipped."""
    runs = [run for run in run_log.read(path) if run["job"] == asdict(job)]
    return {run["seed"]: run for run in runs if run["found"].keys() >= plans.keys()}


def main(argv: Sequence[str] | None = None) -> None:
    made = parser(__doc__)
    made.add_argument("--workload", choices=sorted(KINDS), default="vision", help="(default vision)")
    made.add_argument(
        "--seeds", default="0,1,2,3", help="comma-separated (default 0,1,2,3; with --quick the first only)"
    )
    args = made.parse_args(argv)
    kind, seeds = KINDS[args.workload], [int(seed) for seed in args.seeds.split(",")]
    job, seeds = (kind.quick, seeds[:1]) if args.quick else (kind.job, seeds)
    torch.set_num_threads(1)
    log = RUNS / f"{args.workload}.jsonl"
    runs = {} if args.quick else finished_runs(log, job, kind.plans)
    of_seed = kind.load(job)
    for seed in seeds:
        if seed not in runs:
            found = Branches(of_seed(seed)).run(kind.plans)
            runs[seed] = {"seed": seed, "job": asdict(job), "commit": commit(), "found": found}
            if not args.quick:
                run_log.add(log, runs[seed])
        print(f"seed {seed}: {runs[seed]['found']}", flush=True)
    name = "freeze_time" if args.workload == "vision" else f"freeze_time_{args.workload}"
    summarise(name, kind.plans, [runs[seed] for seed in sorted(runs)]).publish(quick=args.quick)


if __name__ == "__main__":
    main()
