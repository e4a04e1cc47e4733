"""Weights and samples in, activations of the watched blocks out, in some precision.

`Runner` is the seam at which another precision joins: int8, for instance, may compile a graph that returns the blocks'
outputs instead of hooking modules, and its neighbours will not notice.

`EagerRunner` runs the module itself, in evaluation mode without gradients, and only until the last watched block has
answered: a private exception thrown by that block's hook ends the forward there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kgt_ddp.plasticity import first_floating_tensor, similarity
from kgt_ddp.reference.model import submodules
from kgt_ddp.reference.process import PRECISIONS
from kgt_ddp.reference.samples import Samples, floating_to, mask_for, masks_in

logger = logging.getLogger(__name__)

Similarities = dict[str, Tensor | None]
"""Block -> (batch, batch), or None where it is not known."""


class Runner(Protocol):
    """One model of one trainer in one precision."""

    @property
    def precision(self) -> str:
        """What is really computed, for people."""

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Take over these parameters and buffers (a copy); those that are absent keep their values."""

    def similarities(self, samples: Samples) -> Similarities:
        """Similarity per watched block for these samples, with the weights loaded last. A block that this forward never
        reaches is None."""


class _AllSeen(BaseException):
    """Every watched block has answered. Not an `Exception`, so that a user's `except Exception` lets it through."""


class EagerRunner:
    """Runs a module as it is.

    bf16 is tried three ways, from the fastest to the one that always works: weights and inputs in bf16; bf16 by
    autocast (a model that makes fp32 tensors of its own mixes types in the first way, and torch refuses); fp32. The
    first that the model accepts is kept.
    """

    def __init__(self, module: nn.Module, watched: list[str], precision: str) -> None:
        """Takes `module` over: it is converted in place.

        Raises:
            ValueError: an unknown precision, or a watched name that the model does not have.
        """
        if precision not in PRECISIONS:
            raise ValueError(f"precision {precision!r} is none of {', '.join(PRECISIONS)}")
        self._ways = [("bf16", torch.bfloat16), ("bf16-autocast", None), ("fp32", None)]
        if precision == "fp32":
            self._ways = self._ways[-1:]
        self._module = module.eval().requires_grad_(False)
        self._watched = watched
        self._tensors: dict[str, Tensor] = {}
        self._convert()
        for name, block in submodules(module, watched).items():
            block.register_forward_hook(self._hook(name))
        self._seen: Similarities = {}
        self._masks: dict[str, Tensor] = {}

    @property
    def precision(self) -> str:
        return self._ways[0][0]

    def load(self, weights: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, value in weights.items():
                self._tensors[name].copy_(value)

    def similarities(self, samples: Samples) -> Similarities:
        while True:
            try:
                return self._run(samples)
            except (RuntimeError, TypeError) as error:
                if len(self._ways) == 1:
                    raise
                logger.info("the model does not run in %s: %s", self.precision, error)
                del self._ways[0]
                self._convert()

    def _convert(self) -> None:
        """Bring the module's weights to the type of the current way. bf16 weights stay bf16 values in fp32 tensors."""
        self._module.to(self._ways[0][1] or torch.float32)
        self._tensors = dict(self._module.named_parameters()) | dict(self._module.named_buffers())

    def _run(self, samples: Samples) -> Similarities:
        name, dtype = self._ways[0]
        self._seen = {}
        self._masks = masks_in(samples)
        call = floating_to(samples, dtype or torch.float32)
        try:
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=name == "bf16-autocast"):
                self._module(*call.args, **call.kwargs)
        except _AllSeen:
            pass
        seen, self._seen = self._seen, {}
        return {block: seen.get(block) for block in self._watched}

    def _hook(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def note(_module: nn.Module, _args: Any, output: Any) -> None:
            if name not in self._seen:  # a block that is called twice counts with its first call
                activation = first_floating_tensor(output)
                mask = None if activation is None else mask_for(name, activation, self._masks)
                self._seen[name] = None if activation is None else similarity(activation, mask)
            if len(self._seen) == len(self._watched):
                raise _AllSeen

        return note


def make_runner(module: nn.Module, watched: list[str], precision: str) -> Runner:
    """The runner for a precision's name; takes `module` over.

    Raises:
        ValueError: see `EagerRunner`.
    """
    return EagerRunner(module, watched, precision)
