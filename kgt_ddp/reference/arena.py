"""Anonymous memory that a trainer and a reference share: no names, nothing to unlink, gone with its last descriptor.

A memory file is sealed against shrinking before it is handed over, and the receiver checks the seal and the size before
it maps: without that, a peer that truncates the file kills whoever reads the mapping by SIGBUS.

`Layout` says where in such memory each tensor of a model lies. The trainer writes a snapshot of the weights straight
into the mapping (one copy), the reference reads it from there.
"""

from __future__ import annotations

import ctypes
import fcntl
import math
import mmap
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, Final

import torch
from torch import Tensor, nn

from kgt_ddp.reference.protocol import ProtocolError

ALIGNMENT: Final = 64
MAX_PAYLOAD_BYTES: Final = 8 << 30

# By number: a Python that was built for an old kernel (uv's, for a long time) has no names for them.
_MFD_CLOEXEC, _MFD_ALLOW_SEALING = 1, 2
_F_ADD_SEALS, _F_GET_SEALS = 1033, 1034
_F_SEAL_SHRINK, _F_SEAL_GROW, _F_SEAL_WRITE = 2, 4, 8

_DTYPES: dict[str, torch.dtype] = {
    str(dtype): dtype
    for dtype in (
        torch.float32,
        torch.float64,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    )
}


def memory_file(name: str, num_bytes: int) -> int:
    """A sealed anonymous file of fixed size; the caller owns the descriptor."""
    fd = _anonymous_file(name)
    try:
        os.ftruncate(fd, num_bytes)
        fcntl.fcntl(fd, _F_ADD_SEALS, _F_SEAL_SHRINK | _F_SEAL_GROW)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _anonymous_file(name: str) -> int:
    flags = _MFD_CLOEXEC | _MFD_ALLOW_SEALING
    if hasattr(os, "memfd_create"):
        return os.memfd_create(name, flags)
    fd: int = ctypes.CDLL(None, use_errno=True).memfd_create(name.encode(), flags)
    if fd < 0:
        raise OSError(ctypes.get_errno(), "memfd_create failed")
    return fd


def payload_file(name: str, write: Callable[[BinaryIO], Any]) -> int:
    """A sealed anonymous file with what `write(file)` puts into it; the caller owns the descriptor."""
    fd = _anonymous_file(name)
    try:
        with os.fdopen(os.dup(fd), "wb") as file:
            write(file)
        fcntl.fcntl(fd, _F_ADD_SEALS, _F_SEAL_SHRINK | _F_SEAL_GROW | _F_SEAL_WRITE)
    except BaseException:
        os.close(fd)
        raise
    return fd


def sealed_size(fd: int) -> int:
    """Bytes of a memory file that came from a peer.

    Raises:
        ProtocolError: it is no memory file, may still shrink, or is larger than `MAX_PAYLOAD_BYTES`.
    """
    try:
        seals = fcntl.fcntl(fd, _F_GET_SEALS)
        size = os.fstat(fd).st_size
    except OSError:
        raise ProtocolError("a descriptor that is no anonymous memory") from None
    if not seals & _F_SEAL_SHRINK:
        raise ProtocolError("anonymous memory that its sender may still truncate")
    if size > MAX_PAYLOAD_BYTES:
        raise ProtocolError(f"{size} bytes of anonymous memory exceed {MAX_PAYLOAD_BYTES}")
    return size


def read_payload(fd: int) -> bytes:
    """Content of a payload file from a peer, read from its beginning whatever its file position.

    Raises:
        ProtocolError: see `sealed_size`.
    """
    size = sealed_size(fd)
    parts = []
    offset = 0
    while offset < size:
        part = os.pread(fd, min(size - offset, 1 << 26), offset)
        if not part:
            break
        parts.append(part)
        offset += len(part)
    return b"".join(parts)


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name; one that is registered twice (tied weights) counts once."""
    tensors: dict[str, Tensor] = dict(module.named_parameters())
    tensors.update(module.named_buffers())
    return tensors


@dataclass(frozen=True)
class Layout:
    """Where each tensor lies in a slot: name -> (dtype, shape, offset in bytes). Plain data: it is sent."""

    entries: dict[str, tuple[str, tuple[int, ...], int]]
    num_bytes: int

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Layout:
        """Tensors one after the other, each at a multiple of `ALIGNMENT`.

        Raises:
            ValueError: a tensor of a type that cannot travel, with its name.
        """
        entries = {}
        offset = 0
        for name, tensor in tensors.items():
            if str(tensor.dtype) not in _DTYPES or tensor.layout != torch.strided:
                raise ValueError(f"{name} is {tensor.dtype} {tensor.layout}: a reference cannot hold it")
            entries[name] = (str(tensor.dtype), tuple(tensor.shape), offset)
            offset += -(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT
        return cls(entries, max(offset, ALIGNMENT))

    def fits(self, tensors: Mapping[str, Tensor]) -> bool:
        """Are these the tensors that the layout was made for, by name, type and shape?"""
        return tensors.keys() == self.entries.keys() and all(
            (str(t.dtype), tuple(t.shape)) == self.entries[n][:2] for n, t in tensors.items()
        )

    def map(self, fd: int) -> dict[str, Tensor]:
        """Tensors that live in the memory file `fd`; they keep the mapping alive, `fd` may be closed.

        Raises:
            ProtocolError: the file is not sealed or too small, or the layout points outside of it.
        """
        size = sealed_size(fd)
        if size < self.num_bytes:
            raise ProtocolError(f"a slot of {size} bytes for a layout of {self.num_bytes}")
        memory = mmap.mmap(fd, size)
        views = {}
        for name, (dtype_name, shape, offset) in self.entries.items():
            dtype = _DTYPES.get(dtype_name)
            count = math.prod(shape)
            if dtype is None or min(shape, default=0) < 0 or offset < 0 or offset + count * dtype.itemsize > size:
                raise ProtocolError(f"a layout that puts {name!r} outside of its slot")
            if count == 0:
                views[name] = torch.empty(shape, dtype=dtype)
            else:
                views[name] = torch.frombuffer(memory, dtype=dtype, count=count, offset=offset).view(shape)
        return views
