"""What a reference is told about a model: its structure, once, and the shared memory that its weights will come in.

Kept by the trainer for as long as the model stays the same, so that a reference that is started later can be told again.
"""

from __future__ import annotations

import os
import pickle
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from kgt_ddp.reference import protocol
from kgt_ddp.reference.arena import Layout, memory_file, named_tensors, payload_file
from kgt_ddp.reference.model import pickled_structure, surroundings


@dataclass(frozen=True)
class Offer:
    """One model, the blocks of it that are to be scored, and the slots for its weights."""

    module: nn.Module
    watched: tuple[str, ...]
    layout: Layout
    slots: list[dict[str, Tensor]]
    """By slot: each parameter and buffer, as it lies in shared memory."""
    slot_fds: list[int]
    envelope: dict[str, Any]

    @classmethod
    def of(
        cls, module: nn.Module, watched: Sequence[str], *, lags: Sequence[int], pairing: str, num_slots: int
    ) -> Offer:
        """Read the model's structure and make the slots.

        Raises:
            OSError: there is no shared memory for them.
            Exception: the structure cannot be sent; what pickling a user's classes raises can be anything.
        """
        layout = Layout.of(named_tensors(module))
        envelope = {
            "structure": pickled_structure(module),
            "entries": layout.entries,
            "num_bytes": layout.num_bytes,
            "watched": list(watched),
            "lags": list(lags),
            "pairing": pairing,
            "surroundings": surroundings(),
        }
        fds: list[int] = []
        try:
            for _ in range(num_slots):
                fds.append(memory_file("kgtrun-weights", layout.num_bytes))
            slots = [layout.map(fd) for fd in fds]
        except OSError as error:
            protocol.close_all(fds)
            raise OSError(f"no shared memory for a reference: {error}") from error
        except BaseException:
            protocol.close_all(fds)
            raise
        return cls(module, tuple(watched), layout, slots, fds, envelope)

    def send(self, connection: socket.socket, generation: int) -> None:
        """Send it over a new connection.

        Raises:
            OSError: the reference has gone, or takes nothing.
        """
        payload = payload_file("kgtrun-model", lambda file: pickle.dump(self.envelope, file))
        header = protocol.encode("model", version=protocol.VERSION, generation=generation, num_slots=len(self.slots))
        try:
            if not protocol.send(connection, header, [payload, *self.slot_fds]):
                raise OSError("the socket is full")
        finally:
            os.close(payload)

    def close(self) -> None:
        """Close the files; the memory goes with the last that maps it: this offer, or a reference that still reads."""
        protocol.close_all(self.slot_fds)
