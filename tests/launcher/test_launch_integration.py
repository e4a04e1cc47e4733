"""The launcher from the outside: success, failure, signals, restarts, side-cars; scripts are plain python, no torch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from kgtrun.contract.events import read_events
from launcher.process_tree import alive

pytestmark = pytest.mark.integration

SLEEPER = """
import os, pathlib, sys, time
pathlib.Path(sys.argv[1], "up" + os.environ["RANK"]).write_text(str(os.getpid()))
time.sleep(100)
"""


def test_ranks_run_with_prefix_and_logs_and_the_run_directory_is_filled(runs):
    script = runs.script("import os; print('rank', os.environ['RANK'], 'of', os.environ['WORLD_SIZE'])")
    done = runs.run("--nproc-per-node", "2", script)
    assert done.code == 0, done.err
    host = os.uname().nodename
    assert sorted(done.out.splitlines()) == [f"{host}:0: rank 0 of 2", f"{host}:1: rank 1 of 2"]
    assert (done.run_dir / "logs/attempt_0/1/stdout.log").read_text() == "rank 1 of 2\n"
    assert done.result["status"] == "succeeded" and done.result["exit_code"] == 0
    assert json.loads((done.run_dir / "plan.json").read_text())["ranks"]["count"] == "2"
    assert [e["kind"] for e in read_events(done.run_dir)] == ["start", "ranks_start", "end"]


def test_the_first_failure_is_named_with_traceback_and_its_code_is_the_exit_code(runs):
    script = runs.script(
        "import os, sys, time\n"
        "if os.environ['RANK'] == '1':\n    sys.stderr.write('on my way out\\n'); raise SystemExit(7)\n"
        "time.sleep(60)\n"
    )
    done = runs.run("--nproc-per-node", "2", script)
    assert done.code == 7
    assert "First failure: rank 1" in done.err and "exit code 7" in done.err and "on my way out" in done.err
    assert "attempt_0/1/stderr.log" in done.err
    assert "rank 0" in done.err.split("consequence")[1]


def test_an_uncaught_exception_is_shown_without_a_decorator_and_without_our_frames(runs):
    done = runs.run(runs.script("def f():\n    raise KeyError('gone')\nf()\n"))
    assert done.code == 1
    report = done.err[done.err.index("First failure") :]
    assert "KeyError: 'gone'" in report and "in f" in report
    assert "boot.py" not in done.err


def test_one_that_raised_first_and_is_slow_to_exit_is_the_cause_with_its_own_code(runs):
    script = runs.script(
        "import atexit, os, pathlib, sys, time\n"
        "closed = pathlib.Path(sys.argv[1], 'closed')\n"
        "if os.environ['RANK'] == '1':\n"
        "    atexit.register(lambda: (closed.touch(), time.sleep(60)))\n"
        "    raise RuntimeError('worker exited')\n"
        "while not closed.exists(): time.sleep(0.01)\n"
        "raise ConnectionResetError('by peer')\n"
    )
    done = runs.run("--nproc-per-node", "2", script, str(runs.directory))
    assert done.code == 1, done.err
    first, _, rest = done.err[done.err.index("First failure") :].partition("consequence")
    assert "rank 1" in first and "exit code 1" in first and "RuntimeError: worker exited" in first
    assert "rank 0" in rest


SLOW_TO_SAY = """
import pathlib, sys, time
import torch
import torch.distributed as dist
dist.init_process_group("gloo")
numbers = torch.ones(4)
dist.all_reduce(numbers)
lost = pathlib.Path(sys.argv[1])
if dist.get_rank() == 0:
    try: dist.all_reduce(numbers)
    finally: lost.touch()
try:
    raise ValueError("the cause")
finally:
    dist.destroy_process_group()
    while not lost.exists(): time.sleep(0.02)
    time.sleep(1)
"""


def test_one_that_closes_its_connections_before_it_says_why_is_the_cause(runs):
    """A whole second before that the peer has raised, for it lost its connection."""
    done = runs.run("--nproc-per-node", "2", runs.script(SLOW_TO_SAY), str(runs.directory / "lost"))
    assert done.code == 1, done.err
    first, _, rest = done.err[done.err.index("First failure") :].partition("consequence")
    assert "rank 1" in first and "ValueError: the cause" in first
    assert "rank 0" in rest
    cause, lost = done.result["failures"]
    assert lost["after_s"] < cause["after_s"] and lost["reaction"] and lost["returncode"] == 1


LATE_WATCH = """
import sys, time
from kgtrun.cli import main
from launcher.endings import EndingWatch
note = EndingWatch._note
EndingWatch._note = lambda self, fd: (time.sleep(0.5), note(self, fd))
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("failing", ["1", "01"], ids=["one", "both"])
def test_a_failure_that_is_noted_late_is_not_reaped_by_torch_before(runs, failing):
    """On a loaded machine the thread that notes endings comes after torch's poll, which reaps and sends TERM itself."""
    script = runs.script(
        "import os, sys, time\n"
        "if os.environ['RANK'] in sys.argv[1]: raise ConnectionResetError('by peer')\n"
        "time.sleep(60)\n"
    )
    command = [sys.executable, "-c", LATE_WATCH, "--run-dir", str(runs.directory / "run"), "--nproc-per-node", "2"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([*command, script, failing], env=runs.environment(), start_new_session=True, **pipes)
    done = runs.finish(process)
    assert done.code == 1, done.err
    assert "exit code 1" in done.err and "ConnectionResetError: by peer" in done.err
    assert len(done.result["failures"]) == 2


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stop_signal_reaches_the_ranks_and_gives_the_code(runs, signum, code):
    process = runs.start("--nproc-per-node", "2", runs.script(SLEEPER), str(runs.directory))
    for rank in range(2):
        runs.wait_for(runs.directory / f"up{rank}")
    process.send_signal(signum)
    done = runs.finish(process)
    assert done.code == code
    assert done.result["signal"] == signum.name


def test_nothing_survives_sigkill_of_the_launcher(runs):
    script = runs.script(
        "import subprocess, os, sys, pathlib, time\n"
        # a child that left the session and one that cleared its environment
        "a = subprocess.Popen(['setsid', 'sleep', '300'])\n"
        "b = subprocess.Popen(['sleep', '301'], env={})\n"
        "pathlib.Path(sys.argv[1], 'pids').write_text(f'{a.pid} {b.pid} {os.getpid()}')\n"
        "time.sleep(100)\n"
    )
    process = runs.start("--shutdown-timeout", "2", script, str(runs.directory))
    pids = [int(word) for word in runs.wait_for(runs.directory / "pids").split()]
    process.kill()
    runs.finish(process)
    runs.assert_nothing_left()
    assert [pid for pid in pids if alive(pid)] == []  # init may be slow to collect zombies


def test_max_restarts_recovers(runs):
    """And ranks meet at a new store: in that of the start before they would find each other's old addresses."""
    script = runs.script(
        "import os, sys, time\n"
        "print('store', os.environ['MASTER_PORT'], os.environ['TORCHELASTIC_USE_AGENT_STORE'])\n"
        "if os.environ['TORCHELASTIC_RESTART_COUNT'] == '0':\n"
        "    sys.exit(3) if os.environ['RANK'] == '1' else time.sleep(60)\n"
        "print('second life')\n"
    )
    done = runs.run("--nproc-per-node", "2", "--max-restarts", "1", "--log-prefix", " ", script)
    assert done.code == 0, done.err
    assert done.out.count("second life") == 2
    assert done.result["restarts"] == 1
    stores = [line.split() for line in done.out.splitlines() if "store" in line]
    assert len({port for _, port, _ in stores}) == 2 and {shared for *_, shared in stores} == {"True"}


def test_a_dead_side_car_is_restarted_and_never_fails_the_run(runs):
    stand_in = "import os, pathlib, sys, time; pathlib.Path(sys.argv[1], 'ref').write_text(str(os.getpid())); "
    code = f"""
import sys, pathlib
from launcher.config import LaunchConfig, LogSpec, RankSpec, RendezvousSpec, SidecarSpec
from launcher.supervisor import launch
here = pathlib.Path({str(runs.directory)!r})
out = launch(LaunchConfig(
    ranks=RankSpec(command=(sys.executable, "-c", "import time; time.sleep(8)"), count="1"),
    rendezvous=RendezvousSpec(run_id="x"), logs=LogSpec(directory=here / "run/logs"),
    sidecars=SidecarSpec(command=(sys.executable, "-c", {stand_in + "time.sleep(100)"!r}, str(here)), count=1),
    run_dir=here / "run"))
sys.exit(out.exit_code)
"""
    import subprocess
    import sys

    process = subprocess.Popen([sys.executable, "-c", code], env=runs.environment(), cwd=runs.directory)
    try:
        first = int(runs.wait_for(runs.directory / "ref"))
        (runs.directory / "ref").unlink()
        os.kill(first, signal.SIGKILL)
        second = int(runs.wait_for(runs.directory / "ref"))
        assert second != first
        assert process.wait(timeout=120) == 0
    finally:
        if process.poll() is None:
            process.kill()
    result = json.loads((runs.directory / "run/result.json").read_text())
    assert result["sidecars"] == {"count": 1, "restarts": 1, "given_up": 0}


def test_user_signals_reach_only_ranks_that_handle_them(runs):
    script = runs.script(
        "import os, pathlib, signal, sys, time\n"
        "here = pathlib.Path(sys.argv[1])\n"
        "if os.environ['RANK'] == '0':\n"
        "    signal.signal(signal.SIGUSR1, lambda *_: (here / 'got').write_text('x'))\n"
        "(here / ('up' + os.environ['RANK'])).write_text('x')\n"
        "while not (here / 'got').exists(): time.sleep(0.02)\n"
    )
    process = runs.start("--nproc-per-node", "2", script, str(runs.directory))
    for rank in range(2):
        runs.wait_for(runs.directory / f"up{rank}")
    process.send_signal(signal.SIGUSR1)
    assert runs.finish(process).code == 0


def test_the_grace_is_honoured_when_a_rank_fails(runs):
    """Torch's agent gives the others 30 s on this path, whatever --shutdown-timeout says."""
    script = runs.script(
        "import os, pathlib, signal, subprocess, sys, time\n"
        "up, failed = (pathlib.Path(sys.argv[1], name) for name in ('up', 'failed'))\n"
        "if os.environ['RANK'] == '1':\n"
        "    while not up.exists(): time.sleep(0.02)\n"
        "    failed.write_text(str(time.monotonic())); sys.exit(3)\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = subprocess.Popen(['sleep', '100'])\n"
        "up.write_text('x'); time.sleep(100)\n"
    )
    done = runs.run("--nproc-per-node", "2", "--shutdown-timeout", "1", script, str(runs.directory))
    assert done.code == 3, done.err
    assert time.monotonic() - float((runs.directory / "failed").read_text()) < 25
    assert [failure["returncode"] for failure in done.result["failures"]] == [3, -9]


def test_the_grace_is_honoured_and_a_second_signal_hurries(runs):
    stubborn = runs.script(
        "import os, pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "pathlib.Path(sys.argv[1], 'up').write_text('x')\ntime.sleep(100)\n"
    )
    process = runs.start("--shutdown-timeout", "1", stubborn, str(runs.directory))
    runs.wait_for(runs.directory / "up")
    begun = time.monotonic()
    process.terminate()
    assert runs.finish(process).code == 143
    assert 1 <= time.monotonic() - begun < 25
    (runs.directory / "up").unlink()
    process = runs.start("--shutdown-timeout", "60", stubborn, str(runs.directory))
    runs.wait_for(runs.directory / "up")
    begun = time.monotonic()
    process.terminate()
    time.sleep(0.3)
    process.terminate()
    assert runs.finish(process).code == 143
    assert time.monotonic() - begun < 40


def test_what_a_launch_left_that_was_killed_whole_is_removed_by_the_next(runs):
    waits = runs.script(
        "import pathlib, sys, time\npathlib.Path(sys.argv[1], 'up').write_text('x')\ntime.sleep(100)\n", "waits.py"
    )
    process = runs.start(waits, str(runs.directory))
    runs.wait_for(runs.directory / "up")
    everything = runs.left()
    for one in everything:
        one.suspend()  # the reaper too, before it can see the launcher go
    for one in everything:
        one.kill()
    process.wait(timeout=20)
    deadline = time.monotonic() + 20
    while runs.left() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(list(runs.temporary.iterdir())) == 1
    assert runs.run(runs.script("pass")).code == 0
    assert list(runs.temporary.iterdir()) == []
