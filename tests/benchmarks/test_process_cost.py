from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from benchmarks.process_cost import run_process

pytestmark = pytest.mark.integration

BURN = "import time\nend = time.process_time() + {seconds}\nwhile time.process_time() < end: pass\n"


def python(code: str) -> list[str]:
    return [sys.executable, "-S", "-c", code]


def burn(seconds: float) -> str:
    return BURN.format(seconds=seconds)


def wait_until_gone(pid: int, timeout_s: float = 10.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.02)
    return False


def test_cpu_of_a_grandchild_is_counted() -> None:
    spawn = f"import subprocess, sys\nsubprocess.run([sys.executable, '-S', '-c', {burn(0.4)!r}], check=True)"
    cost = run_process(python(spawn), timeout_s=60)
    assert cost.exit_code == 0
    assert cost.num_outlived == 0
    assert 0.4 <= cost.cpu_s < 3.0
    assert cost.wall_s >= 0.4


def test_cpu_of_a_process_that_nobody_waits_for_is_counted_too() -> None:
    orphan = (
        f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-S', '-c', {burn(0.4)!r}], start_new_session=True)"
    )
    cost = run_process(python(orphan), timeout_s=60)
    assert cost.num_outlived == 1
    assert cost.cpu_s >= 0.4


def test_sleeping_costs_wall_and_no_cpu() -> None:
    cost = run_process(python("import time; time.sleep(0.5)"), timeout_s=60)
    assert cost.wall_s >= 0.5
    assert cost.cpu_s < 0.4


def test_exit_code_and_output_are_passed_on(tmp_path: Path) -> None:
    with (tmp_path / "out").open("w") as out:
        cost = run_process(
            python("import sys; print('said'); print('wrong', file=sys.stderr); sys.exit(3)"), timeout_s=60, output=out
        )
    assert cost.exit_code == 3
    assert sorted((tmp_path / "out").read_text().split()) == ["said", "wrong"]


def test_past_its_time_the_whole_tree_is_killed(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    tree = (
        "import pathlib, subprocess, sys, time\n"
        "sleeper = [sys.executable, '-S', '-c', 'import time; time.sleep(600)']\n"
        "child = subprocess.Popen(sleeper, start_new_session=True)\n"
        f"pathlib.Path({str(pid_file)!r}).write_text(str(child.pid))\n"
        "time.sleep(600)\n"
    )
    with pytest.raises(TimeoutError, match="did not end within 2 s"):
        run_process(python(tree), timeout_s=2)
    assert wait_until_gone(int(pid_file.read_text()))


def test_an_unknown_program_is_named() -> None:
    with pytest.raises(FileNotFoundError, match="no-such-program"):
        run_process(["no-such-program"], timeout_s=10)


def test_when_the_benchmark_is_killed_its_command_ends(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    command = f"import os, pathlib, time\npathlib.Path({str(pid_file)!r}).write_text(str(os.getpid()))\ntime.sleep(600)"
    root = Path(__file__).resolve().parents[2]
    benchmark = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import sys; from benchmarks.process_cost import run_process; "
            f"run_process([sys.executable, '-S', '-c', {command!r}], timeout_s=600)",
        ],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    try:
        deadline = time.monotonic() + 30
        while not (pid_file.exists() and pid_file.read_text()) and time.monotonic() < deadline:
            time.sleep(0.02)
        pid = int(pid_file.read_text())
    finally:
        benchmark.kill()
        benchmark.wait(10)
    assert wait_until_gone(pid)
