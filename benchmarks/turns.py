"""Jobs that take turns: started together, exactly one running at a time, from the start of one epoch to the next.

A machine's speed drifts over hours. Compared jobs that run one after the other meet different hours; jobs that hand over
after every epoch meet the same ones. `Job` is one training command whose ranks wait at a gate (`benchmarks.epoch_gate`).
`turn` lets it run until all its ranks wait again, then stops every process of its tree with SIGSTOP: launcher and
reference processes too, which would otherwise work in the turns of others. Only then is the cost of the turn read.

    new -> (running -> stopped), once an epoch -> ended

Cost of a turn: wall seconds from when it is let run until its last rank has arrived; CPU seconds, user and system, of all
its processes, also of those that have ended, in steps of the kernel's clock tick (10 ms). Time in which it was stopped is
in neither. If the benchmark dies, the process in between (`benchmarks.process_cost`) kills the tree, stopped or not.
"""

from __future__ import annotations

import json
import os
import selectors
import socket
import subprocess
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks import process_cost
from benchmarks.epoch_gate import ADDRESS, END

START, EXIT = "start", "exit"
REFERENCE = "kgt_ddp.reference.worker"
"""In the command line of a reference process."""

_EVER_S = 14 * 24 * 3600.0
"""Limit of the process in between, which counts stopped time, too; the limit that matters is the one on a turn."""
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_STOP_S = 30.0
_TAIL_LINES = 15


class JobFailed(Exception):
    """A job ended badly, or did not reach its next epoch in time. The message ends with the last lines of its output."""


@dataclass(frozen=True, kw_only=True)
class Turn:
    """What a job did between two stops."""

    place: str
    """What ran: "start" (up to the first epoch), the number of the epoch, or "exit" (after the script's end)."""
    wall_s: float
    cpu_s: float
    reference_cpu_s: float
    """Part of `cpu_s` that reference processes used."""


class Job:
    """One command that takes turns; see the module docstring. A context manager: leaving it kills what is left.

    Args:
        command: a launcher's command line whose script is `epoch_gate.py`.
        env: its environment; the gate's address is added.
        cwd: its working directory.
        log: file that takes its output.
        turn_timeout_s: running time that one turn may take.
    """

    def __init__(
        self, command: Sequence[str], *, env: Mapping[str, str], cwd: Path, log: Path, turn_timeout_s: float
    ) -> None:
        self.turns: list[Turn] = []
        self.ended = False
        self._command, self._env, self._cwd, self._log = list(command), dict(env), cwd, log
        self._timeout_s = turn_timeout_s
        self._place = START
        self._reference_cpu_s: dict[tuple[int, str], float] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._answer = log.with_suffix(".cost")
        self._answer.unlink(missing_ok=True)  # of an attempt that was cut off
        self._gate = _Gate()

    def turn(self) -> Turn:
        """Run to the next epoch, or to the end; the job is stopped, or over, when this returns.

        Raises:
            JobFailed: see there; nothing of the job is left.
        """
        began_s = time.perf_counter()
        if self._process is None:
            self._process = self._start()
        else:
            _resume(self._process.pid)
            self._gate.open()
        try:
            place = self._gate.wait(self._process, began_s + self._timeout_s)
        except TimeoutError:
            self.close()
            raise self._failure(f"did not come to the end of {self._place} within {self._timeout_s:.0f} s") from None
        wall_s = time.perf_counter() - began_s
        if place is None:
            cpu_s, reference_cpu_s = self._final_cost(), sum(self._reference_cpu_s.values())
            self.ended = True
        else:
            _stop(self._process.pid)
            cpu_s, reference_cpu_s = self._cost_so_far(self._process.pid)
        turn = Turn(
            place=self._place,
            wall_s=wall_s,
            cpu_s=max(cpu_s - sum(t.cpu_s for t in self.turns), 0.0),
            reference_cpu_s=max(reference_cpu_s - sum(t.reference_cpu_s for t in self.turns), 0.0),
        )
        self.turns.append(turn)
        self._place = EXIT if place == END else str(place)
        return turn

    def close(self) -> None:
        """Kill what is left of the job and close its socket. A second call does nothing."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()  # the process in between kills the rest, then itself
            self._process.wait(60)
        self._gate.close()
        self._answer.unlink(missing_ok=True)

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> subprocess.Popen[bytes]:
        env = {**self._env, ADDRESS: self._gate.name}
        with self._log.open("wb") as output:
            return process_cost.begin(
                self._command, self._answer, timeout_s=_EVER_S, env=env, cwd=self._cwd, output=output
            )

    def _final_cost(self) -> float:
        """CPU seconds of the whole job, as the kernel hands them out at its end."""
        try:
            cost = process_cost.result(self._command, self._answer)
        except (RuntimeError, FileNotFoundError) as error:
            raise self._failure(str(error)) from error
        if cost.exit_code:
            raise self._failure(f"ended with exit code {cost.exit_code} in {self._place}")
        if self._place != EXIT:
            raise self._failure(f"ended in {self._place}, before its ranks had come to the end of their script")
        return cost.cpu_s

    def _cost_so_far(self, root: int) -> tuple[float, float]:
        """CPU seconds until now, of the tree and of its reference processes. The process in between is not counted."""
        total_s = 0.0
        for process in [psutil.Process(root), *_descendants(root)]:
            times = _cpu_times(process)
            if times is None:
                continue
            own_s, ended_children_s, started = times
            total_s += ended_children_s + (own_s if process.pid != root else 0.0)
            if process.pid != root and _is_reference(process):
                # Kept by process: one that has died still counts, though it is no longer seen by itself.
                self._reference_cpu_s[process.pid, started] = own_s + ended_children_s
        return total_s, sum(self._reference_cpu_s.values())

    def _failure(self, what: str) -> JobFailed:
        lines = self._log.read_text(errors="replace").splitlines() if self._log.exists() else []
        return JobFailed("\n".join([f"{self._log.stem} {what}:", *lines[-_TAIL_LINES:]]))


class _Gate:
    """The benchmark's end of the socket at which the ranks of one job wait."""

    def __init__(self) -> None:
        self.name = f"kgtrun-turns-{uuid.uuid4()}"
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(f"\0{self.name}")  # a name without a file: a benchmark that is killed leaves nothing
        self._listener.listen()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._ranks: set[socket.socket] = set()
        self._waiting: dict[socket.socket, dict[str, int | str]] = {}

    def open(self) -> None:
        """Let all waiting ranks go."""
        waiting, self._waiting = self._waiting, {}
        for rank in waiting:
            try:
                rank.sendall(b"go\n")
            except OSError:
                pass  # that rank is gone: the launcher will say so

    def wait(self, process: subprocess.Popen[bytes], deadline_s: float) -> int | str | None:
        """Where all ranks wait now; None: the process has ended.

        Raises:
            TimeoutError: neither by `deadline_s`, a time of `time.perf_counter`.
        """
        ended = os.pidfd_open(process.pid)
        self._selector.register(ended, selectors.EVENT_READ)
        try:
            while process.poll() is None:
                left_s = deadline_s - time.perf_counter()
                if left_s <= 0:
                    raise TimeoutError
                for key, _ in self._selector.select(left_s):
                    if key.fileobj is not ended:
                        self._listen_to(key.fileobj)  # type: ignore[arg-type]
                places = list(self._waiting.values())
                if places and len(places) == places[0]["world_size"]:
                    return places[0]["place"]
            return None
        finally:
            self._selector.unregister(ended)
            os.close(ended)

    def _listen_to(self, ready: socket.socket) -> None:
        if ready is self._listener:
            rank, _ = ready.accept()
            self._selector.register(rank, selectors.EVENT_READ)
            self._ranks.add(rank)
            return
        line = ready.recv(4096)  # one short line, sent at once: it does not arrive in parts
        if line:
            self._waiting[ready] = json.loads(line)
        else:
            self._selector.unregister(ready)
            self._ranks.discard(ready)
            ready.close()

    def close(self) -> None:
        for connection in [*self._ranks, self._listener]:
            connection.close()
        self._ranks.clear()
        self._selector.close()


def _descendants(root: int) -> list[psutil.Process]:
    try:
        return psutil.Process(root).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _stop(root: int) -> None:
    """Stop all descendants of `root`, those included that are started meanwhile.

    Raises:
        JobFailed: one of them still runs after half a minute.
    """
    deadline_s = time.monotonic() + _STOP_S
    while awake := [process for process in _descendants(root) if _runs(process)]:
        if time.monotonic() > deadline_s:
            raise JobFailed(f"processes {[process.pid for process in awake]} could not be stopped")
        for process in awake:
            try:
                process.suspend()
            except psutil.NoSuchProcess:
                pass
        time.sleep(0.002)


def _resume(root: int) -> None:
    """Let them run again, children first: no launcher shall see a rank that is stopped."""
    for process in reversed(_descendants(root)):
        try:
            process.resume()
        except psutil.NoSuchProcess:
            pass


def _runs(process: psutil.Process) -> bool:
    try:
        return process.status() not in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False


def _cpu_times(process: psutil.Process) -> tuple[float, float, str] | None:
    """CPU seconds of a process, those of its ended children, and the moment it was started; None when it is gone."""
    try:
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    user, system, children_user, children_system = (int(field) / _TICKS_PER_S for field in fields[11:15])
    return user + system, children_user + children_system, fields[19]


def _is_reference(process: psutil.Process) -> bool:
    try:
        return REFERENCE in process.cmdline()
    except psutil.NoSuchProcess:
        return False
