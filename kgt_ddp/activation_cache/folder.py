"""The directory of cache files: which file belongs to a frozen prefix, how large it may be, which old ones go.

A file is named by the digest of all that its records depend on, so another model, other weights or another form of record
simply is another file. It is created under a temporary name and linked into place complete: the ranks of a node, or two
jobs, may race, and one of them wins. A file in use is held by a shared `flock`, which ends with the process.

The budget is for all files of the directory together. Room for a new one is made by deleting files that nobody holds,
longest unused first. Files are sparse: a disk block is taken when a record is written, and writing ends while the disk
still has a reserve. Nothing but files of ours is ever deleted or truncated, and only by who holds it alone. A name may come to
mean another file between its opening and its lock: what was deleted meanwhile has no link any more.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import stat
import tempfile
from pathlib import Path

from kgt_ddp.activation_cache.store import (
    HEADER_BYTES,
    MAGIC,
    ForeignFileError,
    Table,
    header,
    read_header,
    stride_of,
)

logger = logging.getLogger(__name__)

SUFFIX = ".kgtcache"
DEFAULT_SHARE = 0.25
"""Of the free space, where no budget was given."""
_MOST_RESERVED = 2 << 30
_RESERVED_SHARE = 0.05
_MIN_SLOTS = 16
_ATTEMPTS = 3
_SLACK = 1 << 20
"""Bytes that file systems take beside the records."""


def peek(folder: Path, digest: str) -> Table | None:
    """The file of `digest` for looking only: no lock keeps it from being deleted. None where there is none of ours."""
    try:
        fd = os.open(folder / f"{digest}{SUFFIX}", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None
    with contextlib.suppress(OSError, ForeignFileError):
        fields = read_header(os.pread(fd, HEADER_BYTES, 0))
        if fields["digest"] == digest:
            return Table(fd, digest, int(fields["slot_bytes"]), int(fields["num_slots"]))
    os.close(fd)
    return None


class CacheFolder:
    """See the module docstring.

    Args:
        path: created with mode 0700 if it is not there.
        budget_bytes: of all files together; None for a share of the free space.
    """

    def __init__(self, path: Path, budget_bytes: int | None = None) -> None:
        self.path = path
        self._budget_bytes = budget_bytes

    @classmethod
    def default_path(cls) -> Path:
        """Where caches go if nobody says."""
        return Path(tempfile.gettempdir()) / f"kgtrun-activations-{os.getuid()}"

    def open(self, digest: str, slot_bytes: int) -> tuple[Table, bool]:
        """The file of `digest`, and whether it may be written.

        Raises:
            OSError: the directory cannot be used, or holds no file to read and takes none.
            ForeignFileError: a file of this name is not ours.
        """
        path = self.path / f"{digest}{SUFFIX}"
        for _ in range(_ATTEMPTS - 1):
            # Another job may delete a file between its creation and our lock.
            with contextlib.suppress(FileNotFoundError, BlockingIOError):
                return self._open(path, digest, slot_bytes)
        return self._open(path, digest, slot_bytes)

    def may_grow(self) -> bool:
        """Whether budget and disk allow more records: the disk keeps a reserve that is never touched."""
        disk = os.statvfs(self.path)
        reserve = min(_MOST_RESERVED, int(disk.f_blocks * disk.f_frsize * _RESERVED_SHARE))
        return disk.f_bavail * disk.f_frsize > reserve and sum(self._allocated().values()) <= self.budget() + _SLACK

    def discard(self, digest: str) -> None:
        """Delete the file of a prefix that this job has left behind."""
        with contextlib.suppress(OSError):
            self._delete(self.path / f"{digest}{SUFFIX}")

    def budget(self) -> int:
        """Bytes that all files together may take."""
        if self._budget_bytes is not None:
            return self._budget_bytes
        disk = os.statvfs(self.path)
        return int((disk.f_bavail * disk.f_frsize + sum(self._allocated().values())) * DEFAULT_SHARE)

    # ---- inside -----------------------------------------------------------------------------------------------------

    def _open(self, path: Path, digest: str, slot_bytes: int) -> tuple[Table, bool]:
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self.path.stat().st_uid != os.getuid():
            raise PermissionError(1, f"{self.path} belongs to another user")
        if not path.exists():
            self._create(path, digest, slot_bytes)
        writable = True
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except PermissionError:
            fd, writable = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW), False
        except OSError as error:
            if error.errno != 30:  # EROFS
                raise
            fd, writable = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW), False
        try:
            return self._adopt(fd, path, digest, writable), writable
        except BaseException:
            os.close(fd)
            raise

    def _adopt(self, fd: int, path: Path, digest: str, writable: bool) -> Table:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise ForeignFileError("it is not a regular file")
        if status.st_uid != os.getuid():
            raise ForeignFileError("it belongs to another user")
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        if not os.fstat(fd).st_nlink:
            raise FileNotFoundError(2, f"{path} was deleted while it was opened")
        fields = read_header(os.pread(fd, HEADER_BYTES, 0))
        if fields["digest"] != digest:
            raise ForeignFileError("it belongs to another model, or to other weights")
        table = Table(fd, digest, int(fields["slot_bytes"]), int(fields["num_slots"]))
        if os.fstat(fd).st_size < table.capacity_bytes:
            logger.warning("activation cache: %s was cut short; what is missing is computed again", path)
            if writable:
                os.ftruncate(fd, table.capacity_bytes)
        with contextlib.suppress(OSError):
            os.utime(fd)
        return table

    def _create(self, path: Path, digest: str, slot_bytes: int) -> None:
        num_slots = (self._room() - HEADER_BYTES) // stride_of(slot_bytes)
        if num_slots < _MIN_SLOTS:
            raise OSError(28, f"no room in a budget of {self.budget():,} bytes for records of {slot_bytes:,} bytes")
        fd, temporary = tempfile.mkstemp(prefix=".new-", suffix=SUFFIX, dir=self.path)
        try:
            fcntl.flock(fd, fcntl.LOCK_SH)  # or whoever needs room deletes it, and what it was linked to is emptied
            os.write(fd, header(digest, slot_bytes, num_slots))
            os.ftruncate(fd, HEADER_BYTES + num_slots * stride_of(slot_bytes))
            with contextlib.suppress(FileExistsError):
                os.link(temporary, path)
        finally:
            os.unlink(temporary)
            os.close(fd)

    def _room(self) -> int:
        """Bytes for a new file, after deleting what nobody uses."""
        room = self.budget()
        wanted = room // 2
        allocated = self._allocated()
        for file in list(allocated):
            if room - sum(allocated.values()) >= wanted:
                break
            with contextlib.suppress(OSError):
                if self._delete(file):
                    del allocated[file]
        return room - sum(allocated.values())

    def _allocated(self) -> dict[Path, int]:
        """The cache files and the bytes of disk that each takes, longest unused first."""
        found = []
        for file in self.path.glob(f"*{SUFFIX}"):
            with contextlib.suppress(OSError):
                status = file.lstat()
                if stat.S_ISREG(status.st_mode):
                    found.append((status.st_mtime, file, status.st_blocks * 512))
        return {file: size for _, file, size in sorted(found)}

    def _delete(self, path: Path) -> bool:
        """Delete a cache file of ours unless somebody holds it, and give its room back: a forked worker may have it open as
        long as it lives."""
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            if os.pread(fd, len(MAGIC), 0) != MAGIC:
                return False
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            num_names = os.fstat(fd).st_nlink
            if not num_names:
                return True  # somebody was faster, and the name may be another file's by now
            os.unlink(path)
            if num_names == 1:  # a creation that was killed left it two
                os.ftruncate(fd, 0)
            return True
        except BlockingIOError:
            return False
        finally:
            os.close(fd)
