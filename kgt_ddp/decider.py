"""Rank 0's side of a decision: asks the policy, keeps its answer in range, records it with its numbers."""

from __future__ import annotations

from kgt_ddp.agreement import LAG
from kgt_ddp.policies.policy import Observation, Policy
from kgtrun.contract.events import EventWriter


class Decider:
    """Turns what is known into a frontier.

    Args:
        policy: the rule.
        total_steps: optimizer steps of the whole job, if known.
        events: where decisions are recorded: those that change something, and all of a policy that listens.
    """

    def __init__(self, policy: Policy, *, total_steps: int | None, events: EventWriter) -> None:
        self.policy = policy
        self._total_steps = total_steps
        self._events = events

    def decide(
        self,
        *,
        step: int,
        num_blocks: int,
        frontier: int,
        learning_rate: float | None,
        lag_steps: int | None,
        step_seconds: float | None,
        block_seconds: tuple[float, ...] | None,
        apply_seconds: float | None,
        signals: dict[str, tuple[float | None, ...]],
    ) -> int:
        """The frontier to agree on. `step` is that of the decision, one boundary after the collection of `signals`."""
        observation = Observation(
            step=step,
            apply_step=step + LAG - 1,
            total_steps=self._total_steps,
            num_blocks=num_blocks,
            frontier=frontier,
            learning_rate=learning_rate,
            lag_steps=lag_steps,
            step_seconds=step_seconds,
            block_seconds=block_seconds,
            apply_seconds=apply_seconds,
            signals=signals,
        )
        decision = self.policy.decide(observation)
        wanted = min(max(decision.frontier, 0), observation.max_frontier)
        if wanted != frontier or self.policy.signals:
            self._events.write(
                "decision",
                step=step,
                frontier=wanted,
                was=frontier,
                reason=decision.reason,
                numbers=dict(decision.numbers),
                learning_rate=learning_rate,
            )
        return wanted
