"""Which optimizer step is this, is it a boundary, and does a graph wait for its backward.

The clock counts *finished synchronised backwards followed by an optimizer step*: not forwards (validation, several forwards
a step), not backwards (accumulation), not optimizer steps alone (a GAN's other optimizer). Every rank of a data-parallel
job passes these points in the same order, so the count is equal everywhere without communication.

States: *closed* -> (`gradients_reduced`) -> *reduced* -> (`optimizer_stepped`) -> *open* -> (`forward_begins`) -> closed.
The first training forward in state *open* is a boundary: the one moment at which no gradient of this step exists yet.
There is none while paused (inside `join()`, where ranks take different numbers of steps).

No mask may be applied where a graph recorded before the last optimizer step waits for its backward: a change of buckets would
leave its gradients unreduced. Each rank has its own answer to that (one may have skipped the backward of a bad batch, or made
a forward that the others did not), so it decides nothing here: `agreement` asks all. A graph is forgotten with its last
reference, and counts as thrown away when nobody has used it for a whole step.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch


class _Graph:
    """One grad-enabled forward: has its backward begun? Lives as long as a node of its graph, whose hook alone holds it."""

    __slots__ = ("__weakref__", "used")

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
        self._graphs: list[weakref.ref[_Graph]] = []
        self._earlier_graphs: list[weakref.ref[_Graph]] = []

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
        return True

    @property
    def graph_waits(self) -> bool:
        """Whether a graph from before the last optimizer step may still have its backward; this rank's own answer."""
        return any(graph is not None and not graph.used for graph in (found() for found in self._earlier_graphs))

    def forward_ended(self, tensors: Iterable[torch.Tensor]) -> None:
        """Watch the graph behind a forward's outputs until its backward begins."""
        graph = _Graph()
        attached = False
        for tensor in tensors:
            if tensor.grad_fn is not None:
                tensor.grad_fn.register_prehook(graph.on_backward)
                attached = True
        if attached:
            self._graphs.append(weakref.ref(graph))
