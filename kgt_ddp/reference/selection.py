"""Which tensors a snapshot of the weights has to carry.

All of them, but for those of blocks that do not move any more, once they have arrived. "Arrived" is told by where a
tensor lies and by torch's count of the writes to it: whoever writes into a frozen block after all has it sent again. Writes
through `.data` are not counted, so now and then all are sent.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Final

from torch import Tensor

EVERYTHING: Final = 8
"""One choice in so many."""

Stamp = tuple[int, int]
"""Where a tensor lies, and torch's count of the writes to it."""


class Selection:
    """What one connection has been sent for good."""

    def __init__(self) -> None:
        self._settled: dict[str, Stamp] = {}
        """Tensors sent since the caller called them unchanged, as they were then."""
        self._num_choices = 0

    def choose(self, tensors: Mapping[str, Tensor], unchanged: Collection[str]) -> list[str]:
        """Names of what must be sent now, in the order of `tensors`.

        Args:
            unchanged: names of blocks whose weights do not move any more.
        """
        self._num_choices += 1
        known = self._settled if self._num_choices % EVERYTHING else {}
        still = {name: _stamp(tensor) for name, tensor in tensors.items() if _belongs(name, unchanged)}
        names = [name for name in tensors if name not in still or known.get(name) != still[name]]
        self._settled = still
        return names


def runs_of_positions(names: Collection[str], all_names: Collection[str]) -> list[list[int]]:
    """Names as runs of their positions, [first, end): one pair for all behind a frozen prefix, whatever its length."""
    runs: list[list[int]] = []
    wanted = set(names)
    for index, name in enumerate(all_names):
        if name not in wanted:
            continue
        if runs and runs[-1][1] == index:
            runs[-1][1] = index + 1
        else:
            runs.append([index, index + 1])
    return runs


def _belongs(name: str, blocks: Collection[str]) -> bool:
    return any(name == block or name.startswith(block + ".") for block in blocks)


def _stamp(tensor: Tensor) -> Stamp:
    return tensor.data_ptr(), tensor._version
