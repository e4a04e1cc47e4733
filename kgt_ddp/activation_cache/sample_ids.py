"""What the processes of one rank know of samples by their ids: which key each has, and in which file its record may be.

Shared memory, without locks: the training process writes, the workers of its loader read. What a worker reads is a hint
that decides whether it decodes (`dataset.CachedDataset`); the training process looks again before it relies on anything
(`arrival`). So a stale or torn entry costs time and no more.

An id goes through: *unknown* -> *known* (its content was hashed once) -> *repeated* (seen again, decoded, with the same
hash). Nothing is skipped before `PROBATION` samples were repeated; afterwards every `CHECK_EVERY`th sample that could be
skipped is decoded all the same. One repeat that differs and ids are dropped for good (`drop`).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kgt_ddp.activation_cache.folder import peek
from kgt_ddp.activation_cache.key import KEY_BYTES
from kgt_ddp.activation_cache.store import Table

logger = logging.getLogger(__name__)

PROBATION = 64
CHECK_EVERY = 64
_NO_KEY = bytes(KEY_BYTES)
_DROPPED, _REPEATED, _CANDIDATES = range(3)
_DECODING, _WAITING = range(2)
_FADING = 1 / 16
DROP_REASONS = {
    1: "a sample is not the same every time (a random transform?)",
    2: "`light` gives something else than the data set beside the input",
    3: "what the model gets is not what the loader yields",
    4: "its loader yields no tensor of inputs by sample, or draws something else than indices",
}


class SampleIds:
    """See the module docstring.

    Args:
        num_samples: of the data set.

    Attributes:
        common: what the keys hold besides the samples (`key.Batch.common`); of the training process only.
    """

    def __init__(self, num_samples: int) -> None:
        self.common: bytes | None = None
        self.num_samples = num_samples
        self._keys = torch.zeros(max(num_samples, 1), KEY_BYTES, dtype=torch.uint8).share_memory_()
        self._numbers = torch.zeros(3, dtype=torch.int64).share_memory_()
        self._seconds = torch.zeros(2, dtype=torch.float64).share_memory_()
        self._file = torch.zeros(16, dtype=torch.uint8).share_memory_()
        self._open: tuple[str, Table | None] = ("", None)
        self._said = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": ("", None)}  # descriptors do not travel

    # ---- training process -------------------------------------------------------------------------------------------

    @property
    def proven(self) -> bool:
        """Whether enough samples were repeated."""
        return int(self._numbers[_REPEATED]) >= PROBATION

    def key(self, sample: int) -> bytes | None:
        found = self._keys[sample].numpy().tobytes()
        return None if found == _NO_KEY else found

    def meet(self, sample: int, key: bytes) -> bool:
        """A decoded sample came; whether its content is what it was before, if it came before."""
        known = self.key(sample)
        if known is None:
            self._keys[sample] = torch.from_numpy(np.frombuffer(key, np.uint8).copy())
        elif known == key:
            self._numbers[_REPEATED] += 1
        else:
            self.drop(1)
        return known is None or known == key

    def num_known(self, samples: Sequence[int]) -> int:
        """How many of these have a key."""
        return int(self._keys[list(samples)].any(1).sum())

    def waited(self, seconds: float) -> None:
        """So long the training waited for a sample of a batch of which all were decoded."""
        self._fade(_WAITING, seconds)

    @property
    def decode_s_per_sample(self) -> float:
        """What a sample that is not decoded saves the training: with workers that keep up with it, nothing."""
        return float(self._seconds.min())

    def use_common(self, common: bytes) -> None:
        """Keys made with anything else in common than this mean nothing from now on."""
        if self.common != common:
            self.common = common
            self.withdraw()
            self._keys.zero_()

    def publish(self, digest: str) -> None:
        """Workers may leave out samples whose records are in this file."""
        self._file.copy_(torch.frombuffer(bytearray.fromhex(digest), dtype=torch.uint8))

    def withdraw(self) -> None:
        """Workers are to decode everything."""
        self._file.zero_()

    def drop(self, reason: int) -> None:
        """Ids are not used any more: an entry of `DROP_REASONS`. Also for workers."""
        self._numbers[_DROPPED] = reason
        self.withdraw()

    @property
    def dropped(self) -> bool:
        """Whether ids are not used any more; the training process says so, once."""
        return bool(self._numbers[_DROPPED])

    def tell(self) -> None:
        """One line, if ids were dropped."""
        if self.dropped and not self._said:
            self._said = True
            why = DROP_REASONS[int(self._numbers[_DROPPED])]
            logger.warning("activation cache: sample ids are not used any more, all samples are decoded: %s", why)

    def _fade(self, which: int, seconds: float) -> None:
        before = float(self._seconds[which])
        self._seconds[which] = before + _FADING * (seconds - before) if before else seconds

    # ---- workers ----------------------------------------------------------------------------------------------------

    def decoded(self, seconds: float, num_workers: int) -> None:
        """A sample was decoded, by one of so many workers. They race for the number; a lost one is one measurement less."""
        self._fade(_DECODING, seconds / max(num_workers, 1))

    def may_skip(self, folder: Path, sample: int) -> bool:
        """Whether this sample's record seems to be there, and it is not this sample's turn to be checked."""
        digest = self._file.numpy().tobytes().hex()
        if self.dropped or not int(digest, 16):
            return False
        if self._open[0] != digest:
            self.close()
            self._open = (digest, peek(folder, digest))
        table, key = self._open[1], self.key(sample)
        if table is None or key is None or not table.has(key):
            return False
        # Workers race for this number; a lost count moves a check to another sample, or has several check at one turn.
        self._numbers[_CANDIDATES] += 1
        return int(self._numbers[_CANDIDATES]) % CHECK_EVERY != 1

    def close(self) -> None:
        """Let go of the file."""
        if self._open[1] is not None:
            self._open[1].close()
        self._open = ("", None)
