"""A data set whose samples need not be decoded while the cache has what the frozen blocks make of them.

    data = kgt_ddp.CachedDataset(ImageFolder(...), light=lambda i: (None, labels[i]))
    loader = kgt_ddp.CachedLoader(DataLoader(data, batch_size=64, shuffle=True, num_workers=4), model)
    for images, labels in loader:
        loss = criterion(model(images), labels)

What the user promises: sample i is always the same (no random transform), the loop hands the input to the model as the
loader yields it, and uses it for nothing else. The first two are checked, at first and then all the time (`sample_ids`,
`arrival`). In place of an input that was left out stands a *stand-in* of its shape and dtype: NaN (zeros, where there is
no NaN), and a mark with the sample's id in its first bytes. The training process puts the input back wherever it is needed.

Limits: the input is one dense CPU tensor of one shape for all samples, of at least 32 bytes. Anything else is decoded.
"""

from __future__ import annotations

import copy
import struct
import time
from collections.abc import Callable, Sized
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import xxhash
from torch.utils._pytree import tree_flatten
from torch.utils.data import Dataset, get_worker_info

from kgt_ddp.activation_cache.sample_ids import SampleIds

_MARK = struct.Struct("<16sQ8s")
_MAGIC = xxhash.xxh3_128_digest(b"kgtrun: a sample that was left out")


class CachedDataset(Dataset[Any]):
    """See the module docstring. Used by anything but a `CachedLoader` it is the data set inside.

    Args:
        dataset: with indices and a length.
        light: `light(i)` is sample i with anything in the input's place (in a dict the input may be missing). It is to
            be cheap: labels from a list, not from the sample's file.
        input: where the input stands in a sample: a position, a key of a dict, or None if the sample is the input.

    Raises:
        ValueError: the data set has no length.
    """

    def __init__(self, dataset: Any, light: Callable[[int], Any], *, input: int | str | None = 0) -> None:
        if not isinstance(dataset, Sized):
            raise ValueError("CachedDataset needs a data set with a length: its samples are known by their indices")
        self.dataset: Any = dataset
        self.input = input
        self.ids = SampleIds(len(self.dataset))
        self._light = light
        self._folder: Path | None = None
        self._like: torch.Tensor | None = None

    def bound(self, folder: Path) -> CachedDataset:
        """The same for a loader that puts inputs back where they are needed; `folder`: of the cache's files."""
        other = copy.copy(self)
        other._folder = folder
        return other

    @property
    def is_bound(self) -> bool:
        """Whether samples may be left out here."""
        return self._folder is not None

    def __len__(self) -> int:
        return self.ids.num_samples

    def __getitem__(self, index: Any) -> Any:
        if self._folder is None or not self.has_id(index):
            return self.dataset[index]
        if self._like is not None and self.ids.may_skip(self._folder, int(index)):
            return self.replaced(self._light(int(index)), stand_in(self._like, int(index)))
        started = time.perf_counter()
        sample = self.dataset[index]
        worker = get_worker_info()
        self.ids.decoded(time.perf_counter() - started, worker.num_workers if worker is not None else 0)
        self._look_at(sample, int(index))
        return sample

    def has_id(self, index: Any) -> bool:
        return isinstance(index, (int, np.integer)) and 0 <= int(index) < len(self)

    def input_of(self, sample: Any) -> Any:
        """The input in a sample, or in a batch."""
        return sample if self.input is None else sample[self.input]

    def replaced(self, sample: Any, value: torch.Tensor) -> Any:
        """The sample with another input."""
        if self.input is None:
            return value
        if isinstance(sample, tuple):
            parts = list(sample)
            parts[cast(int, self.input)] = value
            return type(sample)(*parts) if hasattr(sample, "_fields") else tuple(parts)
        other = copy.copy(sample)
        other[self.input] = value
        return other

    def _look_at(self, sample: Any, index: int) -> None:
        """Learn what stand-ins look like; while ids are used, compare what `light` gives, too."""
        value = self.input_of(sample)
        if not isinstance(value, torch.Tensor) or not _can_be_marked(value):
            self._like = None
            return
        # A collate function may want the keys of a dict in their order: what is compared is content, by position.
        if not self.ids.dropped and not _same(sample, self.replaced(self._light(index), value)):
            self.ids.drop(2)
        self._like = torch.empty_like(value, memory_format=torch.contiguous_format)


def stand_in(like: torch.Tensor, sample: int) -> torch.Tensor:
    """What stands for an input that was left out."""
    made = torch.full_like(like, float("nan")) if like.is_floating_point() else torch.zeros_like(like)
    mark = _MARK.pack(_MAGIC, sample, xxhash.xxh3_64_digest(sample.to_bytes(8, "little")))
    made.reshape(-1).view(torch.uint8)[: _MARK.size] = torch.frombuffer(bytearray(mark), dtype=torch.uint8)
    return made


def marked(batch: torch.Tensor) -> dict[int, int]:
    """Which rows of a batch are stand-ins: row -> sample."""
    if batch.dim() < 2 or batch.layout != torch.strided or batch[0].numel() * batch.element_size() < _MARK.size:
        return {}
    num = -(-_MARK.size // batch.element_size())
    heads = batch.detach().reshape(len(batch), -1)[:, :num].contiguous().cpu().view(torch.uint8).numpy()
    found = {}
    for row, head in enumerate(heads):
        magic, sample, check = _MARK.unpack(head[: _MARK.size].tobytes())
        if magic == _MAGIC and check == xxhash.xxh3_64_digest(int(sample).to_bytes(8, "little")):
            found[row] = sample
    return found


def _can_be_marked(tensor: torch.Tensor) -> bool:
    dense = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_complex()
    return dense and tensor.dim() > 0 and tensor.numel() * tensor.element_size() >= _MARK.size


def _same(a: Any, b: Any) -> bool:
    here, there = tree_flatten(_sorted(a)), tree_flatten(_sorted(b))
    return here[1] == there[1] and all(map(_equal, here[0], there[0]))


def _sorted(sample: Any) -> Any:
    return {k: sample[k] for k in sorted(sample, key=str)} if isinstance(sample, dict) else sample


def _equal(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    return bool(np.array_equal(a, b))
