"""Traces (benchmarks/record_traces.py; those named "run": benchmarks/trace_of_run.py), and what a policy makes of them.

A replay is open loop: the recorded training froze nothing, and only the frozen blocks' own scores are as they would be
(`drive`). What freezing does to the blocks behind it is not in them. Of a run the same holds up to its own first freeze: of
`vision-run` at .56 of the job with seed 0, at .68 with seed 2; of `text-run` at .58 with seed 1, at .66 with seed 2.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kgt_ddp.policies.policy import Decision, Policy
from tests.kgt_ddp.policies.drive import DISTANCES, Driver, Row

FOLDER = Path(__file__).parent / "traces"
SIGNALS = (*DISTANCES, "floor", "grad_norm")

Change = Callable[[int, str, Row], Row]
"""(step, name of the signal, its row) to the row that is fed instead."""


@functools.cache
def load(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_text())


@dataclass
class Outcome:
    """What a policy did over a whole trace."""

    num_blocks: int
    total_steps: int
    decisions: list[tuple[int, Decision]] = field(default_factory=list)
    """(step, decision)"""

    @property
    def moves(self) -> list[tuple[float, int]]:
        """(share of the job, frontier) of every change."""
        found, before = [], 0
        for step, decision in self.decisions:
            if decision.frontier != before:
                found.append((step / self.total_steps, decision.frontier))
                before = decision.frontier
        return found

    @property
    def freezes(self) -> list[Decision]:
        """The decisions that froze blocks."""
        before = [0, *(decision.frontier for _, decision in self.decisions)]
        return [now for was, (_, now) in zip(before, self.decisions, strict=False) if now.frontier > was]

    @property
    def frozen(self) -> float:
        """Share of all (block, step) pairs that were frozen."""
        return sum(d.frontier for _, d in self.decisions) / (len(self.decisions) * self.num_blocks)

    def first(self, frontier: int) -> float:
        """Share of the job at which that many blocks were frozen for the first time; 2.0 if never."""
        return next((share for share, now in self.moves if now >= frontier), 2.0)


def replay(
    name: str,
    policy: Policy,
    *,
    length_known: bool = True,
    rate_seen: bool = True,
    change: Change | None = None,
    **facts: Any,
) -> Outcome:
    """Feed a trace; every decision is carried out at once.

    Args:
        change: makes another row of a recorded one, before frozen blocks are silenced.
        facts: further fields of `Observation`.
    """
    trace = load(name)
    outcome = Outcome(len(trace["blocks"]), trace["total_steps"])
    driver = Driver(policy, lag_steps=trace["lag_steps"])
    for record in trace["records"]:
        step = record["step"]
        rows: dict[str, Row] = {key: record[key] for key in SIGNALS}
        if change is not None:
            rows = {key: change(step, key, row) for key, row in rows.items()}
        decision = driver.decide(
            step,
            rows,
            total_steps=trace["total_steps"] if length_known else None,
            learning_rate=record["learning_rate"] if rate_seen else None,
            **facts,
        )
        outcome.decisions.append((step, decision))
    return outcome
