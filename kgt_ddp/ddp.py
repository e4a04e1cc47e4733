"""`FreezeAwareDDP`: torch's DistributedDataParallel whose converged front blocks stop costing backward and traffic.

A drop-in: same arguments, same attributes, same state dict, `isinstance(model, DistributedDataParallel)` holds. It adds
one attribute, `freezing`, and three keyword arguments. This file only wires; `freezing` does the work.

Without kgtrun (no policy by argument or environment), or with KGTRUN_OFF=1, it is a plain DDP and says so in one line.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from torch.distributed.algorithms.join import JoinHook
from torch.nn.parallel import DistributedDataParallel

from kgt_ddp import gloo_exit, torch_private
from kgt_ddp.comm_hook import freeze_hook
from kgt_ddp.errors import FreezingUnsupportedError, KgtError, PolicyError
from kgt_ddp.freezing import Freezing
from kgt_ddp.inactive import Inactive
from kgt_ddp.policies.policy import Policy
from kgt_ddp.policy_spec import parse_policy
from kgtrun.contract import environment
from kgtrun.contract.events import EventWriter

logger = logging.getLogger(__name__)


class FreezeAwareDDP(DistributedDataParallel):
    """Data-parallel wrapper that freezes front blocks while it trains.

    Args:
        module, *args, **kwargs: as for `torch.nn.parallel.DistributedDataParallel`.
        blocks: the freezable units, as modules or qualified names; found by structure when left out.
        policy: text like "linear:start=0.25,stop=0.75", or an object with the `Policy` interface; from KGTRUN_POLICY
            when left out.
        total_steps: optimizer steps of the whole job; from KGTRUN_TOTAL_STEPS when left out.
        interval: optimizer steps from one decision to the next; follows from `total_steps` when left out.

    Attributes:
        freezing: see `kgt_ddp.freezing.Freezing`.

    Raises:
        PolicyError: the policy is unknown, or needs `total_steps`.
        BlockError: `blocks` does not fit the module.
        FreezingUnsupportedError: a policy was passed together with an option of DDP that cannot be re-bucketed. From the
            environment such a combination trains unfrozen and says so.
    """

    freezing: Freezing | Inactive = Inactive("under construction")

    def __init__(
        self,
        module: nn.Module,
        *args: Any,
        blocks: Sequence[str | nn.Module] | None = None,
        policy: str | Policy | None = None,
        total_steps: int | None = None,
        interval: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(module, *args, **kwargs)
        gloo_exit.expect()
        self.freezing = self._begin(blocks, policy, total_steps, interval)
        if isinstance(self.freezing, Freezing):
            super().register_comm_hook(self.freezing.hook, freeze_hook)

    def _begin(
        self,
        blocks: Sequence[str | nn.Module] | None,
        policy: str | Policy | None,
        total_steps: int | None,
        interval: int | None,
    ) -> Freezing | Inactive:
        given = policy is not None
        chosen = policy if policy is not None else os.environ.get(environment.POLICY)
        if environment.flag(environment.OFF):
            return _inactive(f"{environment.OFF} is set")
        if not chosen:
            return _inactive("started without kgtrun")
        total_steps = total_steps if total_steps is not None else environment.integer(environment.TOTAL_STEPS)
        spec = chosen if isinstance(chosen, str) else type(chosen).__name__
        rule = parse_policy(chosen) if isinstance(chosen, str) else chosen
        if rule.needs_total_steps and not total_steps:
            raise PolicyError(f"policy {spec!r} needs the job's length: pass total_steps= or --total-steps")
        try:
            unsupported = torch_private.unsupported_options(self)
            if unsupported:
                raise FreezingUnsupportedError(f"freezing does not work together with {', '.join(unsupported)}")
            return Freezing(
                self,
                policy=rule,
                policy_spec=spec,
                blocks=blocks,
                total_steps=total_steps,
                interval=interval,
                deterministic=environment.flag(environment.DETERMINISTIC),
                events=EventWriter.for_process(
                    os.environ.get(environment.RUN_DIR), role="trainer", index=int(os.environ.get("RANK", "0"))
                ),
            )
        except KgtError as error:
            if given or blocks is not None:
                raise
            return _inactive(str(error), level=logging.WARNING)

    @torch_private.disable_dynamo(recursive=False)
    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        freezing = self.freezing
        if isinstance(freezing, Inactive):
            return super().forward(*inputs, **kwargs)
        freezing.before_forward(inputs, kwargs)
        try:
            output = super().forward(*inputs, **kwargs)
        except BaseException:
            freezing.forward_failed()
            raise
        freezing.after_forward(output)
        return output

    def train(self, mode: bool = True) -> FreezeAwareDDP:
        super().train(mode)
        if isinstance(self.freezing, Freezing):
            self.freezing.training_was_set()
        return self

    def register_comm_hook(self, state: object, hook: Callable[..., Any]) -> None:
        """As DDP's: the hook reduces what is live, inside ours. Once only, as there."""
        if isinstance(self.freezing, Inactive):
            super().register_comm_hook(state, hook)
            return
        if self.freezing.hook.inner is not None:
            raise RuntimeError("register_comm_hook can be called only once, as on DistributedDataParallel")
        self._check_comm_hook(hook)
        self.freezing.hook.inner = (hook, state)

    def join_hook(self, **kwargs: Any) -> JoinHook:
        if isinstance(self.freezing, Freezing) and not kwargs.get("divide_by_initial_world_size", True):
            raise ValueError(
                "join(divide_by_initial_world_size=False) does not go together with freezing: gradients are divided by the "
                "number of all ranks. Leave it out, or train with --off"
            )
        hook = super().join_hook(**kwargs)
        return self.freezing.join_begins(hook) if isinstance(self.freezing, Freezing) else hook

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        # Process groups, sockets and the clock belong to this process; a copy is a plain DDP.
        state["freezing"] = Inactive("a copy of a wrapper does not freeze")
        state["_comm_hooks"] = []
        return state


def _inactive(reason: str, level: int = logging.INFO) -> Inactive:
    logger.log(level, "kgtrun: freezing is off: %s", reason)
    return Inactive(reason)
