"""Side-car processes: started, watched, restarted with backoff, stopped. What they do is opaque.

A side-car's death is never a failure of the launch. After `max_restarts` restarts it stays down, said in one line. They
outlive restarts of the worker group. Each leads a session of its own and writes to a log file of its own.
"""

from __future__ import annotations

import logging
import os
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from launcher.config import SidecarSpec
from launcher.errors import describe_exit

logger = logging.getLogger(__name__)

_FIRST_BACKOFF_S = 0.5
_LONGEST_BACKOFF_S = 30.0
_STEADY_S = 60.0
"""One that ran this long starts its backoff anew."""
_POLL_S = 0.1


class Sidecar:
    """One side-car. States: down (never started), up, waiting (for its backoff), given up."""

    def __init__(
        self, spec: SidecarSpec, index: int, environment_of: Callable[[int], Mapping[str, str]], log: Path
    ) -> None:
        self.spec, self.index, self.log = spec, index, log
        self.restarts, self.given_up = 0, False
        self._environment_of = environment_of
        self._process: subprocess.Popen[bytes] | None = None
        self._started_s = self._due_s = 0.0
        self._backoff_s = _FIRST_BACKOFF_S

    @property
    def pid(self) -> int | None:
        process = self._process  # asked from other threads: it may be None the next moment
        return process.pid if process else None

    def start(self) -> int:
        """Start it now and return its pid."""
        with open(self.log, "ab") as output:
            self._process = subprocess.Popen(
                self.spec.command,
                env={**os.environ, **self._environment_of(self.index), self.spec.index_variable: str(self.index)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._started_s = time.monotonic()
        return self._process.pid

    def check(self) -> int | None:
        """Look once; returns the code of a side-car that has just ended."""
        if self._process is None or (code := self._process.poll()) is None:
            return None
        self._process = None
        if time.monotonic() - self._started_s > _STEADY_S:
            self._backoff_s = _FIRST_BACKOFF_S
        if self.restarts >= self.spec.max_restarts:
            self.given_up = True
        else:
            self._due_s = time.monotonic() + self._backoff_s
            self._backoff_s = min(2 * self._backoff_s, _LONGEST_BACKOFF_S)
        return code

    def due(self) -> bool:
        return self._process is None and not self.given_up and time.monotonic() >= self._due_s

    def reap(self) -> None:
        """Collect it after somebody ended it."""
        if self._process is not None:
            try:
                self._process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                logger.warning("side-car %d (pid %d) does not end", self.index, self._process.pid)
            self._process = None


class SidecarKeeper:
    """Keeps all side-cars of this node up from `start` to `stop_watching`."""

    def __init__(
        self,
        spec: SidecarSpec,
        log_dir: Path,
        *,
        environment_of: Callable[[int], Mapping[str, str]],
        event: Callable[..., object],
        started: Callable[[Sidecar], object],
    ) -> None:
        self.sidecars = [Sidecar(spec, i, environment_of, log_dir / f"reference{i}.log") for i in range(spec.count)]
        self._event, self._started = event, started
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start all of them, once; later calls do nothing."""
        if self._thread is None and self.sidecars:
            self._thread = threading.Thread(target=self._run, name="sidecars", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        first = True
        while not self._closing.is_set():
            for sidecar in self.sidecars:
                self._look_after(sidecar, first=first)
            first = False
            self._closing.wait(_POLL_S)

    def _look_after(self, sidecar: Sidecar, *, first: bool) -> None:
        code = sidecar.check()
        if code is not None:
            self._event("reference_exit", reference=sidecar.index, returncode=code, given_up=sidecar.given_up)
            then = "no more restarts" if sidecar.given_up else "it will be restarted"
            logger.warning("reference %d ended with %s; %s", sidecar.index, describe_exit(code), then)
        if sidecar.due():
            try:
                pid = sidecar.start()
            except OSError as error:
                sidecar.given_up = True
                logger.warning("reference %d cannot be started: %s", sidecar.index, error)
                return
            sidecar.restarts += not first
            self._started(sidecar)
            self._event("reference_start", reference=sidecar.index, child_pid=pid, restarts=sidecar.restarts)

    def stop_watching(self) -> None:
        """From now on a side-car that ends is not restarted."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join(timeout=5)

    def pids(self) -> list[int]:
        return [pid for sidecar in self.sidecars if (pid := sidecar.pid) is not None]

    def reap(self) -> None:
        for sidecar in self.sidecars:
            sidecar.reap()

    def summary(self) -> dict[str, Any]:
        return {
            "count": len(self.sidecars),
            "restarts": sum(sidecar.restarts for sidecar in self.sidecars),
            "given_up": sum(sidecar.given_up for sidecar in self.sidecars),
        }
