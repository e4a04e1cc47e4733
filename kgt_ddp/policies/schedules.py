"""Policies that follow a timetable: none, static, linear, replay.

They listen to nothing; they are the baselines, and `replay` repeats the decisions of a recorded run.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar

from kgt_ddp.policies.policy import Decision, Observation, Schedule, check_weight_mean


class NeverFreeze(Schedule):
    """Plain data-parallel training."""

    def decide(self, observation: Observation) -> Decision:
        return Decision(frontier=observation.frontier, reason="policy none")


@dataclass(frozen=True, kw_only=True)
class Static(Schedule):
    """`blocks` front blocks from `step` on; `weight_mean` as of `Policy`."""

    blocks: int
    step: int = 0
    weight_mean: float = 0.0

    def __post_init__(self) -> None:
        if self.blocks < 0 or self.step < 0:
            raise ValueError(f"static: blocks={self.blocks} and step={self.step} must be at least 0")
        check_weight_mean("static", self.weight_mean)

    def decide(self, observation: Observation) -> Decision:
        due = observation.apply_step >= self.step
        frontier = min(self.blocks, observation.max_frontier) if due else 0
        return Decision(frontier=frontier, reason=f"{self.blocks} blocks from step {self.step}")


@dataclass(frozen=True, kw_only=True)
class Linear(Schedule):
    """No block until `start` of training, then evenly up to `fraction` of the blocks at `stop`.

    The rule of MosaicML Composer's layer_freezing, by blocks instead of single layers. `moves` caps how often the
    frontier changes, because each change costs a compiled model one recompilation; None: at every block.
    `weight_mean` is that of `Policy`; Composer leaves blocks as they are, and so does the default.
    """

    start: float = 0.25
    stop: float = 0.75
    fraction: float = 0.8
    moves: int | None = None
    weight_mean: float = 0.0
    needs_total_steps: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0.0 <= self.start < self.stop <= 1.0:
            raise ValueError(f"linear: 0 <= start < stop <= 1 is needed, got start={self.start}, stop={self.stop}")
        if not 0.0 < self.fraction <= 1.0:
            raise ValueError(f"linear: fraction={self.fraction} must be above 0 and at most 1")
        if self.moves is not None and self.moves < 1:
            raise ValueError(f"linear: moves={self.moves} must be at least 1")
        check_weight_mean("linear", self.weight_mean)

    def decide(self, observation: Observation) -> Decision:
        assert observation.total_steps is not None, "promised by needs_total_steps"
        top = min(int(self.fraction * observation.num_blocks + 1e-9), observation.max_frontier)
        progress = observation.apply_step / observation.total_steps
        part = min(max((progress - self.start) / (self.stop - self.start), 0.0), 1.0)
        jumps = top if self.moves is None else min(self.moves, top)
        frontier = int(top * int(part * jumps + 1e-9) / jumps + 1e-9) if jumps else 0
        return Decision(frontier=frontier, reason=f"{progress:.1%} of training", numbers={"progress": progress})


@dataclass(frozen=True)
class Replay(Schedule):
    """The frontiers of a recorded run: `timetable` holds (step of apply, frontier), in order of steps; `weight_mean` is
    that of its policy, and at the steps `as_they_were` blocks froze without going to their mean."""

    timetable: Sequence[tuple[int, int]]
    weight_mean: float = 0.0
    as_they_were: Collection[int] = frozenset()

    def decide(self, observation: Observation) -> Decision:
        past = [(step, frontier) for step, frontier in self.timetable if step <= observation.apply_step]
        step, frontier = past[-1] if past else (0, 0)
        return Decision(
            frontier=min(frontier, observation.max_frontier),
            reason=f"recorded at step {step}",
            at_mean=step not in self.as_they_were,
        )
