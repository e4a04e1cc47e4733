"""Locks the pages of memory that is there already, so that a CUDA device copies into it by itself, with no thread waiting.

Torch locks what it allocates itself (`pin_memory`); a slot is shared memory that it did not allocate. Elsewhere, or where
the driver refuses (a limit of a container's, memory of another kind), the caller must go another way.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import suppress

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


class PageLocks:
    """Slots whose pages are locked; each is asked for once."""

    def __init__(self) -> None:
        self._asked: dict[int, tuple[Mapping[str, Tensor], int | None]] = {}
        """By id: the slot (kept, since memory must not go while it is locked) and its address; None: refused."""

    def lock(self, slot: Mapping[str, Tensor], device: torch.device) -> bool:
        """May `device` copy into the tensors of `slot`, which lie one after the other?"""
        if id(slot) not in self._asked:
            self._asked[id(slot)] = slot, _lock(slot) if device.type == "cuda" else None
        return self._asked[id(slot)][1] is not None

    def release(self) -> None:
        """Unlock all. No copy into them may be under way."""
        for _, address in self._asked.values():
            if address is not None:
                with suppress(RuntimeError):  # the driver is being shut down
                    torch.cuda.cudart().cudaHostUnregister(address)
        self._asked = {}


def _lock(slot: Mapping[str, Tensor]) -> int | None:
    filled = [tensor for tensor in slot.values() if tensor.numel()]
    if not filled:
        return None
    start = min(tensor.data_ptr() for tensor in filled)
    stop = max(tensor.data_ptr() + tensor.nbytes for tensor in filled)
    cudart = torch.cuda.cudart()
    error = cudart.cudaHostRegister(start, stop - start, 0)
    if error == cudart.cudaError.success:
        return start
    logger.debug("no locked pages for a slot of %d bytes: %s", stop - start, cudart.cudaGetErrorString(error))
    with suppress(RuntimeError):  # the next kernel would be blamed for it
        torch.zeros(1, device="cuda").add_(1)
    return None
