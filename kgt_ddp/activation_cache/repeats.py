"""Do samples come again? Watched from the first step, so that it is known when something freezes.

A cache that is opened over augmented data hashes and writes for an epoch before it can tell. Whether samples repeat can be
seen long before, and cheaply: a few elements of each sample as it enters the model, and of those only every `ONE_IN`th
(chosen by content, so that the same samples are chosen in every epoch), are enough. What comes out is a hint: the gate
decides with it whether to try at all, and how long.

Not watched: tensors on a device, which would have to be waited for. Then nothing is known, as without a watch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_leaves

ONE_IN = 16
_RECENT = 512
"""Chosen samples over which the share of repeats is taken; `ONE_IN` times as many have passed."""
_ONSET = 32
"""Chosen samples among which enough have to come again for a new epoch to have begun."""
_TOKENS = 16
_ELEMENTS = 64
_MIX = np.uint64(0x9E3779B97F4A7C15)
_ODD = np.random.default_rng(0).integers(0, 2**63, 4096, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
"""The same in all processes; arguments with more elements a sample than this use some of them twice."""


class RepeatWatch:
    """See the module.

    Args:
        world_size: ranks among which each epoch's samples are dealt anew: a rank sees that share of its own again.
        most: chosen samples that are remembered, about 100 bytes each.
    """

    def __init__(self, world_size: int = 1, *, most: int = 1_000_000) -> None:
        self.num_samples = 0
        """Samples that passed so far."""
        self._least_share = 1 / (4 * world_size)
        self._most = most
        self._last: dict[int, int] = {}
        self._recent: deque[bool] = deque(maxlen=_RECENT)
        self._onset: deque[tuple[int, bool]] = deque(maxlen=_ONSET)
        self.epoch: int | None = None
        """Samples of this rank that passed before the first of them came again: its part of an epoch; None until then."""
        self._num_again = self._distances = 0

    def note(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """A training batch is about to enter the model."""
        marks = _marks([*tree_leaves(args), *tree_leaves(kwargs)])
        if marks is None:
            return
        for mark in marks[marks % np.uint64(ONE_IN) == 0].tolist():
            before = self._last.get(mark)
            self._recent.append(before is not None)
            self._look_for_onset(before is not None)
            if before is not None:
                self._num_again += 1
                self._distances += self.num_samples - before
            if before is not None or len(self._last) < self._most:
                self._last[mark] = self.num_samples
        self.num_samples += len(marks)

    def _look_for_onset(self, again: bool) -> None:
        if self.epoch is not None:
            return
        self._onset.append((self.num_samples, again))
        came_again = [at for at, one in self._onset if one]
        if len(came_again) >= max(self._least_share * _ONSET, 3):  # a few twins in the data are no epoch
            self.epoch = came_again[0]

    @property
    def period(self) -> int | None:
        """Samples of this rank from one coming of a sample to the next, in the mean; None while none came again."""
        return self._distances // self._num_again if self._num_again else None

    @property
    def share(self) -> float:
        """Share of the latest samples that had come before."""
        return sum(self._recent) / len(self._recent) if self._recent else 0.0

    def in_vain(self, patience: int) -> bool:
        """Whether so many samples passed, and those that came last had, but for chance, not come before."""
        return self.num_samples >= patience and bool(self._recent) and self.share < self._least_share


def _marks(leaves: list[Any]) -> np.ndarray | None:
    """(batch,) numbers that tell samples apart, or None where there is nothing to go by without waiting."""
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.dim() > 1]
    if not tensors or any(t.device.type != "cpu" or t.layout != torch.strided or t.is_quantized for t in tensors):
        return None
    size = len(tensors[0])
    parts = [_some(t.detach()) for t in tensors if len(t) == size and t.numel()]
    if not size or not parts:
        return None
    words = np.concatenate([part.reshape(size, -1).view(np.uint32) for part in parts], axis=1).astype(np.uint64)
    sums = (words * np.resize(_ODD, words.shape[1])).sum(axis=1)  # modulo 2**64
    return ((sums ^ (sums >> np.uint64(32))) * _MIX) >> np.uint64(16)


def _some(tensor: torch.Tensor) -> np.ndarray:
    """A few elements of each sample in 32 bits: of text its first tokens, as padding stands behind; else evenly spread."""
    if tensor.dim() == 2 and not tensor.is_floating_point():
        chosen = tensor[:, :_TOKENS]
    else:
        rows = tensor.reshape(len(tensor), -1) if tensor.is_contiguous() else tensor.flatten(1)
        chosen = rows[:, :: max(rows.shape[1] // _ELEMENTS, 1)]
    as_32_bits = torch.float32 if tensor.is_floating_point() else torch.int32
    return chosen.to(as_32_bits).contiguous().numpy()
