"""What freezing costs in accuracy, by when and how much: branches of one training, apart from any policy.

    python -m benchmarks.freeze_time [--quick] [--seeds 0,1,2,3]

A ResNet-20 on 45,000 images of Fashion-MNIST at half their size, 10 epochs, cosine, trains to the end in this process. From
copies of its weights and momentum on the way it trains on with front blocks frozen at fixed steps (`PLANS`), on the same
batches in the same order. Each branch ends with its accuracy on 25,000 images that it did not train on: the differences
looked for are tenths of a point, which 10,000 images hardly show.

Figures: `plain_accuracy_percent`; for each plan `NAME_accuracy_change` in points and `NAME_loss_change`, held-out, against
the same seed's training without freezing; `NAME_train_loss_change`, of the last epoch.

One thread; a seed takes half an hour, so start a second process with other seeds on a second core. Each finished seed
is a line in `runs/freeze_time/runs.jsonl`; a run takes up what is there.
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

sys.path.insert(0, str(ROOT / "examples"))  # the examples are scripts, and import each other as such
from fashion_resnet import DATA, load
from resnet import ResNet

RUNS = ROOT / "runs" / "freeze_time" / "runs.jsonl"
NUM_DRAWN = 60_000
"""Images to train on are drawn from so many; what is left of them, and all test images, are held out."""

Plan = tuple[tuple[float, int], ...]
"""(share of the job, front blocks frozen from there on), in order."""

PLANS: dict[str, Plan] = {
    "tolerance_02": ((0.48, 3), (0.50, 4), (0.53, 5), (0.56, 7), (0.68, 8)),
    "tolerance_01": ((0.48, 3), (0.50, 4), (0.53, 5), (0.56, 6), (0.71, 7), (0.75, 8)),
    "front": ((0.48, 3), (0.56, 6)),
    "linear": tuple((0.3125 + 0.0625 * i, i + 1) for i in range(8)),
}
"""The first two are what the policy kgt does on the ResNet with a `late_tolerance` of 0.02 and 0.01; the last is `linear`."""


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
        begins = {name: int(plan[0][0] * self._job.total_steps) for name, plan in plans.items()}
        net, optimizer = self._copy(self._weights, None)
        copies: dict[int, Any] = {}
        found = {"plain": self._finish(net, optimizer, 0, (), copies, set(begins.values()))}
        for name, plan in plans.items():
            net, optimizer = self._copy(*copies[begins[name]])
            found[name] = self._finish(net, optimizer, begins[name], plan, {}, set())
        return found

    def _network(self) -> ResNet:
        return ResNet(blocks_per_stage=3, width=self._job.width)

    def _copy(self, weights: Any, momentum: Any) -> tuple[ResNet, torch.optim.Optimizer]:
        net = self._network()
        net.load_state_dict(weights)
        optimizer = torch.optim.SGD(net.parameters(), lr=self._job.learning_rate, momentum=0.9, weight_decay=5e-4)
        if momentum is not None:
            optimizer.load_state_dict(momentum)
        return net, optimizer

    def _finish(
        self,
        net: ResNet,
        optimizer: torch.optim.Optimizer,
        begin: int,
        plan: Plan,
        copies: dict[int, Any],
        wanted: set[int],
    ) -> dict[str, float]:
        """Train from step `begin` to the end; `copies` takes weights and momentum at the wanted steps."""
        job, order = self._job, torch.empty(0)
        losses: list[float] = []
        for step in range(begin, job.total_steps):
            epoch, batch = divmod(step, job.steps_per_epoch)
            if batch == 0 or step == begin:
                order = self._order(epoch)
                losses = []
            if step in wanted:
                copies[step] = copy.deepcopy((net.state_dict(), optimizer.state_dict()))
            freeze(net, max((blocks for share, blocks in plan if step >= int(share * job.total_steps)), default=0))
            for group in optimizer.param_groups:
                group["lr"] = job.learning_rate * 0.5 * (1 + math.cos(math.pi * step / job.total_steps))
            chosen = order[batch * job.batch_size : (batch + 1) * job.batch_size]
            loss = functional.cross_entropy(net(self._train[0][chosen]), self._train[1][chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        accuracy, held_out_loss = quality(net, *self._held_out)
        return {"accuracy": accuracy, "loss": held_out_loss, "train_loss": sum(losses) / len(losses)}

    def _order(self, epoch: int) -> Tensor:
        seed = self._seed * 100 + epoch
        return torch.randperm(self._job.num_train, generator=torch.Generator().manual_seed(seed))


def freeze(net: ResNet, num_blocks: int) -> None:
    """The front blocks to evaluation mode, their parameters out of the optimizer's reach. Blocks are the runtime's: the stem
    belongs to the first."""
    blocks = [*net.stage1, *net.stage2, *net.stage3][:num_blocks]
    for block in [net.stem, *blocks] if blocks else []:
        block.eval()
        for parameter in block.parameters():
            parameter.requires_grad_(False)
            parameter.grad = None


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
    figures.fact("plans", PLANS)
    figures.fact("runs", list(runs))
    return figures


def finished_runs(path: Path, job: Job) -> dict[int, dict[str, Any]]:
    """Runs of this job in the file, by seed; a torn line is skipped."""
    return {run["seed"]: run for run in run_log.read(path) if run["job"] == asdict(job)}


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
