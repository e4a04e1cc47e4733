"""`kgt`: freeze the front blocks whose movement still to come is small beside how far the network has come.

Numbers it listens to, one a block, means over the ranks: "plasticity", "plasticity_2" and "plasticity_4", which are
S(L), S(2L) and S(4L) between evaluation-mode passes of snapshots of fixed distance on retained samples, and "floor".
`cut_history` makes of them what is still to come of each cut and what is past. A cut is still when it is

    settled   to come < tolerance × the deepest block's past, it is under a quarter of its own peak, and it has calmed down
              from its usual level; or
    late      to come < late_tolerance × the deepest block's past, or `WANDERING` × tolerance × that where the network
              wanders, it is under half of its own peak, and little of the training is left

and its scores hang together, for `PATIENCE` evaluations that count in a row, `LONG_PATIENCE` where the learning rate is not
falling. Unless it is late and the network jitters, it owes less than `OWN` × its own past, too, or what it owes is
`NEGLIGIBLE`. All of it is relative, to how far the network as a whole has travelled and to the block's own history, so that
precision, samples, schedule and scale cancel. Everything in front of a still cut is frozen at once, also a block that by
itself is up to `FRONT` times as restless, is near its floor, or was never scored; not one whose scores went missing. The
last fifth of the blocks always trains.

A block that jitters under a high learning rate is at rest for that rate only: it moves on, inwards, as the rate falls.
Little of the training is left when what the learning rate still has to give is under `LATE` times what it has given. The
blocks behind it have then found their places too, and make up for more: it may owe `late_tolerance`. The more blocks are
behind it the sooner it is late: below `LATE_IN_FRONT` times their share, once the rate has lost the share `LOST`.

Nothing is frozen: in the first `MIN_STEPS` steps; while the last 4L steps run; where a change of the mask does not pay.

Everything is thawed, and judged afresh from what is seen after that: when the learning rate drops abruptly or rises
(`learning_rate`); when a frozen block has moved (somebody wrote to its weights); when the deepest block moves `ALARM`
times more than at the freeze (training has entered another phase: other data, a spike).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final

from kgt_ddp.policies.cost import job_steps, pays, steps_to_come
from kgt_ddp.policies.cut_history import CutHistory, Outlook
from kgt_ddp.policies.learning_rate import RateWatch
from kgt_ddp.policies.policy import Decision, Observation, check_weight_mean
from kgt_ddp.policies.scores import Scores, visible

MIN_STEPS: Final = 200
"""A network that has made fewer steps than this is in its first transient, whatever its scores say."""
WINDOW: Final = 0.16
"""Share of the job over which levels are taken, and at least 4L steps; half of it after an abrupt drop."""
PATIENCE: Final = 4
LONG_PATIENCE: Final = 24
"""Where the learning rate is not falling, or nobody knows it: nothing but time tells an end from a lull there."""
LATE: Final = 0.25
"""The sum of the rates of all steps to come over that of the steps so far. Under a cosine that is at 0.53 of the job, under
a linear decay at 0.61. Branches of a small job lost 0.25 points where blocks were frozen from 0.3 of it on, and nothing where
two were frozen at 0.45, five at 0.55 and seven at 0.6; those of a larger one 0.2 (docs/policy.md)."""
LATE_IN_FRONT: Final = 0.6
"""Times the share of the blocks behind, where that is more than `LATE`: of ten blocks the first is late at 0.43 of the job
under a cosine, the third at 0.46, the sixth and all behind it at 0.53."""
LOST: Final = 1 / 3
"""Where the rate hardly falls, a block jitters to the end as it does in mid-run."""
FRONT: Final = 4.0
"""Times `tolerance`, late too: beside `late_tolerance` a block with fresh weights would go with those behind it."""
MOVED: Final = 1e-3
"""Share of a block's fastest pace; a frozen block's scores are zero, but for the arithmetic."""
ALARM: Final = 8.0
JITTER: Final = 0.5
"""Below this exponent, the median of its cuts, a network is nearer to jittering about a point (0) than to wandering (1). What
it owes is then mostly noise that the falling rate takes away, and its mean is near that point; what wanders is still
learning, and its mean is a place that it has left."""
WANDERING: Final = 0.25
"""Times `tolerance`: what wanders and is only at half of its peak is still learning. With the whole of it four of ten blocks
of a small ResNet were frozen at the end of a cosine that restarts."""
OWN: Final = 0.05
"""Share of a cut's own past that it may still owe. From random weights all blocks travel about as far as each other; in
fine-tuning the front ones go a thousandth of the deepest's way, and at a small share of that may have a third of their own to
go: so the first layers of MiniLM had at 0.57 of the job, which cost 1.3 and 2.5 times the loss of waiting (two seeds)."""
NEGLIGIBLE: Final = 0.05
"""Times `tolerance`: so little beside the network's movement that its own past does not matter. MiniLM's embeddings, half of
what a step costs, owe a hundred-thousandth."""
LEFT: Final = 0.2
"""Share of the blocks, from the deep end, that always train: they follow what the frozen ones were left with."""


@dataclass(kw_only=True)
class Kgt:
    """See the module.

    Args:
        tolerance: how much of the network's movement so far a block may still owe when it is frozen.
        late_tolerance: the same, where little of the training is left and the network jitters.
        weight_mean: age of the mean of its weights that a block is put to as it freezes where the network jitters, as a share
            of the steps so far (`kgt_ddp.weight_mean`); 0: it stays as it is.
    """

    tolerance: float = 0.004
    late_tolerance: float = 0.02
    weight_mean: float = 0.1
    signals: ClassVar[tuple[str, ...]] = ("plasticity", "plasticity_2", "plasticity_4", "floor")
    needs_total_steps: ClassVar[bool] = False
    shortest_job: ClassVar[int] = MIN_STEPS
    _rate: RateWatch = field(default_factory=RateWatch, init=False)
    _cuts: list[CutHistory] = field(default_factory=list, init=False)
    _lag_steps: int | None = field(default=None, init=False)
    _quick: bool = field(default=False, init=False)
    """An abrupt drop was the last event: half the window and half the patience do."""
    _frozen_step: int = field(default=0, init=False)
    _pulse: tuple[int, float] | None = field(default=None, init=False)
    """The deepest scored block and its level at the last freeze."""

    def __post_init__(self) -> None:
        for name in ("tolerance", "late_tolerance"):
            if not 0.0 < (value := getattr(self, name)) < 1.0:
                raise ValueError(f"kgt: {name}={value} must be between 0 and 1")
        check_weight_mean("kgt", self.weight_mean)

    def decide(self, observation: Observation) -> Decision:
        event = self._rate.note(observation.step, observation.learning_rate)
        if observation.lag_steps is None:
            return Decision(frontier=observation.frontier, reason="no lag: nothing can be scored")
        span = 4 * observation.lag_steps
        self._cuts = self._cuts or [CutHistory() for _ in range(observation.num_blocks)]
        if self._lag_steps is not None and observation.lag_steps != self._lag_steps:
            for cut in self._cuts:
                cut.lag_changed(observation.step, span, observation.lag_steps / self._lag_steps)
            self._pulse = None
        self._lag_steps = observation.lag_steps
        if event:
            self._quick = event == "drop"
            self._begin_afresh(observation.step, span)
        scores = _scores(observation)
        window = self._window(observation, span)
        network_moves = any(visible(one) for one in scores)
        seen = [
            cut.note(observation.step, one, span=span, window=window, network_moves=network_moves)
            for cut, one in zip(self._cuts, scores, strict=True)
        ]
        if observation.frontier and (why := self._why_thaw(observation, event, scores, span)):
            self._begin_afresh(observation.step, span)
            return Decision(frontier=0, reason=why)
        return self._judge(observation, seen, span)

    def _judge(self, observation: Observation, seen: list[bool], span: int) -> Decision:
        horizon = self._rate.horizon(steps_to_come(observation))
        outlooks = [cut.outlook(horizon, span) for cut in self._cuts]
        shares = _shares(outlooks, next((c.past() for c in reversed(self._cuts) if c.has_past), None))
        ahead = horizon / spent if (spent := self._rate.spent(observation.step)) else math.inf
        jitters = _jitters(outlooks)
        self._count_still(seen, shares, outlooks, ahead, jitters=jitters)
        target, reason = self._target(observation, seen, shares, span)
        if target > observation.frontier:
            self._frozen_step = observation.apply_step
            self._pulse = next(((b, o.level) for b, o in reversed([*enumerate(outlooks)]) if o), None)
        return Decision(
            frontier=target,
            reason=reason,
            at_mean=jitters,
            numbers=self._numbers(outlooks, shares, horizon, ahead),
        )

    def state_dict(self) -> dict[str, Any]:
        return {
            "rate": self._rate.state_dict(),
            "cuts": [cut.state_dict() for cut in self._cuts],
            "lag_steps": self._lag_steps,
            "quick": self._quick,
            "frozen_step": self._frozen_step,
            "pulse": self._pulse and list(self._pulse),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._rate.load_state_dict(state["rate"])
        self._cuts = [CutHistory.from_state(one) for one in state["cuts"]]
        self._lag_steps = state["lag_steps"]
        self._quick, self._frozen_step = state["quick"], state["frozen_step"]
        self._pulse = state["pulse"] and (int(state["pulse"][0]), state["pulse"][1])

    def _window(self, observation: Observation, span: int) -> int:
        share = WINDOW / 2 if self._quick else WINDOW
        return max(span, int(share * job_steps(observation)))

    def _begin_afresh(self, step: int, span: int) -> None:
        self._pulse = None
        for cut in self._cuts:
            cut.pace_changed(step, span)

    def _count_still(
        self,
        seen: list[bool],
        shares: list[float | None],
        outlooks: list[Outlook | None],
        ahead: float,
        *,
        jitters: bool,
    ) -> None:
        late_tolerance = self.late_tolerance if jitters else WANDERING * self.tolerance
        for block, (cut, visible_now) in enumerate(zip(self._cuts, seen, strict=True)):
            share, outlook = shares[block], outlooks[block]
            if share is None or outlook is None:
                cut.num_still = 0
            elif visible_now:
                settled = outlook.declined and outlook.calmed and share < self.tolerance
                late = outlook.halved and ahead < self._late_from(block) and share < late_tolerance
                # What jitters owes is noise, whatever its past.
                arrived = (late and jitters) or outlook.own < OWN or share < NEGLIGIBLE * self.tolerance
                cut.num_still = cut.num_still + 1 if outlook.smooth and arrived and (settled or late) else 0

    def _late_from(self, block: int) -> float:
        """What the rates may still have to give, over what they have given, where it is late for this block."""
        if self._rate.lost < LOST:
            return LATE
        return max(LATE, LATE_IN_FRONT * (len(self._cuts) - block - 1) / len(self._cuts))

    def _target(
        self, observation: Observation, seen: list[bool], shares: list[float | None], span: int
    ) -> tuple[int, str]:
        frontier = observation.frontier
        if observation.apply_step < MIN_STEPS:
            return frontier, f"the first {MIN_STEPS} steps"
        if steps_to_come(observation) < span:
            return frontier, "too near the end"
        patience = self._patience()
        reach = frontier
        most = min(observation.num_blocks - math.ceil(LEFT * observation.num_blocks), observation.max_frontier)
        for block in range(frontier, most):
            share, cut = shares[block], self._cuts[block]
            if seen[block] and cut.num_still >= patience:
                reach = block + 1
            elif not self._quiet_enough(share, cut):
                break
        if reach == frontier:
            return frontier, "no cut behind the frontier is still"
        if not pays(observation, reach):
            return frontier, f"freezing {reach} blocks would not pay"
        return reach, f"the cut behind block {reach - 1} is still: {shares[reach - 1]:.2%} of its movement is to come"

    def _patience(self) -> int:
        if self._quick:
            return PATIENCE // 2
        return PATIENCE if self._rate.falling else LONG_PATIENCE

    def _quiet_enough(self, share: float | None, cut: CutHistory) -> bool:
        """May a still cut behind this block freeze it too?"""
        never_scored = cut.num_scored == 0  # nobody watches it; the cuts behind it tell of it
        if never_scored or cut.num_near_floor >= PATIENCE:  # what bounds it may be far above what it does
            return True
        return share is not None and share < FRONT * self.tolerance

    def _why_thaw(self, observation: Observation, event: str | None, scores: list[Scores], span: int) -> str | None:
        if event == "drop":
            return "the learning rate dropped: front blocks may move once more"
        if event == "rise":
            return "the learning rate rose: standing still at a lower one proves nothing"
        if observation.step <= self._frozen_step + 2 * span:  # scores may be late, and still compare across the freeze
            return None
        fixed = observation.frontier if observation.num_fixed is None else observation.num_fixed
        for block, cut in enumerate(self._cuts[:fixed]):
            seen = visible(scores[block])
            if seen is not None and seen[0] > MOVED * cut.fastest:
                return f"frozen block {block} has moved: its weights were written to"
        return self._alarm(span)

    def _alarm(self, span: int) -> str | None:
        if self._pulse is None:
            return None
        block, level = self._pulse
        now = self._cuts[block].outlook(0.0, span)
        if now is None or now.level < ALARM * level:
            return None
        return f"block {block}, the deepest, moves {now.level / level:.0f} times more than at the freeze"

    def _numbers(
        self, outlooks: list[Outlook | None], shares: list[float | None], horizon: float, ahead: float
    ) -> dict[str, Any]:
        if not any(outlooks):
            return {}
        return {
            "horizon_steps": round(horizon) if math.isfinite(horizon) else None,
            "ahead": round(ahead, 2) if math.isfinite(ahead) else None,
            "share": [_rounded(share) for share in shares],
            "own": [_rounded(o.own if o else None) for o in outlooks],
            "level": [o and float(f"{o.level:.2g}") for o in outlooks],
            "exponent": [o and round(o.exponent, 1) for o in outlooks],
            "still": [cut.num_still for cut in self._cuts],
        }


def _rounded(share: float | None) -> float | None:
    return None if share is None or math.isinf(share) else float(f"{share:.2g}")


def _shares(outlooks: list[Outlook | None], deepest: float | None) -> list[float | None]:
    """What is to come of each cut as a share of what is past, see the module; None where it is not known."""
    return [o.to_come / deepest if o and deepest else None for o in outlooks]


def _jitters(outlooks: list[Outlook | None]) -> bool:
    """Whether the network does, by most of its cuts; one cut's exponent is too uncertain."""
    exponents = [outlook.exponent for outlook in outlooks if outlook is not None and outlook.measured]
    return bool(exponents) and statistics.median(exponents) < JITTER


def _scores(observation: Observation) -> list[Scores]:
    unknown = (None,) * observation.num_blocks
    columns = [observation.signals.get(name, unknown) for name in Kgt.signals]
    return [Scores(near=n, middle=m, far=f, floor=z) for n, m, f, z in zip(*columns, strict=True)]
