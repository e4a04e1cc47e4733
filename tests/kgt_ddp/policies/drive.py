"""Feed a policy signals, decision by decision, and note what it decides.

Every decision is carried out at once. What that does to the scores of the frozen blocks is known, and done: their weights
stand still, so S(d) is zero once both versions are younger than the freeze.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kgt_ddp.policies.policy import Decision, Observation, Policy

Row = Sequence[float | None]
DISTANCES = {"plasticity": 1, "plasticity_2": 2, "plasticity_4": 4}
"""Signal to its distance in lags."""


class Driver:
    """One run: the frontier, and since when each block is frozen."""

    def __init__(
        self, policy: Policy, *, lag_steps: int | None = None, frontier: int = 0, silence: bool = True
    ) -> None:
        """`silence=False` leaves the scores of frozen blocks as they are given."""
        self._policy = policy
        self._lag_steps = lag_steps
        self._silence = silence
        self._frontier = frontier
        self._since = [-(10**9)] * frontier

    def decide(self, step: int, rows: Mapping[str, Row], **facts: Any) -> Decision:
        decision = self._policy.decide(
            Observation(
                step=step,
                apply_step=step,
                num_blocks=len(next(iter(rows.values()))),
                frontier=self._frontier,
                lag_steps=self._lag_steps,
                signals={name: self._silenced(step, name, row) for name, row in rows.items()},
                **facts,
            )
        )
        self._since = self._since[: decision.frontier] + [step] * (decision.frontier - self._frontier)
        self._frontier = decision.frontier
        return decision

    def _silenced(self, step: int, name: str, row: Row) -> tuple[float | None, ...]:
        if not self._silence or name not in DISTANCES or self._lag_steps is None:
            return tuple(row)
        age = DISTANCES[name] * self._lag_steps
        still = [step >= since + age for since in self._since]
        return tuple(0.0 if b < len(still) and still[b] else value for b, value in enumerate(row))


def drive(
    policy: Policy,
    signals: Mapping[str, Sequence[Row]],
    *,
    every: int = 10,
    start: int = 0,
    frontier: int = 0,
    total_steps: int | None = None,
    lag_steps: int | None = None,
    silence: bool = True,
    **facts: Any,
) -> list[Decision]:
    """All decisions.

    Args:
        signals: name to one row of blocks a decision.
        start: step of the first decision.
        frontier: blocks frozen before it, for long.
        facts: further fields of `Observation`; a list holds one value a decision.
    """
    driver = Driver(policy, lag_steps=lag_steps, frontier=frontier, silence=silence)
    decisions: list[Decision] = []
    for index, rows in enumerate(zip(*signals.values(), strict=True)):
        now = {name: value[index] if isinstance(value, list) else value for name, value in facts.items()}
        decisions.append(
            driver.decide(start + index * every, dict(zip(signals, rows, strict=True)), total_steps=total_steps, **now)
        )
    return decisions


def frontiers(decisions: Sequence[Decision]) -> list[int]:
    return [d.frontier for d in decisions]
