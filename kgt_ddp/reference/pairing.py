"""What is compared with what. Four pairings behind one interface; all of them at fixed distances in steps.

    probe   two snapshots, both run in evaluation mode by the reference, on one retained set of samples
    fresh   the same, on the samples of each submit
    live    the trainer's own training-mode activations of a sub-batch, against an older snapshot's
    eval    the trainer's activations of an evaluation-mode pass of a sub-batch, against an older snapshot's

`probe` needs one forward a submit whatever the number of distances, because a snapshot's similarities on fixed samples
are all that has to be remembered of it: a (samples, samples) matrix per block. The others remember weights, and run the
older snapshots again on the new samples. docs/reference-model.md has what each can see and what it costs.

A distance is only ever compared exactly: a step whose counterpart was dropped on the way gives no score for that lag. A
reference that cannot keep up with the interval at which it is given work therefore answers few lags or none; the
caller sees that by `Stats.dropped` and `Stats.superseded`, and asks less often.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch import Tensor

from kgt_ddp.plasticity import distance
from kgt_ddp.reference.runner import Runner, Similarities
from kgt_ddp.reference.samples import Samples

MAX_REMEMBERED_SIMILARITIES: Final = 64
MAX_REMEMBERED_WEIGHTS: Final = 6
FLOOR_EVERY: Final = 8
"""Scored submits from one measurement of the floor to the next: it costs an fp32 forward."""

Values = list[float | None]


@dataclass(frozen=True, kw_only=True)
class Work:
    """One submit, as the reference received it."""

    step: int
    lags: tuple[int, ...]
    weights: Mapping[str, Tensor]
    """Parameters and buffers that changed; they may lie in memory that is written again after `considered`."""
    samples: Samples | None
    similarities: Similarities | None
    """What the trainer's own forward gave, for `live` and `eval`."""


@dataclass(frozen=True)
class Comparison:
    """Plasticity per watched block over one distance."""

    lag_steps: int
    values: Values


class Pairing(Protocol):
    """Remembers what it must of earlier submits and compares the new one with it."""

    def consider(self, work: Work, taken: Callable[[], None]) -> list[Comparison]:
        """Scores of this submit, one a lag that can be answered. Calls `taken` once `work.weights` are copied."""

    def current(self, work: Work) -> tuple[Samples, Similarities] | None:
        """Samples of this submit and what the newest weights make of them in the runner's precision; for the floor."""


def compare(watched: Sequence[str], first: Similarities, second: Similarities) -> Values:
    """Plasticity per block, None where either side does not know."""
    return [distance(first.get(block), second.get(block)) for block in watched]


class RetainedProbe:
    """`probe`. New samples start the memory afresh: similarities of different samples cannot be compared."""

    def __init__(self, runner: Runner, watched: list[str]) -> None:
        self._runner = runner
        self._watched = watched
        self._samples: Samples | None = None
        self._remembered: dict[int, Similarities] = {}

    def consider(self, work: Work, taken: Callable[[], None]) -> list[Comparison]:
        self._runner.load(work.weights)
        taken()
        if work.samples is not None:
            self._samples = work.samples
            self._remembered.clear()
        if self._samples is None:
            raise ValueError("no probe samples have been sent")
        found = self._runner.similarities(self._samples)
        comparisons = [
            Comparison(lag, compare(self._watched, self._remembered[work.step - lag], found))
            for lag in work.lags
            if work.step - lag in self._remembered
        ]
        _remember(self._remembered, work.step, found, MAX_REMEMBERED_SIMILARITIES)
        return comparisons

    def current(self, work: Work) -> tuple[Samples, Similarities] | None:
        return None if self._samples is None else (self._samples, self._remembered[work.step])


class _WithWeights:
    """Remembers the weights of the last few submits, in the type that the runner would give them anyway."""

    def __init__(self, runner: Runner, watched: list[str]) -> None:
        self._runner = runner
        self._watched = watched
        self._newest: dict[str, Tensor] = {}
        self._remembered: dict[int, dict[str, Tensor]] = {}

    def _take(self, work: Work) -> None:
        half = self._runner.precision != "fp32"
        for name, value in work.weights.items():
            narrow = half and value.dtype == torch.float32
            self._newest[name] = value.to(torch.bfloat16 if narrow else value.dtype, copy=True)
        _remember(self._remembered, work.step, dict(self._newest), MAX_REMEMBERED_WEIGHTS)

    def _older(self, work: Work, samples: Samples) -> list[tuple[int, Similarities]]:
        """(lag, what the weights of that age make of the samples) for every lag that is remembered."""
        found = []
        for lag in work.lags:
            weights = self._remembered.get(work.step - lag)
            if weights is not None:
                self._runner.load(weights)
                found.append((lag, self._runner.similarities(samples)))
        return found

    def current(self, work: Work) -> tuple[Samples, Similarities] | None:
        if work.samples is None:
            return None
        self._runner.load(self._newest)
        return work.samples, self._runner.similarities(work.samples)


class FreshSamples(_WithWeights):
    """`fresh`."""

    def consider(self, work: Work, taken: Callable[[], None]) -> list[Comparison]:
        self._take(work)
        taken()
        if work.samples is None:
            raise ValueError("this pairing needs samples with every submit")
        older = self._older(work, work.samples)
        if not older:
            return []
        self._runner.load(self._newest)
        found = self._runner.similarities(work.samples)
        return [Comparison(lag, compare(self._watched, past, found)) for lag, past in older]


class TrainerActivations(_WithWeights):
    """`live` and `eval`: they differ only in the forward that the trainer looked at."""

    def consider(self, work: Work, taken: Callable[[], None]) -> list[Comparison]:
        self._take(work)
        taken()
        if work.samples is None or work.similarities is None:
            raise ValueError("this pairing needs samples and the trainer's similarities with every submit")
        older = self._older(work, work.samples)
        return [Comparison(lag, compare(self._watched, past, work.similarities)) for lag, past in older]


PAIRINGS: Final[dict[str, Callable[[Runner, list[str]], Pairing]]] = {
    "probe": RetainedProbe,
    "fresh": FreshSamples,
    "live": TrainerActivations,
    "eval": TrainerActivations,
}


class Scorer:
    """A pairing, and its floor: the newest snapshot in this precision against the same snapshot in fp32."""

    def __init__(self, pairing: str, runner: Runner, exact: Runner | None, watched: list[str]) -> None:
        """`exact` runs the same model in fp32; None where `runner` itself does, whose floor is zero.

        Raises:
            ValueError: no such pairing.
        """
        if pairing not in PAIRINGS:
            raise ValueError(f"pairing {pairing!r} is none of {', '.join(PAIRINGS)}")
        self._pairing = PAIRINGS[pairing](runner, watched)
        self._exact = exact
        self._watched = watched
        self._scored = 0
        self.floors: Values = [None if exact else 0.0] * len(watched)

    def score(self, work: Work, taken: Callable[[], None]) -> list[Comparison]:
        """Comparisons of this submit; measures the floor when it is time to.

        Raises:
            Exception: the submit lacks what its pairing needs, or the model's forward raised.
        """
        if self._exact is not None:
            self._exact.load(work.weights)
        comparisons = self._pairing.consider(work, taken)
        if comparisons and self._exact is not None:
            if self._scored % FLOOR_EVERY == 0:
                self._measure_floor(work, self._exact)
            self._scored += 1
        return comparisons

    def _measure_floor(self, work: Work, exact: Runner) -> None:
        current = self._pairing.current(work)
        if current is not None:
            samples, found = current
            self.floors = compare(self._watched, exact.similarities(samples), found)


def _remember(memory: dict, step: int, value: object, limit: int) -> None:
    """Keep the latest `limit` entries in order of arrival."""
    memory.pop(step, None)
    memory[step] = value
    while len(memory) > limit:
        del memory[next(iter(memory))]
