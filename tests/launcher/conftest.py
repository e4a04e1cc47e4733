"""Starts `kgtrun` as a user does, bounded in time, and asserts that it left nothing behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests import shared_memory

TAG = "KGTRUN_TEST_TAG"


@dataclass
class Finished:
    """A run that has ended."""

    code: int
    out: str
    err: str
    run_dir: Path

    @property
    def result(self) -> dict:
        return json.loads((self.run_dir / "result.json").read_text())


@dataclass
class Runs:
    """Starts runs below one directory; each process started carries the tag in its environment."""

    directory: Path
    temporary: Path
    """Their TMPDIR: short, for where it is too long for sockets the launcher takes another."""
    tag: str

    def environment(self, **extra: str) -> dict[str, str]:
        foreign = ("KGTRUN_", "PET_", "OMP_", "TORCHELASTIC_", "SLURM")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
        caches = {"TORCHINDUCTOR_CACHE_DIR": str(self.directory / "inductor")}  # torch's own, and not to be counted
        return {**kept, **caches, TAG: self.tag, "TMPDIR": str(self.temporary), **extra}

    def start(self, *args: str, **extra: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "kgtrun", "--run-dir", str(self.directory / "run"), *args],
            cwd=self.directory,
            env=self.environment(**extra),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def finish(self, process: subprocess.Popen[str], timeout_s: float = 150) -> Finished:
        try:
            out, err = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate(timeout=20)
            pytest.fail(f"not ended within {timeout_s} s\n{out}\n{err}")
        return Finished(process.returncode, out, err, self.directory / "run")

    def run(self, *args: str, timeout_s: float = 150, **extra: str) -> Finished:
        return self.finish(self.start(*args, **extra), timeout_s)

    def script(self, text: str, name: str = "script.py") -> str:
        path = self.directory / name
        path.write_text(text)
        return str(path)

    def left(self) -> list[psutil.Process]:
        """Processes of these runs that still live."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(TAG) == self.tag and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def assert_nothing_left(self, timeout_s: float = 30) -> None:
        deadline = time.monotonic() + timeout_s
        while (self.left() or list(self.temporary.iterdir())) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert [p.cmdline() for p in self.left()] == []
        assert list(self.temporary.iterdir()) == []

    def wait_for(self, path: Path, timeout_s: float = 120) -> str:
        """Text of a file that a script writes when it got where the test wants it."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if path.exists() and path.read_text():
                return path.read_text()
            time.sleep(0.02)
        raise AssertionError(f"{path} did not appear within {timeout_s} s")


@pytest.fixture
def runs(tmp_path: Path):
    """Runs of one test; at its end nothing of them may be left."""
    with tempfile.TemporaryDirectory() as temporary:
        made = Runs(tmp_path, Path(temporary), tag=f"{os.getpid()}-{tmp_path.name}")
        before = shared_memory.names()
        yield made
        try:
            made.assert_nothing_left()
            assert shared_memory.left_since(before) == []
        finally:
            for process in made.left():
                process.kill()
