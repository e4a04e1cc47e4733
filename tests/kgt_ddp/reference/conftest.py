"""A real reference process for tests, in a directory of its own, stopped and checked for leftovers afterwards."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kgt_ddp.reference.client import ReferenceClient
from kgt_ddp.reference.protocol import Score, socket_path
from kgtrun.contract.events import read_events

START_S = 150.0


class Reference:
    """Starts `python -m kgt_ddp.reference.worker` as the launcher would, any number of times one after the other."""

    def __init__(self, root: Path, precision: str = "fp32") -> None:
        self.directory = root / "s"
        self.directory.mkdir(mode=0o700)
        self.run_dir = root / "run"
        self.precision = precision
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def path(self) -> Path:
        return socket_path(self.directory, 0)

    def start(self, *, wait: bool = True, **environ: str) -> subprocess.Popen[bytes]:
        settings = {
            "KGTRUN_REFERENCE_DIR": str(self.directory),
            "KGTRUN_REFERENCE_INDEX": "0",
            "KGTRUN_REFERENCE_PRECISION": self.precision,
            "KGTRUN_RUN_DIR": str(self.run_dir),
        }
        self.path.unlink(missing_ok=True)  # a killed predecessor's; so that its appearance means something
        self.process = subprocess.Popen(
            [sys.executable, "-m", "kgt_ddp.reference.worker"],
            env={**os.environ, **settings, **environ},
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        if wait:
            until(self.path.exists, START_S)
        return self.process

    def stop(self) -> None:
        if self.process is None:
            return
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(20)
                raise
        assert self.process.stderr is not None
        self.process.stderr.close()

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [e for e in read_events(self.run_dir) if e["kind"] == kind]

    def memory_bytes(self) -> int:
        assert self.process is not None
        return resident_bytes(self.process.pid)

    def descriptors(self) -> int:
        assert self.process is not None
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))


def resident_bytes(pid: int) -> int:
    """Private memory: shared pages (the slots) count in neither process."""
    status = Path(f"/proc/{pid}/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


def until(condition: Callable[[], Any], timeout_s: float, step_s: float = 0.02) -> Any:
    """Wait for a true value and return it; fails after `timeout_s`."""
    end = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < end, f"not within {timeout_s} s"
        time.sleep(step_s)
    return value


def exchange(
    client: ReferenceClient, step: int, generation: int = 0, timeout_s: float = 150.0, **kwargs: Any
) -> list[Score]:
    """Submit one step, however often that takes, and wait for all that comes of it."""
    until(lambda: client.submit(step, generation, **kwargs), timeout_s)
    scores: list[Score] = []
    end = time.monotonic() + timeout_s
    while client.in_flight:
        assert time.monotonic() < end, f"no answer within {timeout_s} s: {client.problem}"
        scores += client.poll(0.2)
    return scores


@contextmanager
def short_directory() -> Iterator[Path]:
    """pytest's own directories are longer than a Unix socket's address may be."""
    path = Path(tempfile.mkdtemp(prefix="kgt"))
    try:
        yield path
    finally:
        shutil.rmtree(path)


@pytest.fixture
def reference() -> Iterator[Reference]:
    with short_directory() as root:
        one = Reference(root)
        yield one
        one.stop()


@pytest.fixture(scope="module")
def shared_reference() -> Iterator[Reference]:
    """One process for the tests of a module that leave it in good health."""
    with short_directory() as root:
        one = Reference(root)
        one.start()
        yield one
        assert one.process is not None and one.process.poll() is None, "a test ended the reference"
        one.stop()
        assert list(one.directory.iterdir()) == [], "the reference left its socket behind"


def small_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))


@pytest.fixture(name="tools")
def _tools() -> Any:
    """The functions of this file, for test modules (which cannot import it)."""
    from types import SimpleNamespace

    return SimpleNamespace(
        until=until,
        exchange=exchange,
        small_net=small_net,
        resident_bytes=resident_bytes,
        Reference=Reference,
        short_directory=short_directory,
    )


@pytest.fixture(scope="module")
def tools_of_module() -> Any:
    """What fixtures of a test module need of this file."""
    from types import SimpleNamespace

    return SimpleNamespace(Reference=Reference, short_directory=short_directory)
