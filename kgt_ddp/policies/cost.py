"""Does a change of the mask pay? Seconds saved until the end of training against what the change costs once."""

from __future__ import annotations

from typing import Final

from kgt_ddp.policies.policy import Observation

MARGIN: Final = 2.0
"""A change must promise to save this many times its cost: the estimate of what is to come may be wrong."""


def steps_to_come(observation: Observation) -> int:
    """Steps after the decision takes effect; of a job of unknown length, as many as were done."""
    if observation.total_steps is None:
        return observation.apply_step
    return max(observation.total_steps - observation.apply_step, 0)


def job_steps(observation: Observation) -> int:
    """Length of the job, as far as it is known or assumed."""
    return observation.total_steps or 2 * observation.apply_step


def saving_s(observation: Observation, frontier: int) -> float | None:
    """Seconds that freezing up to `frontier` instead of the present frontier saves; None where nobody measured it."""
    if observation.block_seconds is None:
        return None
    return sum(observation.block_seconds[observation.frontier : frontier]) * steps_to_come(observation)


def pays(observation: Observation, frontier: int) -> bool:
    """Whether to freeze up to `frontier`, as to cost. What was not measured does not stand in the way."""
    if steps_to_come(observation) == 0:
        return False
    saving, cost = saving_s(observation, frontier), observation.apply_seconds
    if saving is None:
        return True
    return saving > MARGIN * (cost or 0.0)
