"""Weights from where training holds them into a slot of shared memory.

On the CPU: one copy, straight into the mapping, done when `start` returns. On an accelerator: copies on a stream of their
own, which the training stream is told to wait for (the next optimizer step must not overwrite what is still being read).
A CUDA device copies into the slot itself, whose pages are locked at first. Where they cannot be, it copies into pinned staging
memory, and the host from there once `done` finds that finished: a second copy, by training's thread (for BERT-base 0.4 GB).
Either way nobody waits for the device. Written against torch's device-neutral streams; it ran with CUDA only.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kgt_ddp.reference.page_locks import PageLocks

_given_up: list[PageLocks] = []
"""What a device may still be writing to."""


class Transfer:
    """Copies into the slots of one client; one copy under way at a time."""

    def __init__(self) -> None:
        self._locks = PageLocks()
        self._staging: dict[str, Tensor] = {}
        self._pending: dict[str, Tensor] = {}
        self._events: list[torch.Event] = []
        self._sides: dict[torch.device, torch.Stream] = {}

    def start(self, tensors: Mapping[str, Tensor], slot: Mapping[str, Tensor]) -> None:
        """Copy `tensors` into those of the same names in `slot`; the slot may be read once `done` says so."""
        by_device: dict[torch.device, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            by_device.setdefault(tensor.device, {})[name] = tensor
        with torch.no_grad():
            for name, tensor in by_device.pop(torch.device("cpu"), {}).items():
                slot[name].copy_(tensor)
            for device, those in by_device.items():
                direct = self._locks.lock(slot, device)
                self._start_on(device, those, slot if direct else self._staging_for(those))
                if not direct:
                    self._pending.update({name: slot[name] for name in those})

    def done(self) -> bool:
        """Is the last copy complete? Never waits."""
        if not all(event.query() for event in self._events):
            return False
        with torch.no_grad():
            for name, target in self._pending.items():
                target.copy_(self._staging[name])
        self._events, self._pending = [], {}
        return True

    def release(self) -> None:
        """The slots are given up. If a copy is under way they stay locked, and mapped, for good: nobody waits for it."""
        if self.done():
            self._locks.release()
        else:
            _given_up.append(self._locks)
        self._events, self._pending, self._locks = [], {}, PageLocks()

    def _staging_for(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        for name, tensor in tensors.items():
            staging = self._staging.get(name)
            if staging is None or staging.shape != tensor.shape or staging.dtype != tensor.dtype:
                self._staging[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return self._staging

    def _start_on(self, device: torch.device, tensors: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> None:
        if device not in self._sides:  # one for good: a copy that nobody waits for any more ends before the next begins
            self._sides[device] = torch.Stream(device=device)
        side = self._sides[device]
        training = torch.accelerator.current_stream(device)
        side.wait_stream(training)
        with side:
            for name, tensor in tensors.items():
                targets[name].copy_(tensor, non_blocking=True)
        event = side.record_event()
        training.wait_event(event)
        self._events.append(event)
