"""One cache file: a hash table on disk that many processes read and write at once, without locks.

The file is its own index. After a header of 4 KiB come slots of equal size; the slot of a key is its hash modulo their
number, or one of the few behind it. A slot is an entry (key, part, length, check) followed by the bytes. A record longer
than a slot is spread over several parts, each with a home of its own.

The check is a hash of the bytes, seeded with the file's digest, the key, the part and the length. A record that was torn
by a kill, overwritten by another rank while it was read, damaged on the disk or copied from another file does not pass it
and is a miss. So nothing needs to be locked, synced or repaired.

When all slots of a key's neighbourhood are taken, most new records are given up and one in sixteen replaces an old one:
with a data set larger than the budget, read in cycles, replacing always would lose each record just before its next use.
A record of several parts replaces none, and is written only if all its parts have a place: parts of records that are not whole
would take room for ever.

Errors: `get` never raises. `put` raises `OSError` (disk full, file-size limit, read-only file); the caller stops writing.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import struct
import threading
import zlib
from collections.abc import Container, Iterator, Sequence
from itertools import count

import xxhash

HEADER_BYTES = 4096
MAGIC = b"kgtrun activation cache 1\n"
NUM_PROBES = 4
REPLACE_ONE_IN = 16

_ENTRY = struct.Struct("<16sQIHH")
_ENTRY_MAGIC = 0x6B67
_NO_KEY = bytes(16)
_PAGE = 4096


class ForeignFileError(Exception):
    """The file is not a cache of this digest and is left alone; the text says what it is."""


def stride_of(slot_bytes: int) -> int:
    """Bytes from one slot to the next: whole pages for large slots, so that neighbours do not share one."""
    raw = _ENTRY.size + slot_bytes
    unit = _PAGE if raw >= 2 * _PAGE else 64
    return -(-raw // unit) * unit


def header(digest: str, slot_bytes: int, num_slots: int) -> bytes:
    """The first 4 KiB of a file."""
    fields = {"digest": digest, "slot_bytes": slot_bytes, "num_slots": num_slots}
    body = MAGIC + json.dumps(fields).encode() + b"\n"
    return (body + _crc(body) + b"\n").ljust(HEADER_BYTES, b"\0")


def _crc(data: bytes) -> bytes:
    return f"{zlib.crc32(data):08x}".encode()


def read_header(data: bytes) -> dict[str, int | str]:
    """What the first bytes of a file say.

    Raises:
        ForeignFileError: they are not those of a cache file.
    """
    lines = data[:HEADER_BYTES].rstrip(b"\0").split(b"\n")
    if len(lines) < 3 or lines[0] + b"\n" != MAGIC:
        raise ForeignFileError("it is not a cache file of this version of kgtrun")
    if _crc(MAGIC + lines[1] + b"\n") != lines[2]:
        raise ForeignFileError("its header is damaged")
    return json.loads(lines[1])


class Table:
    """An open cache file.

    Args:
        fd: read (and written) with positions only; closed by `close`.
        digest: what the file belongs to; another file's records do not pass the check.
        slot_bytes, num_slots: from its header.

    Attributes:
        corrupt: records found that did not pass the check.
        replaced, given_up: records that took an old one's place, and that found none.
    """

    def __init__(self, fd: int, digest: str, slot_bytes: int, num_slots: int) -> None:
        self.digest = digest
        self.slot_bytes = slot_bytes
        self.num_slots = num_slots
        self.corrupt = 0
        self.replaced = 0
        self.given_up = 0
        self._fd = fd
        self._stride = stride_of(slot_bytes)
        self._seed = xxhash.xxh3_64_intdigest(digest.encode())
        self._crowded = count()
        self._writing = threading.Lock()

    @property
    def capacity_bytes(self) -> int:
        return HEADER_BYTES + self.num_slots * self._stride

    def get(self, key: bytes, into: Sequence[memoryview]) -> bool:
        """Fill `into`, whose total size is the record's, with a record; False where there is none that is whole."""
        return all(self._get_part(key, part, pieces) for part, pieces in enumerate(self._parts(into)))

    def has(self, key: bytes) -> bool:
        """Whether a record seems to be there, by its entry alone: cheap where most are not."""
        for place in self._places(key, 0):
            try:
                entry = os.pread(self._fd, _ENTRY.size, place)
            except OSError:
                return False
            if entry[:16] == key:
                return True
            if len(entry) < _ENTRY.size or entry[:16] == _NO_KEY:
                return False
        return False

    def put(self, key: bytes, record: Sequence[memoryview]) -> int:
        """Write a record; returns the bytes written, 0 where its neighbourhood is taken.

        Raises:
            OSError: the file cannot be written.
        """
        with self._writing:
            if self._fd < 0:
                return 0
            parts = self._parts(record)
            places = self._places_for(key, len(parts))
            if places is None:
                self.given_up += 1
                return 0
            return sum(self._put_part(key, i, pieces, places[i]) for i, pieces in enumerate(parts))

    def close(self) -> None:
        """Give the file back; it stays on the disk. Later calls find nothing and write nothing."""
        with self._writing:  # or a writer would go on into whatever file gets this descriptor next
            if self._fd >= 0:
                with contextlib.suppress(OSError):
                    fcntl.flock(self._fd, fcntl.LOCK_UN)  # a forked worker has the descriptor, too, and no use for it
                os.close(self._fd)
                self._fd = -1

    def _parts(self, record: Sequence[memoryview]) -> list[list[memoryview]]:
        if sum(map(len, record)) <= self.slot_bytes:
            return [list(record)]
        parts: list[list[memoryview]] = [[]]
        room = self.slot_bytes
        for piece in record:
            while len(piece):
                if not room:
                    parts.append([])
                    room = self.slot_bytes
                parts[-1].append(piece[:room])
                piece, room = piece[room:], room - len(piece[:room])
        return parts

    def _places(self, key: bytes, part: int) -> Iterator[int]:
        home = int.from_bytes(key[:8], "little") + part * 0x9E3779B97F4A7C15
        for i in range(min(NUM_PROBES, self.num_slots)):
            yield HEADER_BYTES + (home + i) % self.num_slots * self._stride

    def _check(self, key: bytes, part: int, length: int, pieces: Sequence[memoryview]) -> int:
        mixed = int.from_bytes(key[8:], "little") + part * 0x9E3779B97F4A7C15 + length * 0xC2B2AE3D27D4EB4F
        seed = (self._seed ^ mixed) & 0xFFFFFFFFFFFFFFFF
        if len(pieces) == 1:
            return xxhash.xxh3_64_intdigest(pieces[0], seed=seed)
        state = xxhash.xxh3_64(seed=seed)
        for piece in pieces:
            state.update(piece)
        return state.intdigest()

    def _get_part(self, key: bytes, part: int, pieces: list[memoryview]) -> bool:
        length = sum(map(len, pieces))
        entry = bytearray(_ENTRY.size)
        for place in self._places(key, part):
            try:
                got = os.preadv(self._fd, [entry, *pieces], place)
            except OSError:
                return False
            if got < _ENTRY.size or entry[:16] == _NO_KEY:
                return False
            found, check, size, number, magic = _ENTRY.unpack(entry)
            if found == key and number == part:
                sound = got == _ENTRY.size + length and size == length and magic == _ENTRY_MAGIC
                if sound and check == self._check(key, part, length, pieces):
                    return True
                self.corrupt += 1
                return False
        return False

    def _put_part(self, key: bytes, part: int, pieces: list[memoryview], place: int) -> int:
        length = sum(map(len, pieces))
        entry = _ENTRY.pack(key, self._check(key, part, length, pieces), length, part, _ENTRY_MAGIC)
        written = os.pwritev(self._fd, [entry, *pieces], place)
        if written != _ENTRY.size + length:
            raise OSError(28, "the disk took only part of a record")
        return written

    def _places_for(self, key: bytes, num_parts: int) -> list[int] | None:
        """Where each part of a record goes; None if there is no room for all of them."""
        found: dict[int, None] = {}  # in order
        for part in range(num_parts):
            place = self._free_place(key, part, found)
            if place is None:
                return self._crowded_out(key) if num_parts == 1 else None
            found[place] = None
        return list(found)

    def _free_place(self, key: bytes, part: int, taken: Container[int]) -> int | None:
        for place in self._places(key, part):
            if place in taken:
                continue  # by another part of the record
            entry = os.pread(self._fd, _ENTRY.size, place)
            if len(entry) < _ENTRY.size or entry[:16] == _NO_KEY:
                return place
            if entry[:16] == key and _ENTRY.unpack(entry)[3] == part:
                return place
        return None

    def _crowded_out(self, key: bytes) -> list[int] | None:
        """The place of another record, once in a while."""
        turn = next(self._crowded)
        if turn % REPLACE_ONE_IN:
            return None
        self.replaced += 1
        places = list(self._places(key, 0))
        return [places[turn // REPLACE_ONE_IN % len(places)]]
