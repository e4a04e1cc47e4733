"""The interface of a freezing policy: numbers in, a frontier and its reason out.

A policy runs on rank 0 only. It is pure: it sees nothing but the observation, keeps what it needs in its own fields, and
reaches no clock, disk or process group. It must return the present frontier when it does not know.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol


@dataclass(frozen=True, kw_only=True)
class Observation:
    """What is known when a decision is due."""

    step: int
    """Optimizer steps finished."""
    apply_step: int
    """Step at which this decision takes effect, `step` plus the agreement's fixed lag."""
    total_steps: int | None
    """Optimizer steps of the whole job, if known."""
    num_blocks: int
    """Blocks of the model; the last one always trains."""
    num_freezable: int | None = None
    """Front blocks that may be frozen, if those are fewer than all but the last: the user may have frozen the end."""
    frontier: int
    """Blocks frozen now."""
    num_fixed: int | None = None
    """Of these the front ones whose output cannot change, if not all: behind an embedding that trains on through a tied output
    layer, frozen blocks put out something else at each step."""
    learning_rate: float | None = None
    """Of the first parameter group of the optimizer that trains the model, if one was seen."""
    loss: float | None = None
    """Mean training loss since the last decision, if somebody sees it."""
    lag_steps: int | None = None
    """Distance L in steps at which the signal "plasticity" compares. It may become a multiple of what it was, where the
    job's length is learned on the way."""
    step_seconds: float | None = None
    """Wall time of a training step with the present mask, if measured."""
    block_seconds: tuple[float, ...] | None = None
    """Wall time that a step saves while a block is frozen, one entry a block, if measured."""
    apply_seconds: float | None = None
    """Wall time that a change of the mask costs once (re-bucketing, a recompilation), if measured."""
    signals: Mapping[str, tuple[float | None, ...]] = field(default_factory=dict)
    """Mean over the ranks that had a value, one entry a block, None where nobody had; keyed by `Policy.signals`."""

    @property
    def max_frontier(self) -> int:
        return max(self.num_blocks - 1, 0) if self.num_freezable is None else self.num_freezable


@dataclass(frozen=True, kw_only=True)
class Decision:
    """Where the frontier should be, why, and the numbers it was made from (they go into the events)."""

    frontier: int
    reason: str
    at_mean: bool = True
    """Whether what freezes goes to the mean of its weights, where the policy has one (`Policy.weight_mean`)."""
    numbers: Mapping[str, Any] = field(default_factory=dict)


class Policy(Protocol):
    """See the module docstring."""

    signals: ClassVar[tuple[str, ...]]
    """Names of the per-block signals it reads; empty for a schedule."""

    needs_total_steps: ClassVar[bool]
    """Whether it cannot work without the job's length."""

    shortest_job: ClassVar[int]
    """A job known to have no more optimizer steps than this is not listened to: the policy would change nothing in it.
    An object without this attribute always listens."""

    @property
    def weight_mean(self) -> float:
        """A block that freezes is put to the mean of its weights, of an age of this share of the steps so far
        (`kgt_ddp.weight_mean`), unless the decision says otherwise; 0, or without this attribute: it stays as it is."""
        ...

    def decide(self, observation: Observation) -> Decision: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


def check_weight_mean(policy: str, share: float) -> None:
    """Raises `ValueError` unless `share` can be a `Policy.weight_mean`."""
    if not 0.0 <= share < 1.0:
        raise ValueError(f"{policy}: weight_mean={share} must be at least 0 and below 1")


class Schedule:
    """Base of policies that follow a timetable and therefore keep no state."""

    signals: ClassVar[tuple[str, ...]] = ()
    needs_total_steps: ClassVar[bool] = False
    shortest_job: ClassVar[int] = 0
    weight_mean: float = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass
