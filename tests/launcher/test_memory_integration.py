"""A rank, or a process it started, that outgrows a memory limit is killed by the kernel; kgtrun says so.

The whole of `kgtrun` runs in a cgroup that the test makes: as root, in its own group under v1, under v2 in the nearest
group above that hands on the memory controller.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration

_LIMIT_BYTES = 1 << 30  # kgtrun and torch need a third of it
_ROOT = Path("/sys/fs/cgroup")

IN_GROUP = """
import os, sys
with open(sys.argv[1], "w") as group: group.write("0")
os.execv(sys.executable, [sys.executable, "-m", "kgtrun", *sys.argv[2:]])
"""

GREEDY = """
import os, subprocess, sys, time
grow = "held = []\\nwhile True: held.append(b'x' * (16 << 20))"
if os.environ["RANK"] != "1":
    time.sleep(100)
elif sys.argv[1] == "rank":
    exec(grow)
else:
    code = subprocess.run([sys.executable, "-S", "-c", grow]).returncode
    raise RuntimeError(f"the worker ended with {code}")
"""


def _made() -> Path:
    """A new cgroup with the limit; raises OSError or LookupError where there can be none."""
    paths = dict(line.split(":", 2)[1:] for line in Path("/proc/self/cgroup").read_text().splitlines())
    v1 = next((path for controllers, path in paths.items() if "memory" in controllers.split(",")), None)
    base = _ROOT / "memory" if v1 else _ROOT
    own = base / (v1 or paths[""]).strip("/")
    limit, swap = ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes") if v1 else ("memory.max", "memory.swap.max")
    for parent in (own, *(() if v1 else own.parents)):
        group = parent / f"kgtrun-test-{os.getpid()}"
        group.mkdir()
        with contextlib.suppress(OSError):
            (group / limit).write_text(str(_LIMIT_BYTES))
            with contextlib.suppress(OSError):  # no swap, no such file
                (group / swap).write_text(str(_LIMIT_BYTES if v1 else 0))
            return group
        group.rmdir()
        if parent == _ROOT:
            break
    raise LookupError(f"no group above {own} hands on the memory controller")


@pytest.fixture
def group():
    """A cgroup with a memory limit, removed at the end with what may still be in it."""
    try:
        made = _made()
    except (OSError, LookupError, KeyError) as error:
        pytest.skip(f"no cgroup with a memory limit can be made here: {type(error).__name__}: {error}")
    yield made
    deadline = time.monotonic() + 30
    while made.exists():
        for pid in map(int, (made / "cgroup.procs").read_text().split()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(OSError):
            made.rmdir()
            break
        assert time.monotonic() < deadline, f"{made} cannot be removed"
        time.sleep(0.05)


def run_in(group, runs, *args):
    command = [sys.executable, "-c", IN_GROUP, str(group / "cgroup.procs"), "--run-dir", str(runs.directory / "run")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([*command, *args], env=runs.environment(), start_new_session=True, **pipes)
    return runs.finish(process)


def test_a_rank_killed_for_want_of_memory_is_named_and_so_is_the_reason(group, runs):
    done = run_in(group, runs, "--nproc-per-node", "2", runs.script(GREEDY), "rank")
    assert done.code == 137, done.err
    first, _, rest = done.err[done.err.index("First failure") :].partition("consequence")
    assert "rank 1" in first and "SIGKILL" in first and "killed by the kernel for want of memory" in first
    assert "rank 0" in rest
    assert done.result["failures"][0]["hint"].startswith("killed by the kernel for want of memory")


def test_a_rank_that_lost_a_process_of_its_own_to_the_kernel_says_so_too(group, runs):
    done = run_in(group, runs, "--nproc-per-node", "2", runs.script(GREEDY), "worker")
    assert done.code == 1, done.err
    first, _, _ = done.err[done.err.index("First failure") :].partition("consequence")
    assert "rank 1" in first and "the worker ended with -9" in first
    assert "meanwhile the kernel killed a process for want of memory" in first
