"""What `benchmarks.freeze_time` trains: a small job of one seed, step by step, in this process alone.

A step draws nothing from what was before it: the same step trains on the same samples, with the same dropout, in every branch.
"""

from __future__ import annotations

import math
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from benchmarks.machine import ROOT

sys.path.insert(0, str(ROOT / "examples"))  # the examples are scripts, and import each other as such
import fashion_resnet
import minilm_newsgroups
from resnet import ResNet

NUM_DRAWN = 60_000
"""Images to train on are drawn from so many; what is left of them, and all test images, are held out."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """The size of a training."""

    num_train: int
    num_held_out: int
    epochs: int
    batch_size: int
    learning_rate: float

    @property
    def steps_per_epoch(self) -> int:
        return self.num_train // self.batch_size

    @property
    def total_steps(self) -> int:
        return self.epochs * self.steps_per_epoch


@dataclass(frozen=True, kw_only=True)
class VisionJob(Job):
    """`width`: channels of the first stage."""

    num_train: int = 45_000
    num_held_out: int = 25_000
    epochs: int = 10
    batch_size: int = 128
    learning_rate: float = 0.1
    width: int = 16


@dataclass(frozen=True, kw_only=True)
class TextJob(Job):
    """`max_tokens`: longer texts are cut."""

    num_train: int = 4_000
    num_held_out: int = 10_000
    epochs: int = 3
    batch_size: int = 16
    learning_rate: float = 5e-5
    max_tokens: int = 64


class Workload(ABC):
    """One seed of a job: which samples it trains on, in which order, from which weights.

    Args:
        job: its size.
        seed: of the draw, the order and the first weights.
        num_samples: samples there are. Those to train on are drawn from the first `num_drawn`; the last `num_held_out` of what
            is left are held out.
    """

    def __init__(self, job: Job, seed: int, *, num_samples: int, num_drawn: int) -> None:
        self.job = job
        self._seed = seed
        order = torch.randperm(num_drawn, generator=torch.Generator().manual_seed(1000 + seed))
        self._train = order[: job.num_train]
        self.held_out = torch.cat([order[job.num_train :], torch.arange(num_drawn, num_samples)])[-job.num_held_out :]
        torch.manual_seed(seed)
        self._weights = self.new_network().state_dict()

    def network(self) -> nn.Module:
        """At this seed's first weights."""
        net = self.new_network()
        net.load_state_dict(self._weights)
        return net

    def samples(self, step: int) -> Tensor:
        """Indices of what step number `step` trains on, (batch,)."""
        epoch, batch = divmod(step, self.job.steps_per_epoch)
        order = torch.randperm(len(self._train), generator=torch.Generator().manual_seed(self._seed * 100 + epoch))
        return self._train[order[batch * self.job.batch_size : (batch + 1) * self.job.batch_size]]

    def loss(self, net: nn.Module, step: int) -> Tensor:
        """Of step number `step`, with its graph."""
        torch.manual_seed(self._seed * 1_000_000 + step)
        scores, labels = self.scores(net, self.samples(step))
        return functional.cross_entropy(scores, labels)

    @torch.no_grad()
    def quality(self, net: nn.Module) -> tuple[float, float]:
        """Accuracy in percent on what is held out, and mean loss."""
        net.eval()
        right, loss = 0, 0.0
        for some in self.held_out.split(200):
            scores, labels = self.scores(net, some)
            right += int((scores.argmax(1) == labels).sum())
            loss += float(functional.cross_entropy(scores, labels, reduction="sum"))
        return 100 * right / len(self.held_out), loss / len(self.held_out)

    @abstractmethod
    def new_network(self) -> nn.Module: ...

    @abstractmethod
    def optimizer(self, net: nn.Module) -> Optimizer: ...

    @abstractmethod
    def rate(self, step: int) -> float:
        """The learning rate of step number `step`."""

    @abstractmethod
    def example(self) -> tuple[Tensor, ...]:
        """Arguments of a forward."""

    @abstractmethod
    def scores(self, net: nn.Module, samples: Tensor) -> tuple[Tensor, Tensor]:
        """The network's class scores of these samples, (batch, classes), and their classes, (batch,)."""


class Vision(Workload):
    """A ResNet-20 from scratch: SGD, cosine. `images`: (samples, 1, height, width), the test set's last."""

    def __init__(self, job: VisionJob, seed: int, images: Tensor, labels: Tensor) -> None:
        self._images, self._labels, self._width = images, labels, job.width
        super().__init__(job, seed, num_samples=len(images), num_drawn=min(NUM_DRAWN, len(images)))

    def new_network(self) -> nn.Module:
        return ResNet(blocks_per_stage=3, width=self._width)

    def optimizer(self, net: nn.Module) -> Optimizer:
        return torch.optim.SGD(net.parameters(), lr=self.job.learning_rate, momentum=0.9, weight_decay=5e-4)

    def rate(self, step: int) -> float:
        return self.job.learning_rate * 0.5 * (1 + math.cos(math.pi * step / self.job.total_steps))

    def example(self) -> tuple[Tensor, ...]:
        return (self._images[:2],)

    def scores(self, net: nn.Module, samples: Tensor) -> tuple[Tensor, Tensor]:
        return net(self._images[samples]), self._labels[samples]


class Text(Workload):
    """A pretrained encoder fine-tuned: AdamW, a tenth of warm-up, linear to 0. `texts`: the test set's last."""

    def __init__(
        self,
        job: TextJob,
        seed: int,
        texts: Sequence[minilm_newsgroups.Sample],
        num_drawn: int,
        classifier: Callable[[], nn.Module],
    ) -> None:
        self._texts, self._classifier = texts, classifier
        super().__init__(job, seed, num_samples=len(texts), num_drawn=num_drawn)
        # So that a batch of it holds texts of one length.
        self.held_out = torch.tensor(sorted(self.held_out.tolist(), key=lambda index: len(texts[index][0])))

    def new_network(self) -> nn.Module:
        return self._classifier()

    def optimizer(self, net: nn.Module) -> Optimizer:
        return torch.optim.AdamW(net.parameters(), lr=self.job.learning_rate)

    def rate(self, step: int) -> float:
        return self.job.learning_rate * minilm_newsgroups.warm_up_then_linear(step, self.job.total_steps)

    def example(self) -> tuple[Tensor, ...]:
        return self._padded(range(2))[:2]

    def scores(self, net: nn.Module, samples: Tensor) -> tuple[Tensor, Tensor]:
        ids, mask, labels = self._padded(samples.tolist())
        return net(ids, mask), labels

    def _padded(self, samples: Iterable[int]) -> tuple[Tensor, Tensor, Tensor]:
        return minilm_newsgroups.padded([self._texts[index] for index in samples], torch.device("cpu"))


def vision(job: VisionJob) -> Callable[[int], Vision]:
    """All 70,000 images of Fashion-MNIST, at half their size; makes the workload of a seed."""
    folder = Path(os.environ.get("KGTRUN_FASHION_MNIST_DIR") or fashion_resnet.DATA)
    splits = [
        fashion_resnet.load(folder, *split, torch.device("cpu")).tensors
        for split in (("train", 60_000), ("t10k", 10_000))
    ]
    pixels, labels = (torch.cat(parts) for parts in zip(*splits, strict=True))
    images = functional.avg_pool2d(pixels, 2)
    return lambda seed: Vision(job, seed, images, labels)


def text(job: TextJob) -> Callable[[int], Text]:
    """All texts of 20 Newsgroups, and all-MiniLM-L6-v2; makes the workload of a seed."""
    folder = Path(os.environ.get("KGTRUN_LANGUAGE_DIR") or minilm_newsgroups.DATA)
    train, test = (
        minilm_newsgroups.load(folder, *split, job.max_tokens) for split in (("train", 11_293), ("test", 7_528))
    )
    return lambda seed: Text(job, seed, [*train, *test], len(train), lambda: minilm_newsgroups.classifier(folder))
