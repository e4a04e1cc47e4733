"""Which shape will an output have? Inferred from the shapes seen so far, so that a batch of a new size need not run first.

Each size of an output is explained as a constant or as a multiple of one of the sizes of the model's inputs (the batch, the
length of the padded text). Every observation strikes out explanations that do not hold. A new batch whose remaining
explanations disagree is not predicted: the caller computes it and shows the result, which decides. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence

_MEMORY = 64

_CONSTANT = -1
Explanation = tuple[int, int]
"""(index of an input size, factor), or (`_CONSTANT`, value)."""


class ShapeRule:
    """The shape of one output as a function of all input sizes."""

    def __init__(self) -> None:
        self._seen: dict[tuple[int, ...], tuple[int, ...]] = {}
        self._explanations: list[set[Explanation]] | None = None

    def observe(self, dims: Sequence[int], shape: Sequence[int]) -> None:
        """Inputs of sizes `dims` gave this shape."""
        possible = [_explanations(dims, size) for size in shape]
        if self._explanations is None:
            self._explanations = possible
        elif len(self._explanations) != len(possible):
            self._explanations = [set()]
        else:
            self._explanations = [a & b for a, b in zip(self._explanations, possible, strict=True)]
        if len(self._seen) >= _MEMORY:
            self._seen.pop(next(iter(self._seen)))
        self._seen[tuple(dims)] = tuple(shape)

    def predict(self, dims: Sequence[int]) -> tuple[int, ...] | None:
        """The shape for these inputs; None if it cannot be told."""
        seen = self._seen.get(tuple(dims))
        if seen is not None or self._explanations is None:
            return seen
        shape = []
        for possible in self._explanations:
            values = {f if i == _CONSTANT else (dims[i] * f if i < len(dims) else -1) for i, f in possible}
            if len(values) != 1:
                return None
            shape.append(values.pop())
        return tuple(shape)


def _explanations(dims: Sequence[int], size: int) -> set[Explanation]:
    found = {(_CONSTANT, size)}
    return found | {(i, size // d) for i, d in enumerate(dims) if d and size and size % d == 0}
