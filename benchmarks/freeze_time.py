"""What freezing costs in accuracy, by when and how much: branches of one training, apart from any policy.

    python -m benchmarks.freeze_time [--quick] [--seeds 0,1,2,3]

A ResNet-20 on 45,000 images of Fashion-MNIST at half their size, 10 epochs, cosine, trains to the end in this process. From
copies of its weights and momentum on the way it trains on with front blocks frozen at fixed steps (`PLANS`), as they are or
at the mean of their weights, on the same batches in the same order. Each branch ends with its accuracy on 25,000 images that
it did not train on: the differences looked for are tenths of a point, which 10,000 images hardly show.

Figures: `plain_accuracy_percent`; for each plan `NAME_accuracy_change` in points and `NAME_loss_change`, held-out, against
the same seed's training without freezing; `NAME_train_loss_change`, of the last epoch.

One thread; a seed takes three quarters of an hour: start a second process with other seeds on a second core. Each finished
seed is a line in `runs/freeze_time/runs.jsonl`; a run takes up what is there.
"""

from __future__ import annotations

import copy
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks import run_log
from benchmarks.harness import Figures, parser
from benchmarks.machine import ROOT, commit
from benchmarks.ordered_blocks import ordered_blocks
from kgt_ddp.policies.kgt import Kgt
from kgt_ddp.weight_mean import WeightMean

sys.path.insert(0, str(ROOT / "examples"))  # the examples are scripts, and import each other as such
from fashion_resnet import DATA, load
from resnet import ResNet

RUNS = ROOT / "runs" / "freeze_time" / "runs.jsonl"
NUM_DRAWN = 60_000
"""Images to train on are drawn from so many; what is left of them, and all test images, are held out."""


@dataclass(frozen=True)
class Plan:
    """What is frozen when, and how."""

    moves: tuple[tuple[float, int], ...]
    """(share of the job, front blocks frozen from there on), in order."""
    at_mean: bool = False
    """Whether a block is put to the mean of its weights as it freezes, as the policy kgt has it."""


KGT = ((0.48, 3), (0.50, 4), (0.53, 5), (0.56, 7), (0.68, 8))
AT_ONCE = ((0.56, 7), (0.68, 8))
PLANS = {
    "tolerance_02": Plan(KGT),
    "tolerance_02_mean": Plan(KGT, at_mean=True),
    "tolerance_01": Plan(((0.48, 3), (0.50, 4), (0.53, 5), (0.56, 6), (0.71, 7), (0.75, 8))),
    "front": Plan(((0.48, 3), (0.56, 6))),
    "at_once": Plan(AT_ONCE),
    "at_once_mean": Plan(AT_ONCE, at_mean=True),
    "linear": Plan(tuple((0.3125 + 0.0625 * i, i + 1) for i in range(8))),
}
"""`tolerance_02` and `_01` are what the policy kgt does on the ResNet with a `late_tolerance` of 0.02 and 0.01; the last is
the policy `linear`."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """The size of the training."""

    num_train: int = 45_000
    num_held_out: int = 25_000
    epochs: int = 10
    batch_size: int = 128
    learning_rate: float = 0.1
    width: int = 16

    @property
    def steps_per_epoch(self) -> int:
        return self.num_train // self.batch_size

    @property
    def total_steps(self) -> int:
        return self.epochs * self.steps_per_epoch


QUICK = Job(num_train=512, num_held_out=512, epochs=2, width=4)


def all_images() -> tuple[Tensor, Tensor]:
    """All 70,000 images, (70000, 1, 14, 14), the test images last, and their labels."""
    folder = Path(os.environ.get("KGTRUN_FASHION_MNIST_DIR") or DATA)
    splits = [load(folder, *split, torch.device("cpu")).tensors for split in (("train", 60_000), ("t10k", 10_000))]
    pixels, labels = (torch.cat(parts) for parts in zip(*splits, strict=True))
    return functional.avg_pool2d(pixels, 2), labels


class Training:
    """A network, its optimizer, and the runtime's own blocks and mean, in this process alone."""

    def __init__(self, net: ResNet, learning_rate: float, example: Tensor) -> None:
        self.net = net
        self._optimizer = torch.optim.SGD(net.parameters(), lr=learning_rate, momentum=0.9, weight_decay=5e-4)
        self._blocks = ordered_blocks(net, example)
        self._mean = WeightMean(self._blocks, Kgt.weight_mean)

    def freeze(self, frontier: int, *, at_mean: bool) -> None:
        """The first `frontier` blocks."""
        old = self._blocks.frontier
        if frontier == old:
            return
        self._blocks.move_to(frontier)
        if at_mean:
            self._mean.moved_from(old)

    def step(self, step: int, rate: float, images: Tensor, labels: Tensor) -> float:
        """Step number `step`; its loss."""
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        loss = functional.cross_entropy(self.net(images), labels)
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
    """One seed: its data, the training without freezing, and the branches of it."""

    def __init__(self, job: Job, seed: int, images: Tensor, labels: Tensor) -> None:
        self._job, self._seed = job, seed
        num_drawn = min(NUM_DRAWN, len(images))
        order = torch.randperm(num_drawn, generator=torch.Generator().manual_seed(1000 + seed))
        held_out = torch.cat([order[job.num_train :], torch.arange(num_drawn, len(images))])[-job.num_held_out :]
        self._train = images[order[: job.num_train]], labels[order[: job.num_train]]
        self._held_out = images[held_out], labels[held_out]
        torch.manual_seed(seed)
        self._weights = self._network().state_dict()

    def run(self, plans: Mapping[str, Plan]) -> dict[str, dict[str, float]]:
        """Figures of the training without freezing, as "plain", and of each plan."""
        begins = {name: int(plan.moves[0][0] * self._job.total_steps) for name, plan in plans.items()}
        copies: dict[int, Any] = {}
        found = {"plain": self._finish(self._begin(None), 0, Plan(()), copies, set(begins.values()))}
        for name, plan in plans.items():
            found[name] = self._finish(self._begin(copies[begins[name]]), begins[name], plan, {}, set())
        return found

    def _network(self) -> ResNet:
        return ResNet(blocks_per_stage=3, width=self._job.width)

    def _begin(self, saved: Mapping[str, Any] | None) -> Training:
        net = self._network()
        net.load_state_dict(self._weights)
        training = Training(net, self._job.learning_rate, self._train[0][:2])
        if saved is not None:
            training.load_state_dict(copy.deepcopy(saved))  # an optimizer takes the tensors of a state as its own
        return training

    def _finish(
        self, training: Training, begin: int, plan: Plan, copies: dict[int, Any], wanted: set[int]
    ) -> dict[str, float]:
        """Train from step `begin` to the end; `copies` takes its state at the wanted steps."""
        job, order = self._job, torch.empty(0)
        losses: list[float] = []
        for step in range(begin, job.total_steps):
            epoch, batch = divmod(step, job.steps_per_epoch)
            if batch == 0 or step == begin:
                order = self._order(epoch)
                losses = []
            if step in wanted:
                copies[step] = copy.deepcopy(training.state_dict())
            frontier = max((blocks for share, blocks in plan.moves if step >= int(share * job.total_steps)), default=0)
            training.freeze(frontier, at_mean=plan.at_mean)
            rate = job.learning_rate * 0.5 * (1 + math.cos(math.pi * step / job.total_steps))
            chosen = order[batch * job.batch_size : (batch + 1) * job.batch_size]
            losses.append(training.step(step, rate, self._train[0][chosen], self._train[1][chosen]))
        accuracy, held_out_loss = quality(training.net, *self._held_out)
        return {"accuracy": accuracy, "loss": held_out_loss, "train_loss": sum(losses) / len(losses)}

    def _order(self, epoch: int) -> Tensor:
        seed = self._seed * 100 + epoch
        return torch.randperm(self._job.num_train, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def quality(net: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Accuracy in percent, and mean loss."""
    net.eval()
    right, loss = 0, 0.0
    for some, wanted in zip(images.split(500), labels.split(500), strict=True):
        scores = net(some)
        right += int((scores.argmax(1) == wanted).sum())
        loss += float(functional.cross_entropy(scores, wanted, reduction="sum"))
    return 100 * right / len(labels), loss / len(labels)


def summarise(runs: Sequence[Mapping[str, Any]]) -> Figures:
    """Medians over seeds, each plan against the training without freezing of its seed."""
    figures = Figures("freeze_time")
    figures.sampled("plain_accuracy_percent", [run["found"]["plain"]["accuracy"] for run in runs])
    for name in PLANS:
        for key in ("accuracy", "loss", "train_loss"):
            figures.sampled(f"{name}_{key}_change", [r["found"][name][key] - r["found"]["plain"][key] for r in runs])
    figures.exact("num_seeds", len(runs))
    figures.fact("plans", {name: asdict(plan) for name, plan in PLANS.items()})
    figures.fact("runs", list(runs))
    return figures


def finished_runs(path: Path, job: Job) -> dict[int, dict[str, Any]]:
    """Runs of this job with all plans of now, by seed; a torn line is skipped."""
    runs = [run for run in run_log.read(path) if run["job"] == asdict(job)]
    return {run["seed"]: run for run in runs if run["found"].keys() >= PLANS.keys()}


def main(argv: Sequence[str] | None = None) -> None:
    made = parser(__doc__)
    made.add_argument(
        "--seeds", default="0,1,2,3", help="comma-separated (default 0,1,2,3; with --quick the first only)"
    )
    args = made.parse_args(argv)
    seeds, job = [int(seed) for seed in args.seeds.split(",")], QUICK if args.quick else Job()
    seeds = seeds[:1] if args.quick else seeds
    torch.set_num_threads(1)
    runs = {} if args.quick else finished_runs(RUNS, job)
    images, labels = all_images()
    for seed in seeds:
        if seed not in runs:
            found = Branches(job, seed, images, labels).run(PLANS)
            runs[seed] = {"seed": seed, "job": asdict(job), "commit": commit(), "found": found}
            if not args.quick:
                run_log.add(RUNS, runs[seed])
        print(f"seed {seed}: {runs[seed]['found']}", flush=True)
    summarise([runs[seed] for seed in sorted(runs)]).publish(quick=args.quick)


if __name__ == "__main__":
    main()
