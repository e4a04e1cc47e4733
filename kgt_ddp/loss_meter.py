"""Mean of the training losses that a script reports, for policies that look at the loss.

A loss is added on its device, without waiting for it; only `take` reads the sum, once a decision.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch


class LossMeter:
    """Sums what it is given between two calls of `take`."""

    def __init__(self) -> None:
        self._sum: torch.Tensor | float = 0.0
        self._count = 0

    def add(self, loss: torch.Tensor | float) -> None:
        """One step's loss; of a tensor with several elements, their mean counts.

        Raises:
            TypeError: neither a number nor a tensor of numbers.
        """
        if isinstance(loss, torch.Tensor) and loss.numel() and not loss.is_complex():
            found = loss.detach().float()  # the mean of a scalar would be a kernel for nothing
            value: torch.Tensor | float = found.mean() if found.dim() else found
        elif isinstance(loss, float | int):
            value = float(loss)
        else:
            raise TypeError(f"observe_loss takes a number or a tensor of numbers, not {loss!r}")
        self._sum = self._sum + value
        self._count += 1

    def state_dict(self) -> dict[str, float]:
        """What was added since the last `take`; plain data."""
        return {"sum": float(self._sum), "count": self._count}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on from there."""
        self._sum, self._count = state["sum"], int(state["count"])

    def take(self) -> float | None:
        """Mean since the last call; None if nothing was added."""
        if not self._count:
            return None
        mean = float(self._sum) / self._count
        self._sum, self._count = 0.0, 0
        return mean
