"""Which optimizer step is this, and may a mask be applied now.

The clock counts *finished synchronised backwards followed by an optimizer step*: not forwards (validation, several forwards
a step), not backwards (accumulation), not optimizer steps alone (a GAN's other optimizer). Every rank of a data-parallel
job passes these points in the same order, so the count is equal everywhere without communication.

States: *closed* -> (`gradients_reduced`) -> *reduced* -> (`optimizer_stepped`) -> *open* -> (`forward_begins`) -> closed.
The first training forward in state *open* is a boundary: the one moment at which no gradient of this step exists yet.
A boundary is withheld

- while paused (inside `join()`, where ranks take different numbers of steps), and
- when a graph recorded before the last optimizer step waits for its backward: a change of buckets now would leave its
  gradients unreduced. Whether a graph waits follows from the order of calls, which is the same on all ranks; liveness of
  Python objects is not. A graph that nobody has used for a whole step counts as thrown away.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch


class _Graph:
    """One grad-enabled forward: has its backward begun?"""

    __slots__ = ("used",)

    def __init__(self) -> None:
        self.used = False

    def on_backward(self, *_: object) -> None:
        self.used = True


class StepClock:
    """See the module docstring. `step` is the number of finished steps."""

    def __init__(self, step: int = 0) -> None:
        self.step = step
        self.paused = False
        self._reduced = False
        self._open = True
        self._graphs: list[_Graph] = []
        self._earlier_graphs: list[_Graph] = []

    def gradients_reduced(self) -> None:
        """A synchronised backward has handed over its last bucket."""
        self._reduced = not self.paused

    def optimizer_stepped(self) -> bool:
        """An optimizer that owns parameters of the model has stepped; returns whether the clock ticked."""
        if not self._reduced or self.paused:
            return False
        self._reduced = False
        self._open = True
        self.step += 1
        self._earlier_graphs, self._graphs = self._graphs, []
        return True

    def forward_begins(self) -> bool:
        """A training forward with gradients on begins; returns whether this is a boundary."""
        if self.paused or not self._open:
            return False
        self._open = False
        return all(graph.used for graph in self._earlier_graphs)

    def forward_ended(self, tensors: Iterable[torch.Tensor]) -> None:
        """Watch the graph behind a forward's outputs until its backward begins."""
        graph = _Graph()
        attached = False
        for tensor in tensors:
            if tensor.grad_fn is not None:
                tensor.grad_fn.register_prehook(graph.on_backward)
                attached = True
        if attached:
            self._graphs.append(graph)
