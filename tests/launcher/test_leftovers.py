"""Directories of launches that were killed whole are removed, and no others."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from launcher import leftovers
from launcher.runtime_dir import RuntimeDir


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("launcher.runtime_dir._base", lambda: str(tmp_path))
    return tmp_path


def abandoned(directory: Path) -> Path:
    leftovers.hold(directory).close()
    return directory


def test_an_abandoned_directory_goes_and_one_in_use_stays(base: Path) -> None:
    gone = abandoned(RuntimeDir.create().root)
    used = RuntimeDir.create().root
    hold = leftovers.hold(used)
    RuntimeDir.create()
    assert not gone.exists() and used.exists()
    hold.close()
    RuntimeDir.create()
    assert not used.exists()


def test_a_child_forked_from_the_launcher_holds_it_alone(base: Path) -> None:
    """The reaper, while it tidies after a launcher that was killed."""
    code = f"""
import os, pathlib, sys
from launcher import leftovers
hold = leftovers.hold(pathlib.Path({str(base)!r}, "kgtrun-x"))
if os.fork() == 0:
    sys.stdin.read()
"""
    (base / "kgtrun-x").mkdir()
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        parent.wait(timeout=60)
        leftovers.remove_abandoned(base)
        assert (base / "kgtrun-x").exists()
        parent.stdin.close()  # type: ignore[union-attr]
        parent.stdout.read()  # type: ignore[union-attr]  # the child has ended
    leftovers.remove_abandoned(base)
    assert not (base / "kgtrun-x").exists()


def test_other_hosts_and_directories_without_a_lock_are_left_alone(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of_another_boot = base / "boot"
    of_another_boot.write_text("another\n")
    with monkeypatch.context() as there:
        there.setattr(leftovers, "_BOOT_ID", of_another_boot)
        other = abandoned(RuntimeDir.create().root)
    young = RuntimeDir.create().root
    leftovers.remove_abandoned(base)
    assert other.exists() and young.exists()
