"""Wall and CPU seconds of a command and of everything it starts.

A small process of its own stands between: it starts the command, adopts whatever the command leaves behind (Linux'
child subreaper), and adds up the resource usage that the kernel hands out with each `wait4`. A process that nobody
waits for, a reference started and forgotten, would otherwise be missing from the bill.

`run_process` is for benchmarks; run as a script, this file is that process in between and imports nothing else of ours.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

import psutil

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_LINGER_S = 10.0
"""How long processes that outlive the command may go on before they are killed."""


@dataclass(frozen=True, kw_only=True)
class ProcessCost:
    """What one command cost."""

    wall_s: float
    """From its start until it ended; what outlived it is not waited for here."""
    cpu_s: float
    """User and system time of all its processes."""
    exit_code: int
    """As `subprocess` has it: negative for a signal."""
    num_outlived: int
    """Processes that were still there when the command had ended."""


def run_process(
    command: Sequence[str],
    *,
    timeout_s: float,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    output: IO[Any] | None = None,
) -> ProcessCost:
    """Run a command to its end and measure it.

    Args:
        command: program and arguments.
        timeout_s: after this the whole tree is killed.
        env: its environment; None: this process's.
        cwd: its working directory.
        output: file that takes stdout and stderr; None: this process's stdout.

    Raises:
        TimeoutError: it did not end in time; nothing of it is left.
        FileNotFoundError: there is no such program.
    """
    with tempfile.TemporaryDirectory(prefix="kgtrun-cost-") as folder:
        answer = Path(folder) / "cost.json"
        process = begin(command, answer, timeout_s=timeout_s, env=env, cwd=cwd, output=output)
        try:
            process.wait(timeout_s + 3 * _LINGER_S)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait(3 * _LINGER_S)
        return result(command, answer)


def begin(
    command: Sequence[str],
    answer: Path,
    *,
    timeout_s: float,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    output: IO[Any] | None = None,
) -> subprocess.Popen[Any]:
    """Start a command as `run_process` does and return at once, with the process in between: the root of the tree.

    When that has ended, `result` reads what it wrote to `answer`. Terminating it kills the tree, as does the end of this
    process.
    """
    between = [sys.executable, str(Path(__file__).resolve()), str(answer), str(timeout_s), str(os.getpid())]
    return subprocess.Popen(
        [*between, *command], env=env, cwd=cwd, stdout=output, stderr=subprocess.STDOUT if output else None
    )


def result(command: Sequence[str], answer: Path) -> ProcessCost:
    """The cost of a command that has ended; raises what `run_process` raises.

    Raises:
        RuntimeError: the process in between was killed before it could write.
    """
    if not answer.exists():
        raise RuntimeError(f"{command[0]} could not be measured: the process in between did not live to tell")
    record = json.loads(answer.read_text())
    if record.pop("missing", False):
        raise FileNotFoundError(f"there is no program {command[0]!r}")
    if "timed_out_s" in record:
        raise TimeoutError(f"{' '.join(command)} did not end within {record['timed_out_s']:.0f} s and was killed")
    return ProcessCost(**record)


# ---- the process in between ------------------------------------------------------------------------------------------


def _measure(command: Sequence[str], timeout_s: float) -> dict[str, Any]:
    start = time.perf_counter()
    try:
        process = subprocess.Popen(command)
    except FileNotFoundError:
        return {"missing": True}
    if not _ends_within(process.pid, timeout_s):
        _kill_descendants()
        return {"timed_out_s": timeout_s}
    _, status, usage = os.wait4(process.pid, 0)
    wall_s = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    outlived = [c for c in psutil.Process().children(recursive=True) if _is_running(c)]
    return {
        "wall_s": wall_s,
        "cpu_s": usage.ru_utime + usage.ru_stime + _cpu_s_of_outlived(),
        "exit_code": process.returncode,
        "num_outlived": len(outlived),
    }


def _ends_within(pid: int, timeout_s: float) -> bool:
    """Wait for a child without reaping it: `wait4` must still find its resource usage."""
    ended = os.pidfd_open(pid)
    try:
        waiter = select.poll()
        waiter.register(ended, select.POLLIN)
        return bool(waiter.poll(timeout_s * 1000))
    finally:
        os.close(ended)


def _is_running(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _cpu_s_of_outlived() -> float:
    """Wait for adopted processes, kill them when their time is up, add what they used."""
    total, deadline, killed = 0.0, time.monotonic() + _LINGER_S, False
    while True:
        try:
            pid, _, usage = os.wait4(-1, os.WNOHANG)
        except ChildProcessError:
            return total
        if pid:
            total += usage.ru_utime + usage.ru_stime
        elif time.monotonic() > deadline:
            if killed:
                return total  # it does not even answer SIGKILL: stuck in the kernel
            _kill_descendants()
            deadline, killed = time.monotonic() + _LINGER_S, True
        else:
            time.sleep(0.01)


def _kill_descendants() -> None:
    for _ in range(3):  # a process may start another one while we look
        children = psutil.Process().children(recursive=True)
        for child in children:
            try:
                child.kill()
            except psutil.NoSuchProcess:
                pass
        psutil.wait_procs(children, timeout=_LINGER_S / 3)


def _end_all(signum: int, _: object) -> NoReturn:
    _kill_descendants()
    os._exit(128 + signum)


def main(argv: Sequence[str]) -> None:
    answer, timeout_s, parent, *command = argv
    libc = ctypes.CDLL(None, use_errno=True)
    for option, value in ((_PR_SET_CHILD_SUBREAPER, 1), (_PR_SET_PDEATHSIG, signal.SIGTERM)):
        if libc.prctl(option, value, 0, 0, 0):
            raise OSError(ctypes.get_errno(), "prctl failed")
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(signum, _end_all)
    if os.getppid() != int(parent):
        return  # the benchmark was gone before it could be watched
    record = _measure(command, float(timeout_s))
    partial = Path(answer + ".part")
    partial.write_text(json.dumps(record))
    partial.rename(answer)


if __name__ == "__main__":
    main(sys.argv[1:])
