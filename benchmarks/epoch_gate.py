"""Runs a training script whose ranks wait at the start of every epoch until they are told to go on.

    torchrun --nproc-per-node 2 benchmarks/epoch_gate.py train.py --its --arguments

A script announces its epochs by itself: every rank calls `DistributedSampler.set_epoch`. There, and once more when the
script has ended, this rank says over a socket where it is, and waits for a line in answer. All ranks stand at the same
place then, no collective is under way between them, and the job can be stopped for any time without a timeout. The
script needs no change; what it measures with a clock of its own includes the waiting.

The socket's name, one of Linux without a file, comes in `EPOCH_GATE`; without the variable the script runs as ever.
`benchmarks.turns` is the other end.
"""

from __future__ import annotations

import json
import os
import runpy
import socket
import sys

ADDRESS = "EPOCH_GATE"
END = "end"
"""Place of a rank whose script has ended."""


class Gate:
    """This rank's line to whoever gives the turns."""

    def __init__(self, name: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.connect(f"\0{name}")
        self._last: int | str | None = None

    def wait(self, place: int | str) -> None:
        """Say that this rank begins epoch `place` (or is at its end); return when told to. A second sampler of the same
        epoch passes.

        Raises:
            SystemExit: the other end is gone.
        """
        if place == self._last:
            return
        self._last = place
        here = {"rank": int(os.environ["RANK"]), "world_size": int(os.environ["WORLD_SIZE"]), "place": place}
        try:
            self._socket.sendall(json.dumps(here).encode() + b"\n")
            answer = self._socket.recv(16)
        except OSError:
            answer = b""
        if not answer:
            raise SystemExit("the benchmark that gives the turns is gone")


def gate_samplers(gate: Gate) -> None:
    """From now on `set_epoch` of every distributed sampler waits for the turn first."""
    from torch.utils.data import DistributedSampler

    set_epoch = DistributedSampler.set_epoch

    def waiting(self: DistributedSampler, epoch: int) -> None:
        gate.wait(epoch)
        set_epoch(self, epoch)

    DistributedSampler.set_epoch = waiting  # type: ignore[method-assign]


def main() -> None:
    name = os.environ.pop(ADDRESS, None)
    script, sys.argv[:] = sys.argv[1], sys.argv[1:]
    sys.path[0] = os.path.dirname(os.path.abspath(script))  # as Python does for a script; ours must not be found
    gate = Gate(name) if name else None
    if gate:
        gate_samplers(gate)
    runpy.run_path(script, run_name="__main__")
    if gate:
        gate.wait(END)


if __name__ == "__main__":
    main()
