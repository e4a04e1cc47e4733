"""Rank 0's side of a decision: asks the policy, keeps its answer in range, records it with its numbers."""

from __future__ import annotations

from kgt_ddp.mask import Mask
from kgt_ddp.policies.policy import Observation, Policy
from kgtrun.contract.events import EventWriter


class Decider:
    """Turns an observation into a mask.

    Args:
        policy: the rule.
        events: where decisions are recorded: those that change something, and all of a policy that listens.
    """

    def __init__(self, policy: Policy, events: EventWriter) -> None:
        self._policy = policy
        self._events = events

    def decide(self, present: Mask, observation: Observation) -> Mask:
        """The mask to agree on: `present`, or the next one."""
        decision = self._policy.decide(observation)
        wanted = min(max(decision.frontier, 0), observation.max_frontier)
        if wanted != observation.frontier or self._policy.signals:
            self._events.write(
                "decision",
                step=observation.step,
                frontier=wanted,
                was=observation.frontier,
                reason=decision.reason,
                numbers=dict(decision.numbers),
                learning_rate=observation.learning_rate,
            )
        return present if wanted == present.frontier else present.moved_to(wanted, at_mean=decision.at_mean)
