"""The freezing of one DDP-wrapped model: wires clock, blocks, hook, guard, cache and decisions together.

`FreezeAwareDDP` owns one of these as `ddp.freezing`; users call `describe`, `summary`, `observe_loss`,
`state_dict` and `load_state_dict`.

Life of a training step: `before_forward` (boundary: take part in the decisions, apply an agreed mask), forward, `after_forward`
-> backward (the hook counts the last bucket) -> optimizer step (guard; the clock ticks). The first training forward is
watched to learn the order of execution; decisions begin with the next boundary.
"""

from __future__ import annotations

import atexit
import logging
import time
import weakref
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms.join import JoinHook
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from kgt_ddp import optimizer_hooks, torch_private
from kgt_ddp.activation_cache.cache import ActivationCache
from kgt_ddp.agreement import control_group
from kgt_ddp.blocks import Blocks
from kgt_ddp.comm_hook import FreezeHookState
from kgt_ddp.decisions import Boundary, Decisions
from kgt_ddp.execution_order import ExecutionOrder, watch
from kgt_ddp.join_watch import JoinWatch
from kgt_ddp.mask import Mask
from kgt_ddp.optimizer_hooks import learning_rate, living_optimizers
from kgt_ddp.policies.policy import Policy
from kgt_ddp.prefix_edge import marking
from kgt_ddp.prefix_freezer import PrefixFreezer
from kgt_ddp.saved_time import SavedTime
from kgt_ddp.step_clock import StepClock
from kgt_ddp.weight_mean import WeightMean
from kgtrun.contract import heartbeat
from kgtrun.contract.events import EventWriter

logger = logging.getLogger(__name__)

STATE_VERSION = 5


class Freezing:
    """See the module docstring.

    Args:
        ddp: the wrapper; held weakly.
        policy, policy_spec, total_steps, interval, deterministic: see `Decisions`.
        blocks: units chosen by the user, or None.
        events: where decisions and applied masks are recorded.

    Raises:
        AgreementError: no control group can be formed.
        BlockError: `blocks` does not fit the model.
    """

    active = True

    def __init__(
        self,
        ddp: DistributedDataParallel,
        *,
        policy: Policy,
        policy_spec: str,
        blocks: Iterable[str | nn.Module] | None,
        total_steps: int | None,
        interval: int | None,
        deterministic: bool,
        events: EventWriter,
    ) -> None:
        self._ddp = weakref.ref(ddp)
        self._policy_spec = policy_spec
        self._events = events
        self.blocks = Blocks(ddp.module, None if blocks is None else list(blocks))
        self.clock = StepClock()
        self.hook = FreezeHookState(ddp.process_group, self._block_parameters())
        self.hook.on_last_bucket = self._on_last_bucket
        self.mask = Mask(0, len(self.blocks))
        self._decisions = Decisions(
            control_group(ddp.process_group),
            self.blocks,
            policy=policy,
            policy_spec=policy_spec,
            total_steps=total_steps,
            interval=interval,
            deterministic=deterministic,
            events=events,
        )
        self._resumed: Mapping[str, Any] | None = None
        share = getattr(policy, "weight_mean", 0.0)
        self._mean = WeightMean(self.blocks, share) if share else None
        self._freezer = PrefixFreezer(self.blocks, self.hook, self._mean)
        self.guard = self._freezer.guard
        self._edge = self._freezer.edge
        self._saved = SavedTime()
        self._apply_s: float | None = None
        self._join = JoinWatch()
        self._training = False
        self._order: ExecutionOrder | None = None
        self._around_forward = ExitStack()
        self.cache = ActivationCache(
            ddp, self.blocks, events, progress=lambda: (self.clock.step, self._decisions.total_steps)
        )
        self._parameter_ids = {id(p) for p in ddp.module.parameters()}
        # In order of their first step: a set's order is that of addresses, which no run repeats.
        self._optimizers: weakref.WeakKeyDictionary[Optimizer, None] = weakref.WeakKeyDictionary()
        self._applied: list[dict[str, Any]] = []
        optimizer_hooks.listen(self)
        atexit.register(_at_exit, weakref.ref(self))

    # ---- for users --------------------------------------------------------------------------------------------------

    @property
    def frontier(self) -> int:
        """How many front blocks are frozen."""
        return self.mask.frontier

    def describe(self) -> str:
        """The blocks as a table."""
        return self.blocks.describe()

    def summary(self) -> dict[str, Any]:
        """What happened so far, as plain data: frontier, applied masks, gradient bytes reduced and dropped (counted),
        seconds saved (estimated)."""
        return {
            "active": True,
            "policy": self._policy_spec,
            "steps": self.clock.step,
            "num_blocks": len(self.blocks),
            "frontier": self.mask.frontier,
            "freezes": [dict(entry) for entry in self._applied],
            "saved_s_estimate": self._saved.seconds,
            "reduced_bytes": sum(self.hook.reduced_bytes),
            "dropped_bytes": sum(self.hook.dropped_bytes),
            "reduced_bytes_by_block": list(self.hook.reduced_bytes),
            "dropped_bytes_by_block": list(self.hook.dropped_bytes),
            "cache": self.cache.summary(),
            "reference": self._decisions.reference_stats(),
        }

    def observe_loss(self, loss: torch.Tensor | float) -> None:
        """Report a step's training loss, before any scaling of it. No policy needs it; `kgt-paper` ends its bootstrapping
        by it. Rank 0's losses are the ones that count. Waits for nothing.

        Raises:
            TypeError: neither a number nor a tensor of numbers.
        """
        self._decisions.loss.add(loss)

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on freezing as if never stopped; plain data, any rank. Saved in the middle of a step's
        accumulation it resumes at that step's first forward: gradients are in no checkpoint.

        What only rank 0 knows (the policy's memory) is in rank 0's state alone: of keys that several ranks have,
        torch.distributed.checkpoint saves any rank's. It loads key by key into the state of the fresh job and takes
        dicts apart, and lists of dicts, but no tuples: so all that may look otherwise there is inside tuples.
        """
        shared = {
            "blocks": self.blocks.state_dict() if self.blocks.ordered else None,
            "reentrant_checkpoint": self._edge.reentrant,
            **self._decisions.state_dict(),
            "weight_mean": self._mean.state_dict() if self._mean else None,
            "freezes": [dict(entry) for entry in self._applied],
            "reduced_bytes": list(self.hook.reduced_bytes),
            "dropped_bytes": list(self.hook.dropped_bytes),
        }
        state = {
            "version": STATE_VERSION,
            "step": self.clock.step,
            "frontier": self.mask.frontier,
            "generation": self.mask.generation,
            "policy_spec": self._policy_spec,
            "shared": (shared,),
        }
        if self._decisions.has_rank_0_state:
            state["rank_0"] = (self._decisions.rank_0_state(),)
        return state

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Go on where `state_dict()` left off. Call on every rank, before the first training forward.

        Without a saved state (a checkpoint written without kgtrun, or with freezing off) training starts unfrozen, and
        says so. A state saved under another policy keeps its frozen blocks; the new policy decides from there. One that a
        job with freezing off has handed on (`kgt_ddp.inactive`) is taken up where it was when freezing ended.

        Raises:
            BlockError: the state is that of another model.
            ValueError: it was written by a version that this one cannot read.
        """
        if not state:
            logger.warning("the checkpoint has no freezing state: training goes on with nothing frozen")
            return
        if state.get("version") != STATE_VERSION:
            raise ValueError(f"freezing state of version {state.get('version')!r}; this kgtrun reads {STATE_VERSION}")
        self.clock.step = state["step"]
        (shared,) = state["shared"]
        off = shared.get("off")
        if off is not None:
            then = f"{state['frontier']} blocks freeze again, as at step {state['step']}, when freezing was on"
            nothing = "training goes on with nothing frozen"
            logger.warning(
                "the checkpoint was saved with freezing off (%s): %s",
                off,
                nothing if shared["blocks"] is None else then,
            )
        if shared["blocks"] is None:
            if not self.clock.step and off is None:
                logger.warning("the checkpoint is from before the first step: training goes on with nothing frozen")
            return
        self.blocks.load_state_dict(shared["blocks"])
        self._edge.reentrant = shared.get("reentrant_checkpoint", False)
        self.hook.set_blocks(self._block_parameters())
        self.hook.reduced_bytes = list(shared["reduced_bytes"])
        self.hook.dropped_bytes = list(shared["dropped_bytes"])
        self._applied = [dict(entry) for entry in shared["freezes"]]
        self.mask = Mask(0, len(self.blocks), state["generation"])
        self._begin_decisions()
        if self._mean is not None and shared.get("weight_mean") and off is None:
            self._mean.load_state_dict(shared["weight_mean"])
        same_policy = state["policy_spec"] == self._policy_spec
        self._decisions.load_state_dict(shared, same_policy=same_policy, step=self.clock.step)
        rank_0 = state["rank_0"][0] if "rank_0" in state else None
        self._decisions.load_rank_0_state(rank_0, same_policy=same_policy, same_clock=off is None)
        self._resumed = state

    # ---- one step ---------------------------------------------------------------------------------------------------

    @torch_private.disable_dynamo
    def before_forward(self, inputs: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """A forward of the wrapper begins: do whatever is due before it."""
        ddp = self._wrapper
        self.guard.before_forward()
        self.blocks.hold_eval()
        self._training = torch.is_grad_enabled() and ddp.training
        if not self._training:
            self._edge.look_at(inputs, kwargs)
            return
        self.clock.paused = self._join.inside and torch_private.join_enabled(ddp)
        self._decisions.before_forward(inputs, kwargs)
        if self.blocks.any_trains and self.clock.forward_begins():
            torch_private.rebuild_buckets_if_due(ddp)
            self._boundary()
        self._edge.look_at(inputs, kwargs)
        if not self.blocks.ordered:
            self._order = self._around_forward.enter_context(watch(ddp.module))
        elif self._edge.needed:
            self._around_forward.enter_context(self._edge.forward())
        if self.blocks.ordered:
            self._around_forward.enter_context(self.cache.forward())

    @torch_private.disable_dynamo
    def after_forward(self, output: Any) -> None:
        """It ended well."""
        if not self._training:
            return
        self._around_forward.close()
        if self._order is not None:
            order, self._order = self._order, None
            self._take_order(order)
        self.clock.forward_ended(t for t in tree_leaves(output) if isinstance(t, torch.Tensor))

    def forward_failed(self) -> None:
        """It raised."""
        self._around_forward.close()
        self._order = None

    def join_begins(self, hook: JoinHook) -> JoinHook:
        """A `Join` context over the wrapper is made: masks are held until its end. Returns `hook`, watched for the end."""
        return self._join.begins(hook)

    def before_optimizer_step(self, optimizer: Optimizer) -> None:
        if self._owns(optimizer):
            self._decisions.before_optimizer_step()
        self.guard.before_step(optimizer)

    def before_closure(self, optimizer: Optimizer) -> None:
        self.guard.restore(optimizer)

    def after_closure(self, optimizer: Optimizer) -> None:
        self.guard.before_step(optimizer)

    def after_optimizer_step(self, optimizer: Optimizer) -> None:
        self.guard.after_step(optimizer)
        if self._owns(optimizer):
            self._optimizers[optimizer] = None
            if self.clock.optimizer_stepped():
                self._step_ended()

    def _step_ended(self) -> None:
        self.guard.step_ended()
        self._decisions.step_ended(self.clock.step)
        if self._mean is not None:
            self._mean.note(self.clock.step, lambda: learning_rate(self._optimizers))
        self._saved.step_ended(time.monotonic(), frozen=self.mask.frontier > 0)
        heartbeat.beat(self.clock.step, frontier=self.mask.frontier, saved_s=self._saved.seconds)

    def _on_last_bucket(self) -> None:
        self.clock.gradients_reduced()
        self.guard.feed_starved()

    def _owns(self, optimizer: Optimizer) -> bool:
        return any(id(p) in self._parameter_ids for group in optimizer.param_groups for p in group["params"])

    def _take_order(self, order: ExecutionOrder) -> None:
        self.blocks.order_by(order)
        self._edge.reentrant = marking(self.blocks, order) if order.reentrant_calls else False
        self.hook.set_blocks(self._block_parameters())
        self.mask = Mask(0, len(self.blocks), self.mask.generation)
        self._begin_decisions()
        self._decisions.profile_backward()

    def _begin_decisions(self) -> None:
        patience_s = torch_private.group_timeout(self._wrapper.process_group).total_seconds() / 2
        self._decisions.begin(self._wrapper.module, step=self.clock.step, longest_wait_s=patience_s)

    def _boundary(self) -> None:
        """Between two steps."""
        if not self._decisions.begun:
            return
        self._decisions.prove_equal(self.clock.step)
        if self._decisions.inert:
            self._mean = None
            return
        if self._resumed is not None:
            state, self._resumed = self._resumed, None
            if state["frontier"]:
                # None of them has made a step yet that would have shown it to us.
                self._optimizers.update((one, None) for one in living_optimizers() if self._owns(one))
                frontier = min(state["frontier"], self.blocks.max_frontier)
                self._apply(Mask(frontier, len(self.blocks), state["generation"]), resumed=True)
        mask = self._decisions.boundary(
            Boundary(
                step=self.clock.step,
                mask=self.mask,
                optimizers=list(self._optimizers),
                saved=self._saved,
                graph_waits=self.clock.graph_waits,
                apply_seconds=self._apply_s,
            )
        )
        if mask is not None:
            self._apply(mask)

    def _apply(self, mask: Mask, *, resumed: bool = False) -> None:
        """Freeze or lift, and re-bucket. All ranks are here together, before the forward of the same step."""
        started = time.perf_counter()
        old = self.mask.frontier
        # Blocks that were frozen before the job stopped have their weights from the checkpoint.
        at_mean = self._mean is not None and mask.at_mean and mask.frontier > old and not resumed
        self._freezer.apply(self._wrapper, mask.frontier, list(self._optimizers), at_mean=at_mean)
        self.mask = mask
        if not resumed:
            self._applied.append({"step": self.clock.step, "frontier": mask.frontier, "was": old})
        self._apply_s = time.perf_counter() - started
        self._events.write(
            "resume" if resumed else "apply",
            step=self.clock.step,
            frontier=mask.frontier,
            was=old,
            generation=mask.generation,
            at_mean=at_mean,
            seconds=self._apply_s,
            learning_rate=learning_rate(self._optimizers),
            reduced_bytes=sum(self.hook.reduced_bytes),
            dropped_bytes=sum(self.hook.dropped_bytes),
        )

    def training_was_set(self) -> None:
        """The wrapper's `train()` or `eval()` was called."""
        self.blocks.training_was_set()
        self.blocks.hold_eval()

    def close(self) -> None:
        """Record the totals; later calls do nothing."""
        self._decisions.close()
        if self.clock.step:
            self._events.write("trainer_end", **self.summary())
        self.cache.close()
        self._events.close()

    def _block_parameters(self) -> list[list[nn.Parameter]]:
        return [[p for _, p in block.parameters] for block in self.blocks.blocks]

    @property
    def _wrapper(self) -> DistributedDataParallel:
        ddp = self._ddp()
        assert ddp is not None, "a Freezing does not outlive its wrapper"
        return ddp


def _at_exit(reference: weakref.ref[Freezing]) -> None:
    freezing = reference()
    if freezing is not None:
        freezing.close()
