"""Directories of launches that were killed whole, reaper included: the next launch of this user removes them.

A cgroup's end (Slurm's, an OOM killer's, a container's) takes the launcher and its reaper in one stroke, and nobody is
left to tidy. So each directory holds a file that the launcher keeps locked, and its reaper with it; the kernel gives the
lock up when both are gone. Where directories are on a network file system other hosts see them, and how far locks are
seen there depends on how it is mounted: the file names the boot of the host it is of, and other hosts' are left alone.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from io import FileIO
from pathlib import Path

_LOCK = "launcher.lock"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def hold(directory: Path) -> FileIO:
    """Mark a directory as in use for as long as the file returned is open here or in a child forked from here."""
    making = directory / f"{_LOCK}.new"
    lock = making.open("wb", buffering=0)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        lock.write(_BOOT_ID.read_bytes())
        making.rename(directory / _LOCK)  # only now: what is found by this name is locked
    except OSError:
        pass  # a file system without locks: this directory is not found, and not removed, by others
    return lock


def remove_abandoned(base: Path) -> None:
    """Remove the directories `kgtrun-*` below `base` of this user and this boot that nobody holds any longer."""
    for path in base.glob(f"kgtrun-*/{_LOCK}"):
        try:
            if path.parent.lstat().st_uid != os.getuid():
                continue
            with path.open("rb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if lock.read() == _BOOT_ID.read_bytes():
                    shutil.rmtree(path.parent)
        except OSError:
            continue  # in use, or another launch was quicker
