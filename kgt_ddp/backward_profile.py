"""How long the backward of each block takes: what a step would save if the block were frozen.

For a few early steps each block notes when the last of its gradients was accumulated; blocks come from the last to the
first, so the difference to the block behind it is its share. On CUDA the notes are events on the stream, read when the
profile is taken. Afterwards the hooks are gone.

The measure is that of the backward alone: the optimizer's and the traffic's share are not in it, so it promises less than
freezing saves.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from kgt_ddp.blocks import Blocks

STEPS = 4
SKIPPED = 1
"""First steps allocate and compile: they tell nothing."""


class BackwardProfile:
    """Watches the backward of `blocks` until enough steps are seen; `block_seconds` is None until then."""

    def __init__(self, blocks: Blocks) -> None:
        self.block_seconds: tuple[float, ...] | None = None
        self._num_blocks = len(blocks)
        self._marks: dict[int, Any] = {}
        self._steps: list[dict[int, Any]] = []
        self._handles: list[RemovableHandle] = []
        for index, block in enumerate(blocks.blocks):
            for _, parameter in block.parameters:
                if parameter.requires_grad:
                    self._handles.append(parameter.register_post_accumulate_grad_hook(self._marker(index)))

    def _marker(self, index: int) -> Any:
        def mark(parameter: torch.Tensor) -> None:
            self._marks[index] = _now(parameter)

        return mark

    def step_ended(self) -> None:
        """An optimizer step is done; after the last one needed the profile is taken and the hooks removed."""
        if not self._handles:
            return
        self._steps.append(self._marks)
        self._marks = {}
        if len(self._steps) < STEPS + SKIPPED:
            return
        self.close()
        rows = [self._durations(marks) for marks in self._steps[SKIPPED:]]
        self.block_seconds = tuple(statistics.median(column) for column in zip(*rows, strict=True))
        self._steps = []

    def _durations(self, marks: dict[int, Any]) -> list[float]:
        """Seconds a block; 0 for the last one, where nothing is behind it to measure from, and for one without mark."""
        seconds = [0.0] * self._num_blocks
        order = sorted(marks, reverse=True)
        for behind, block in zip(order, order[1:], strict=False):
            seconds[block] = max(_elapsed(marks[behind], marks[block]), 0.0)
        return seconds

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


def _now(parameter: torch.Tensor) -> Any:
    if parameter.device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _elapsed(start: Any, end: Any) -> float:
    if isinstance(start, float):
        return end - start
    end.synchronize()
    return start.elapsed_time(end) / 1000.0
