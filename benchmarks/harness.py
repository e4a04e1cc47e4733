"""The protocol of the benchmarks: how cases are repeated, compared and reported.

A benchmark is a module, run as `python -m benchmarks.NAME [--quick]`. Its last line of output is one JSON object of
figures. A full run also writes them, with spread and machine facts, to `benchmarks/results/NAME.json`; `--quick` (under
50 seconds) writes nothing: it shows that the benchmark works, not what the figures are.

Cases are interleaved: one round measures each case once, so that a slow minute of the machine falls on all of them. The
order rotates from round to round, so that no case always runs on caches that another one left behind. A ratio is taken
inside a round, pair by pair, and then the median over the rounds; a ratio of medians would compare different minutes.

Everything is computed from samples that the caller holds; only `Figures.publish` prints and writes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import machine_facts

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True, kw_only=True)
class Spread:
    """What is reported of repeated measurements."""

    median: float
    q1: float
    """Lower quartile; quartiles are interpolated between samples."""
    q3: float
    low: float
    high: float
    count: int


def spread(samples: Sequence[float]) -> Spread:
    """Median, quartiles and range of at least one sample.

    Raises:
        ValueError: there is no sample, or one is not a finite number.
    """
    if not samples:
        raise ValueError("there is nothing to summarise: no samples")
    if not all(math.isfinite(sample) for sample in samples):
        raise ValueError(f"samples must be finite numbers, got {list(samples)}")
    if len(samples) == 1:
        q1 = q3 = samples[0]
    else:
        q1, _, q3 = statistics.quantiles(samples, n=4, method="inclusive")
    return Spread(
        median=statistics.median(samples), q1=q1, q3=q3, low=min(samples), high=max(samples), count=len(samples)
    )


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    """One ratio a round. The two cases must come from the same rounds.

    Raises:
        ValueError: different numbers of rounds.
    """
    if len(numerators) != len(denominators):
        raise ValueError(f"the cases have {len(numerators)} and {len(denominators)} rounds: no pairs to compare")
    return [a / b for a, b in zip(numerators, denominators, strict=True)]


def seconds(work: Callable[[], Any]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def order_of_round(names: Sequence[str], index: int) -> list[str]:
    """The cases in the order in which round `index` runs them; the same in every process."""
    shift = index % len(names)
    return [*names[shift:], *names[:shift]]


def interleave(
    cases: Mapping[str, Callable[[], float]], *, rounds: int, warmup_rounds: int = 1
) -> dict[str, list[float]]:
    """Measure every case once a round.

    Args:
        cases: name to a callable that runs the case once and returns its cost (`seconds` makes one of plain work). With
            several ranks every rank calls `interleave` with the same names in the same order.
        rounds: samples of each case.
        warmup_rounds: whole rounds before, thrown away.

    Returns:
        name to its samples, one a round, in order of rounds.
    """
    names = list(cases)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for index in range(-warmup_rounds, rounds):
        for name in order_of_round(names, index):
            cost = cases[name]()
            if index >= 0:
                samples[name].append(cost)
    return samples


class Figures:
    """The figures of one benchmark: collected, then published once."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._values: dict[str, Any] = {}
        self._spread: dict[str, Spread] = {}
        self._facts: dict[str, Any] = {}
        self._load_before = os.getloadavg()[0]

    def sampled(self, key: str, samples: Sequence[float]) -> float:
        """Report the median of repeated measurements under `key`; their spread goes to the results file."""
        self._spread[key] = spread(samples)
        self._values[key] = _rounded(self._spread[key].median)
        return self._spread[key].median

    def exact(self, key: str, value: Any) -> None:
        """Report something that was counted, not timed."""
        self._values[key] = _rounded(value)

    def fact(self, key: str, value: Any) -> None:
        """A condition of the measurement (sizes, settings), for the results file only."""
        self._facts[key] = value

    def take_up(self, results: Path = RESULTS) -> None:
        """Begin with what the results file holds, if there is one: for a benchmark that measures a part of it anew."""
        path = results / f"{self.name}.json"
        if path.exists():
            record = json.loads(path.read_text())
            self._values, self._facts = record["figures"], record["conditions"]
            self._spread = {key: Spread(**found) for key, found in record["spread"].items()}

    def publish(self, *, quick: bool, results: Path = RESULTS) -> None:
        """Write the results file unless `quick`; print the figures as one line of JSON, the last of the output."""
        if not quick:
            results.mkdir(parents=True, exist_ok=True)
            record = {
                "name": self.name,
                "figures": self._values,
                "spread": {k: {n: _rounded(v) for n, v in asdict(s).items()} for k, s in self._spread.items()},
                "conditions": self._facts,
                "machine": {**machine_facts(), "load_before": self._load_before, "load_after": os.getloadavg()[0]},
            }
            (results / f"{self.name}.json").write_text(json.dumps(record, indent=2) + "\n")
        print(json.dumps(self._values), flush=True)


def _rounded(value: Any) -> Any:
    """Five significant digits: more than any of our timings carries."""
    return float(f"{value:.5g}") if isinstance(value, float) else value


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The command line that all benchmarks share; a benchmark adds what is its own."""
    made = argparse.ArgumentParser(description=(doc or "").strip().partition("\n")[0])
    made.add_argument("--quick", action="store_true", help="small and under 50 s: shows that it works, writes nothing")
    return made
