"""One model's decisions, on all ranks: scores are collected, rank 0's policy decides, everybody learns the mask.

`Freezing` calls `boundary` before the first forward of each step and applies the mask that it returns. What is measured on
the way for the policy (scores, loss, the job's length, the backward time of each block) belongs here; what a mask does to
the model does not.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.optim import Optimizer

from kgt_ddp.agreement import LAG, Agreement
from kgt_ddp.backward_profile import BackwardProfile
from kgt_ddp.blocks import Blocks
from kgt_ddp.cadence import affordable, coarser, interval_for
from kgt_ddp.decider import Decider
from kgt_ddp.job_length import JobLength
from kgt_ddp.loss_meter import LossMeter
from kgt_ddp.mask import Mask
from kgt_ddp.optimizer_hooks import learning_rate
from kgt_ddp.policies.policy import Observation, Policy
from kgt_ddp.saved_time import SavedTime
from kgt_ddp.signals import Signals
from kgtrun.contract import environment
from kgtrun.contract.events import EventWriter

logger = logging.getLogger(__name__)

LONGEST_WAIT_S = 60.0
"""For a reference, in runs that are to be repeatable; less where ranks do not wait for each other as long."""


@dataclass(frozen=True, kw_only=True)
class Boundary:
    """Where training stands between two steps."""

    step: int
    mask: Mask
    optimizers: Sequence[Optimizer]
    saved: SavedTime
    """Knows what a step with nothing frozen takes; asked only when something is decided."""
    graph_waits: bool = False
    """Whether, on this rank, a graph from before the last optimizer step may still have its backward."""
    apply_seconds: float | None = None
    """The last change of the mask; None before the first."""


class Decisions:
    """See the module docstring.

    Args:
        group: the control group.
        blocks: the partition.
        policy: decides on rank 0 of the group.
        policy_spec: its text, compared between ranks.
        total_steps: optimizer steps of the whole job, if given; a policy that listens is told what `job_length` learns.
        interval: steps from one decision to the next, all along; None: `cadence` chooses it.
        deterministic: scores are waited for and no time is measured, so that the run can be repeated.
        events: where decisions are recorded.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        blocks: Blocks,
        *,
        policy: Policy,
        policy_spec: str,
        total_steps: int | None,
        interval: int | None,
        deterministic: bool,
        events: EventWriter,
    ) -> None:
        self._group = group
        self._blocks = blocks
        self._policy = policy
        self._policy_spec = policy_spec
        self._given_steps = total_steps
        self._interval = interval if interval is not None else interval_for(total_steps)
        self._given_interval = interval is not None
        self._paced = interval is None and total_steps is None and bool(policy.signals)
        """Whether the interval becomes longer with the length that is learned."""
        self._deterministic = deterministic
        self._events = events
        # getattr: a policy is any object with the interface, and may be from before it had this attribute.
        too_short = total_steps is not None and total_steps <= getattr(policy, "shortest_job", 0)
        self._signal_names = () if too_short else tuple(policy.signals)
        self._decider = Decider(policy, events)
        self._length = JobLength(total_steps, events)
        self.loss = LossMeter()
        self._agreement: Agreement | None = None
        self._proved = False
        self.inert = False
        """Ranks cannot have the same blocks: nothing is decided."""
        self._advanced = -1
        """Step whose boundary the agreement has seen. A state saved in mid-step is resumed at that step's first forward."""
        self._signals: Signals | None = None
        self._profile: BackwardProfile | None = None
        self._now: Boundary | None = None

    @property
    def begun(self) -> bool:
        """Whether the blocks are known and ranks agree on masks from now on."""
        return self._agreement is not None

    @property
    def total_steps(self) -> int | None:
        """Optimizer steps of the whole job, given or learned."""
        return self._length.total_steps

    @property
    def _is_rank_0(self) -> bool:
        return dist.get_rank(self._group) == 0

    def begin(self, model: torch.nn.Module, *, step: int, longest_wait_s: float) -> None:
        """The blocks have their order: agree from the next boundary on.

        Args:
            model: what DDP wraps.
            step: optimizer steps finished: 0 but for a job that is resumed.
            longest_wait_s: what the ranks' collectives bear; repeatable runs wait less for a reference.
        """
        self._agreement = Agreement(
            self._group,
            num_blocks=len(self._blocks),
            signals=self._signal_names,
            interval=self._interval,
            decide=self._decide,
            pace=self._pace,
        )
        self._proved = False
        self._give_up_signals()  # of a state that was loaded before this one
        if self._signal_names and self._blocks.max_frontier:
            self._signals = Signals(
                self._signal_names,
                self._blocks,
                model,
                interval=self._interval,
                rank_on_node=_place_on_node(self._group),
                longest_wait_s=min(LONGEST_WAIT_S, longest_wait_s) if self._deterministic else 0.0,
                events=self._events,
            )
        self._events.write(
            "blocks",
            step=step,
            policy=self._policy_spec,
            total_steps=self._given_steps,
            interval=self._interval,
            weight_mean=getattr(self._policy, "weight_mean", 0.0),
            blocks=[
                {"name": b.name, "parameters": b.num_parameters, "shared": list(b.shared)} for b in self._blocks.blocks
            ],
        )
        if self._blocks.max_frontier == 0:
            logger.warning("a single block of the model trains: nothing can be frozen")

    def profile_backward(self) -> None:
        """Measure from now on what each block's backward costs, if a policy listens and may know times."""
        if self._signals is not None and not self._deterministic:
            self._profile = BackwardProfile(self._blocks)

    # ---- one step ---------------------------------------------------------------------------------------------------

    def before_forward(self, inputs: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """A training forward begins; the first one's inputs become the probe."""
        if self._signals is not None and not self._signals.has_probe:
            self._signals.retain_probe(inputs, kwargs)

    def before_optimizer_step(self) -> None:
        """Gradients are final."""
        if self._signals is not None:
            self._signals.before_optimizer_step()

    def step_ended(self, step: int) -> None:
        """`step` optimizer steps are finished."""
        if self._profile is not None:
            self._profile.step_ended()
        if self._signals is not None:
            self._signals.step_ended()
        self._length.step_ended(step)

    def prove_equal(self, step: int) -> None:
        """Once, all ranks together at the first boundary. Where they cut the model differently nothing is decided from then on.

        Raises:
            AgreementError: they have different settings.
        """
        assert self._agreement is not None
        if self._proved:
            return
        facts = {
            "blocks": self._blocks.fingerprint(),
            "policy": self._policy_spec,
            "total_steps": self._given_steps,
            "interval": self._interval,
            "step": step,
        }
        self._proved = True
        # DDP trains such a model, if told to find unused parameters: so must we.
        if self._agreement.prove_equal(facts, tolerated=("blocks",)):
            self.inert = True
            self._give_up_signals()
            if self._is_rank_0:
                logger.warning(
                    "nothing is frozen in this job: the ranks ran different parts of the model in their first forward, and so "
                    "cut it into different blocks"
                )

    def boundary(self, now: Boundary) -> Mask | None:
        """Take part in what is due at this step, all ranks alike; a mask to apply before its forward, or None."""
        assert self._agreement is not None
        if self._advanced == now.step:
            return None
        self._advanced = now.step
        self._now = now
        signals = None
        if self._signals is not None and self._agreement.wants_signals(now.step):
            signals = self._signals.collect(now.step, now.mask.generation)
            self._length.look(list(now.optimizers), now.step)
        mask = self._agreement.advance(now.step, now.mask, signals, graph_waits=now.graph_waits)
        self._follow_interval(now.step)
        return mask

    def _decide(self, present: Mask, signals: dict[str, tuple[float | None, ...]]) -> Mask:
        """Rank 0, one boundary after the collection of `signals`, one before the mask is applied."""
        now = self._now
        assert now is not None
        timed = not self._deterministic  # no two runs measure the same
        observation = Observation(
            step=now.step,
            apply_step=now.step + LAG - 1,
            total_steps=self._length.total_steps,
            num_blocks=len(self._blocks),
            num_freezable=self._blocks.max_frontier,
            frontier=present.frontier,
            num_fixed=self._blocks.num_fixed,
            learning_rate=learning_rate(now.optimizers),
            loss=self.loss.take(),
            lag_steps=self._signals.lag_steps if self._signals else None,
            step_seconds=now.saved.unfrozen_step_s if timed else None,
            block_seconds=self._profile.block_seconds if self._profile else None,
            apply_seconds=now.apply_seconds if timed else None,
            signals=signals,
        )
        return self._decider.decide(present, observation)

    def _pace(self, interval: int) -> int:
        """Rank 0: the interval from now on."""
        now = self._now
        assert now is not None
        if self._paced:
            interval = coarser(interval, now.step, self._length.total_steps)
        if self._given_interval or self._deterministic or self._signals is None:
            return interval
        cost, step_s = self._signals.reference_cost, now.saved.unfrozen_step_s
        if cost is None or not step_s:
            return interval
        return affordable(
            interval,
            step_s=step_s,
            passed_s=cost.passed_s,
            cpu_s=cost.cpu_s,
            num_cores=(os.cpu_count() or 1) / max(environment.integer(environment.NUM_REFERENCES) or 1, 1),
            step=now.step,
            total_steps=self._length.total_steps,
        )

    def _follow_interval(self, step: int) -> None:
        """All ranks, at the same step: what rank 0 chose."""
        assert self._agreement is not None
        if self._agreement.interval == self._interval:
            return
        self._events.write("interval", step=step, was=self._interval, interval=self._agreement.interval)
        self._interval = self._agreement.interval
        if self._signals is not None:
            self._signals.set_interval(self._interval)

    # ---- saving and loading -----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What all ranks know alike."""
        return {
            "agreement": self._agreement.state_dict() if self._agreement else None,
            "advanced": self._advanced,
            "signals": self._signals.state_dict() if self._signals else None,
        }

    def load_state_dict(self, state: Mapping[str, Any], *, same_policy: bool, step: int) -> None:
        """After `begin`. Another policy starts its own agreement."""
        assert self._agreement is not None
        self._advanced = state["advanced"]
        if same_policy and state["agreement"]:
            self._agreement.load_state_dict(state["agreement"])
            self._follow_interval(step)
            if self._signals is not None and state.get("signals"):
                self._signals.load_state_dict(state["signals"])

    @property
    def has_rank_0_state(self) -> bool:
        """True on rank 0, and on all ranks of a job that has not begun: it may be about to load one."""
        return not self.begun or self._is_rank_0

    def rank_0_state(self) -> dict[str, Any]:
        """What only rank 0 knows: the policy's memory, the job's length, the losses since the last decision."""
        length = {**self._length.state_dict(), "num_ranks": self._group.size()}
        return {"policy": self._policy.state_dict(), "job_length": length, "loss": self.loss.state_dict()}

    def load_rank_0_state(self, state: Mapping[str, Any] | None, *, same_policy: bool, same_clock: bool) -> None:
        """`state`: None where rank 0 saved none; `same_clock`: every step of the job so far was counted."""
        if state is None:
            if self._is_rank_0:
                logger.warning("the freezing state was not saved by rank 0: the policy begins without its memory")
            return
        length = state.get("job_length", {})
        # On another number of ranks an epoch has other steps; steps made with freezing off were not counted.
        if same_clock and length.get("num_ranks") == self._group.size():
            self._length.load_state_dict(length)
        if same_policy:
            self._policy.load_state_dict(state["policy"])
            if state.get("loss"):
                self.loss.load_state_dict(state["loss"])

    def reference_stats(self) -> dict[str, Any]:
        """What the connection to the reference did; empty without one."""
        return self._signals.stats() if self._signals else {}

    def close(self) -> None:
        """Give the connection to the reference back."""
        if self._signals is not None:
            self._signals.close()

    def _give_up_signals(self) -> None:
        self.close()
        self._signals = None


def _place_on_node(group: dist.ProcessGroup) -> int:
    """Number of this rank among the ranks of `group` on its node: a group of some of the ranks has references, too. Launchers
    number the ranks of a node one after the other."""
    rank, on_node = dist.get_rank(), environment.rank_on_node()
    first = rank - on_node
    return sum(first <= other < rank for other in dist.get_process_group_ranks(group))
