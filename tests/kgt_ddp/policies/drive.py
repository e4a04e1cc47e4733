"""Feed a policy signals, decision by decision, and note what it decides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kgt_ddp.policies.policy import Decision, Observation, Policy


def drive(
    policy: Policy,
    signals: Mapping[str, Sequence[Sequence[float | None]]],
    *,
    every: int = 10,
    start: int = 0,
    frontier: int = 0,
    total_steps: int | None = None,
    **facts: Any,
) -> list[Decision]:
    """All decisions, each carried out at once.

    Args:
        signals: name to one row of blocks a decision.
        start: step of the first decision.
        frontier: blocks frozen before it.
        facts: further fields of `Observation`; a list holds one value a decision.
    """
    decisions: list[Decision] = []
    for index, rows in enumerate(zip(*signals.values(), strict=True)):
        now = {name: value[index] if isinstance(value, list) else value for name, value in facts.items()}
        decision = policy.decide(
            Observation(
                step=start + index * every,
                apply_step=start + index * every,
                total_steps=total_steps,
                num_blocks=len(rows[0]),
                frontier=frontier,
                signals={name: tuple(row) for name, row in zip(signals, rows, strict=True)},
                **now,
            )
        )
        frontier = decision.frontier
        decisions.append(decision)
    return decisions


def frontiers(decisions: Sequence[Decision]) -> list[int]:
    return [d.frontier for d in decisions]
