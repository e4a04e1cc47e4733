"""Messages between a trainer and a reference process.

One message is one packet of an AF_UNIX SOCK_SEQPACKET socket: a JSON object of at most `MAX_HEADER_BYTES`, and up to
`MAX_FDS` descriptors of anonymous memory (SCM_RIGHTS) that hold what is bulky. Nothing here blocks; nothing here
unpickles.

    trainer → reference
      model     fds: payload, slot 0, slot 1, …   what to run, what to watch, where weights will be
      submit    fds: [samples] [similarities]     work for one step; `slot` says where its weights are, or is null
    reference → trainer
      free      `slot`                            its weights were taken; it may be written again
      score     one lag of one step, see `Score`
      done      `step`                            nothing more comes for this submit
      error     `text`                            this submit, or this model, could not be scored

A peer that sends anything else, or belongs to another user, gets its connection closed and nothing more.
"""

from __future__ import annotations

import array
import json
import os
import socket
import struct
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

VERSION: Final = 2
MAX_HEADER_BYTES: Final = 64 * 1024
MAX_FDS: Final = 8
SOCKET_NAME: Final = "ref{index}.sock"
MAX_PATH_BYTES: Final = 107
"""Linux's limit for the address of a Unix socket, less its closing zero."""

_INT = (int,)
_FIELDS: dict[str, dict[str, tuple[type, ...]]] = {
    "model": {"version": _INT, "generation": _INT, "num_slots": _INT},
    "submit": {
        "step": _INT,
        "generation": _INT,
        "slot": (int, type(None)),
        "names": (list, type(None)),
        "samples": (bool,),
        "similarities": (bool,),
    },
    "free": {"slot": _INT},
    "score": {
        "step": _INT,
        "generation": _INT,
        "pairing": (str,),
        "precision": (str,),
        "lag_steps": _INT,
        "values": (list,),
        "floors": (list,),
        "cost_s": (float, int),
        "cpu_s": (float, int),
    },
    "done": {"step": _INT, "generation": _INT, "cost_s": (float, int), "cpu_s": (float, int)},
    "error": {"text": (str,)},
}


class ProtocolError(Exception):
    """The peer sent something that is not a message of this protocol. Ends its connection, never a process."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """What a reference found about one step and one distance."""

    step: int
    """Clock step of the newer of the two compared versions."""
    generation: int
    """Mask generation under which it was submitted."""
    pairing: str
    """"probe", "fresh", "live" or "eval": what was compared with what, see `pairing`."""
    precision: str
    """Arithmetic that was really used: "bf16", "bf16-autocast" or "fp32"."""
    lag_steps: int
    """Steps between the two versions: exactly one of the lags that were asked for."""
    values: dict[str, float | None]
    """Plasticity per watched block, in the order watched; None is "don't know"."""
    floors: dict[str, float | None]
    """Plasticity per block between the snapshot and itself, this precision against fp32; the latest one measured. A
    value near it is noise. None until it has been measured."""
    cost_s: float
    """Seconds that passed in the reference over this submit, all its lags together: the least sensible interval."""
    cpu_s: float
    """Seconds of computing in it: what the answer cost, also where cores are shared and passing time says little."""


def socket_path(directory: str | os.PathLike[str], index: int) -> Path:
    """Address of reference `index`.

    Raises:
        ValueError: it would be longer than a Unix socket's address may be.
    """
    path = Path(directory) / SOCKET_NAME.format(index=index)
    if len(os.fsencode(path)) > MAX_PATH_BYTES:
        raise ValueError(f"{path} is longer than {MAX_PATH_BYTES} bytes: choose a shorter directory for sockets")
    return path


def peer_uid(connection: socket.socket) -> int:
    """User id of the process at the other end, as the kernel knows it."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return struct.unpack("3i", credentials)[1]


def encode(kind: str, **fields: Any) -> bytes:
    """A header as bytes.

    Raises:
        ProtocolError: it does not fit; the caller's data is at fault (thousands of blocks).
    """
    data = json.dumps({"type": kind, **fields}, allow_nan=False).encode()
    if len(data) > MAX_HEADER_BYTES:
        raise ProtocolError(f"a {kind!r} message of {len(data)} bytes exceeds {MAX_HEADER_BYTES}")
    return data


def decode(data: bytes) -> dict[str, Any]:
    """A header from bytes, its type known and every field present and of its type.

    Raises:
        ProtocolError: anything else. Never another exception, whatever the bytes are.
    """
    try:
        message = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"not a JSON header ({type(error).__name__})") from None
    if not isinstance(message, dict) or not isinstance(message.get("type"), str) or message["type"] not in _FIELDS:
        raise ProtocolError("a header of unknown type")
    for name, types in _FIELDS[message["type"]].items():
        value = message.get(name)
        if name not in message or not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise ProtocolError(f"{message['type']!r} message without a proper {name!r}")
        if isinstance(value, int) and not -1 <= value < 2**62:
            raise ProtocolError(f"{message['type']!r} message with {name}={value}")
    return message


def send(connection: socket.socket, data: bytes, fds: Sequence[int] = ()) -> bool:
    """Send one packet without waiting. False: the socket's buffer is full, nothing was sent.

    Raises:
        OSError: the connection is gone.
    """
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    try:
        connection.sendmsg([data], ancillary, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
    except (BlockingIOError, InterruptedError):
        return False
    return True


def receive(connection: socket.socket) -> tuple[bytes, list[int]] | None:
    """Next packet and its descriptors (the caller owns them, close-on-exec); None: nothing there yet.

    Raises:
        EOFError: the peer has closed.
        ProtocolError: a packet too long, or with too many descriptors; those that came are closed.
        OSError: the connection is gone.
    """
    room = socket.CMSG_SPACE(MAX_FDS * array.array("i").itemsize)
    try:
        data, ancillary, flags, _ = connection.recvmsg(
            MAX_HEADER_BYTES, room, socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
        )
    except (BlockingIOError, InterruptedError):
        return None
    fds = array.array("i")
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
    if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
        close_all(fds)
        raise ProtocolError("a packet longer than any message")
    if not data:
        close_all(fds)
        raise EOFError
    return data, list(fds)


def close_all(fds: Sequence[int] | array.array[int]) -> None:
    """Close descriptors that nobody wants."""
    for fd in fds:
        with suppress(OSError):
            os.close(fd)


def score_from(message: Mapping[str, Any], watched: Sequence[str]) -> Score:
    """A `Score` from a decoded "score" message, its lists in the order of `watched`.

    Raises:
        ProtocolError: the lists are not of numbers or null, or not one per watched block.
    """

    def per_block(field: str) -> dict[str, float | None]:
        values = message[field]
        if len(values) != len(watched) or not all(
            v is None or (isinstance(v, (int, float)) and not isinstance(v, bool)) for v in values
        ):
            raise ProtocolError(f"a score whose {field!r} do not fit {len(watched)} blocks")
        return dict(zip(watched, values, strict=True))

    return Score(
        step=message["step"],
        generation=message["generation"],
        pairing=message["pairing"],
        precision=message["precision"],
        lag_steps=message["lag_steps"],
        values=per_block("values"),
        floors=per_block("floors"),
        cost_s=float(message["cost_s"]),
        cpu_s=float(message["cpu_s"]),
    )
