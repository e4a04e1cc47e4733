"""The trainer's own activations, reduced to what a score needs: for the pairings `live` and `eval`.

    tap = ActivationTap(module, watched, limit=64)
    with tap.recording():          # live: around the training step's forward
        model(images)
    similarities = tap.take()

    similarities = tap.evaluate(sub_batch(args, kwargs, 64))     # eval: a pass of its own

Each block's activation of the first `limit` samples becomes a (limit, limit) similarity in the hook itself, on the
device of the activation; nothing else of it is kept. The `probe` pairing needs none of this.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kgt_ddp.plasticity import first_floating_tensor, gram
from kgt_ddp.reference.model import submodules
from kgt_ddp.reference.runner import Similarities
from kgt_ddp.reference.samples import Samples, mask_for, masks_in


class ActivationTap:
    """Looks at blocks while they run; no hook stays on them outside of `recording`."""

    def __init__(self, module: nn.Module, watched: list[str], *, limit: int) -> None:
        """
        Raises:
            ValueError: a watched name that the model does not have.
        """
        self._module = module
        self._blocks = submodules(module, watched)
        self._limit = limit
        self._masks: dict[str, Tensor] = {}
        self._found: Similarities = {}

    @contextmanager
    def recording(self, masks: dict[str, Tensor] | None = None) -> Iterator[None]:
        """Record the forwards run inside; of several, each block's last one counts. `masks`: see `samples.masks_in`."""
        self._masks = {name: mask[: self._limit] for name, mask in (masks or {}).items()}
        hooks = [block.register_forward_hook(self._hook(name)) for name, block in self._blocks.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def take(self) -> Similarities:
        """What was recorded since the last call, on the CPU; a block that did not run is None."""
        found, self._found = self._found, {}
        return {name: None if (found_gram := found.get(name)) is None else found_gram.cpu() for name in self._blocks}

    def evaluate(self, samples: Samples) -> Similarities:
        """A pass in evaluation mode without gradients. Each module's own mode is restored, whatever it was."""
        modes = {module: module.training for module in self._module.modules()}
        self._module.eval()
        try:
            with torch.no_grad(), self.recording(masks_in(samples)):
                self._module(*samples.args, **samples.kwargs)
        finally:
            for module, training in modes.items():
                module.training = training
        return self.take()

    def _hook(self, name: str) -> Any:
        def note(_module: nn.Module, _args: Any, output: Any) -> None:
            activation = first_floating_tensor(output)
            if activation is not None and activation.dim() > 0:
                activation = activation[: self._limit]
                self._found[name] = gram(activation, mask_for(name, activation, self._masks))

        return note
