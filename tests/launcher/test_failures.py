"""Order of endings, what is known about each, and how it is told."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from launcher.endings import Ending, EndingWatch
from launcher.errors import describe_exit, exit_status
from launcher.first_failure import gather, last_lines, read_torch_error
from launcher.memory import out_of_memory_kills
from launcher.outcome import FAILED, Failure, Outcome


def collect(endings, tmp_path, *, ended_by_us_s=None, excused=()):
    return gather(
        endings,
        excused=excused,
        begun_s=0.0,
        ended_by_us_s=ended_by_us_s,
        rank_of=lambda local: local + 8,
        error_of=lambda local: tmp_path / f"error{local}",
        torch_error_of=lambda _: None,
        stderr_of=lambda local: tmp_path / f"stderr{local}",
    )


def test_the_one_that_raised_first_is_the_cause_even_if_its_process_ended_later(tmp_path):
    (tmp_path / "error1").write_text(json.dumps({"monotonic_s": 9.9, "traceback": "ValueError: x"}))
    (tmp_path / "error0").write_text(json.dumps({"monotonic_s": 9.95, "traceback": "Connection closed by peer"}))
    found = collect([Ending(0, 10, 1, 10.0), Ending(1, 11, 1, 10.3)], tmp_path, ended_by_us_s=10.05)
    assert [f.rank for f in found] == [9, 8]
    assert found[0].traceback == "ValueError: x" and not found[0].consequence and found[1].consequence


def test_one_that_saved_as_it_was_asked_to_is_not_the_cause_of_anything(tmp_path):
    endings = [Ending(0, 10, 75, 10.0), Ending(1, 11, 1, 14.0)]
    assert [f.returncode for f in collect(endings, tmp_path, excused=(75,))] == [1]
    assert [f.returncode for f in collect(endings, tmp_path)] == [75, 1]


def test_one_that_had_raised_keeps_its_code_when_we_cut_it_short(tmp_path):
    (tmp_path / "error1").write_text(json.dumps({"monotonic_s": 9.9, "traceback": "ValueError: x", "code": 1}))
    (tmp_path / "error0").write_text(json.dumps({"monotonic_s": 9.95, "traceback": "Connection closed by peer"}))
    found = collect([Ending(0, 10, 1, 10.0), Ending(1, 11, -15, 10.3)], tmp_path, ended_by_us_s=10.05)
    assert (found[0].rank, found[0].returncode) == (9, 1)


@pytest.mark.parametrize(
    ("origin", "later_s", "first"),
    [
        ("ConnectionResetError: [Errno 104] Connection reset by peer", 1.2, 9),
        ("RuntimeError: [gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1234", 1.2, 9),
        ("torch.distributed.DistNetworkError: failed to recv, got 0 bytes", 1.2, 9),
        ("torch.distributed.DistBackendError: ncclRemoteError: A call failed possibly due to a network error", 1.2, 9),
        ("ConnectionResetError: [Errno 104] Connection reset by peer", 4.0, 8),
        ("KeyError: 'connection'", 1.2, 8),
    ],
)
def test_a_lost_connection_goes_after_what_another_rank_says_soon_after(tmp_path, origin, later_s, first):
    (tmp_path / "error0").write_text(json.dumps({"monotonic_s": 10.0, "origin": origin}))
    (tmp_path / "error1").write_text(json.dumps({"monotonic_s": 10.0 + later_s, "origin": "ValueError: x"}))
    found = collect([Ending(0, 10, 1, 10.1), Ending(1, 11, 1, 10.1 + later_s)], tmp_path, ended_by_us_s=20.0)
    assert found[0].rank == first and found[1].consequence


def test_lost_connections_keep_their_order_and_what_we_ended_says_nothing(tmp_path):
    for local_rank, moment_s in ((0, 10.0), (1, 10.2), (2, 12.0)):
        lost = {"monotonic_s": moment_s, "origin": "RuntimeError: Connection closed by peer"}
        (tmp_path / f"error{local_rank}").write_text(json.dumps(lost))
    (tmp_path / "error2").write_text(json.dumps({"monotonic_s": 12.0, "origin": "KeyError: after our signal"}))
    endings = [Ending(1, 11, 1, 10.3), Ending(0, 10, 1, 10.4), Ending(2, 12, -6, 12.1)]
    assert [f.rank for f in collect(endings, tmp_path, ended_by_us_s=11.0)] == [8, 9, 10]


@pytest.mark.parametrize(("code", "first"), [(-9, 9), (-15, 9), (3, 9), (-6, 8)])
def test_an_abrupt_end_goes_before_the_exception_it_caused_in_a_peer(tmp_path, code, first):
    error = {"monotonic_s": 9.99, "origin": "RuntimeError: Connection reset by peer"}
    (tmp_path / "error0").write_text(json.dumps(error))
    found = collect([Ending(1, 11, code, 10.0), Ending(0, 10, 1, 10.3)], tmp_path, ended_by_us_s=10.1)
    assert found[0].rank == first


def test_ranks_we_ended_are_consequences_and_success_is_no_failure(tmp_path):
    endings = [Ending(2, 12, 0, 9.0), Ending(1, 11, -9, 10.0), Ending(0, 10, -15, 10.2)]
    found = collect(endings, tmp_path, ended_by_us_s=10.1)
    assert [(f.rank, f.consequence) for f in found] == [(9, False), (8, True)]


@pytest.fixture(params=["pidfd", "no call in Python", "no call in the kernel"])
def pidfds(request, monkeypatch):
    """With pidfds, and without."""

    def refused(pid):
        raise OSError(errno.ENOSYS, "Function not implemented")

    if request.param == "no call in Python":
        monkeypatch.delattr(os, "pidfd_open", raising=False)
    elif request.param == "no call in the kernel":
        monkeypatch.setattr(os, "pidfd_open", refused, raising=False)


@pytest.mark.integration
def test_endings_are_noted_in_order_without_reaping(pidfds):
    codes = ["import time; time.sleep(0.6); raise SystemExit(3)", "import os; os.kill(os.getpid(), 9)", "pass"]
    processes = [subprocess.Popen([sys.executable, "-S", "-c", code]) for code in codes]
    watch = EndingWatch({i: p.pid for i, p in enumerate(processes)})
    watch.settle(10)
    assert watch.failed.is_set() and watch.running() == []
    assert {e.key: e.returncode for e in watch.endings} == {0: 3, 1: -9, 2: 0}
    assert watch.endings[-1].key == 0
    assert [p.wait(5) for p in processes] == [3, -9, 0]
    watch.close()
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("ending")]


@pytest.mark.integration
def test_children_that_have_ended_are_found_and_others_keep_their_codes():
    from launcher.process_tree import reap, stat, zombies

    orphan, rank, running = (subprocess.Popen(["sh", "-c", code]) for code in ("exit 0", "exit 3", "exec sleep 60"))
    deadline = time.monotonic() + 20
    while not {orphan.pid, rank.pid} <= zombies() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert {orphan.pid, rank.pid} <= zombies() and running.pid not in zombies()
    reap(zombies() & {orphan.pid, running.pid})
    assert stat(orphan.pid) is None and rank.wait(5) == 3
    running.kill()
    assert running.wait(5) == -9


def test_only_orphans_that_were_there_before_are_collected(monkeypatch):
    """A side-car that has just ended may not be known by its keeper's list yet."""
    from launcher import belongings, process_tree

    reaped: list[int] = []
    mine = object.__new__(belongings.Belongings)
    mine._reaper, mine._ended = SimpleNamespace(pid=1), set()
    monkeypatch.setattr(process_tree, "reap", reaped.extend)
    for ended, owned in (({1, 2, 3}, [2]), ({1, 2, 3, 4}, [2, 4]), ({5, 1}, [2]), (set(), [2])):
        monkeypatch.setattr(process_tree, "zombies", lambda ended=ended: set(ended))
        mine.collect(owned=owned)
    assert reaped == [3]


def test_codes_and_words():
    assert (exit_status(3), exit_status(-9), exit_status(0)) == (3, 137, 0)
    assert describe_exit(-11) == "SIGSEGV (signal 11)" and describe_exit(2) == "exit code 2"


def test_last_lines_and_torchs_error_file(tmp_path):
    (tmp_path / "log").write_text("\n".join(str(i) for i in range(10000)))
    assert last_lines(tmp_path / "log")[-1] == "9999" and len(last_lines(tmp_path / "log")) == 20
    assert last_lines(tmp_path / "none") == () and last_lines(None) == ()
    (tmp_path / "e").write_text(json.dumps({"message": {"message": "m", "extraInfo": {"py_callstack": "stack"}}}))
    assert read_torch_error(tmp_path / "e") == "stack"


def test_the_report_puts_the_first_failure_above_its_consequences(tmp_path):
    common = {"host": "h", "pid": 1, "after_s": 2.0, "log_path": "logs/1"}
    first = Failure(rank=1, local_rank=1, returncode=-9, hint="killed by the kernel", last_lines=("bye",), **common)
    other = Failure(rank=0, local_rank=0, returncode=1, consequence=True, **common)
    text = Outcome(status=FAILED, exit_code=137, seconds=3.0, failures=(first, other)).report()
    assert text.index("rank 1 on h") < text.index("consequence") < text.index("rank 0 on h")
    assert "SIGKILL (signal 9)" in text and "killed by the kernel" in text and "bye" in text and "logs/1" in text


def test_the_result_keeps_what_others_have_written(tmp_path):
    path = tmp_path / "result.json"
    path.write_text('{"accuracy": 0.9}')
    Outcome(status=FAILED, exit_code=1, seconds=1.0).write(path)
    assert json.loads(path.read_text())["accuracy"] == 0.9
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


OOM_FILES = [
    ("0::/job", "job/memory.events", "low 0\noom 3\noom_kill 2\n"),
    ("4:memory:/a/job\n0::/", "memory/a/job/memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n"),
    ("0::/\n4:cpu,memory:/hosts/path", "memory/memory.oom_control", "oom_kill 2\n"),  # a container under v1
    ("0::/", "../../../proc/vmstat", "pgfault 9\noom_kill 2\n"),  # the root of v2 has no counter of its own
]


@pytest.mark.parametrize(("groups", "file", "text"), OOM_FILES, ids=["v2", "v1", "container", "machine"])
def test_out_of_memory_kills_are_read_from_the_cgroup(tmp_path, groups, file, text):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(f"{groups}\n")
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    assert out_of_memory_kills(tmp_path) is None
    path = tmp_path / "sys/fs/cgroup" / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    assert out_of_memory_kills(tmp_path) == 2


@pytest.mark.integration
def test_members_of_a_launch_are_found_by_marker_session_and_descent():
    from launcher.process_tree import members, terminate

    marked = subprocess.Popen(["sh", "-c", "env -i sleep 50 & sleep 51"], env={"PATH": "/usr/bin:/bin", "MARK": "x1"})
    unmarked = subprocess.Popen(["setsid", "sh", "-c", "sleep 52 & wait"], env={"PATH": "/usr/bin:/bin"})
    try:
        deadline = time.monotonic() + 5
        while len(members("MARK=x1", [unmarked.pid])) < 5 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert len(members("MARK=x1")) == 3
        assert len(members("MARK=x1", [unmarked.pid])) == 5
        assert members("MARK=x2") == set() == members("")
    finally:
        left = terminate(
            lambda: members("MARK=x1", [unmarked.pid]),
            polite=[marked.pid],
            signum=15,
            grace_s=1,
        )
        assert left == set()
        marked.wait(5)
        unmarked.wait(5)


@pytest.mark.integration
def test_a_wrapper_that_passes_no_signal_on_leaves_its_program_the_grace(tmp_path):
    """A shell around the training program dies of TERM at once; the program must still get it, and save."""
    from launcher.process_tree import members, terminate

    program = (
        "import pathlib, signal, sys, time\n"
        "def save(*_):\n    time.sleep(0.3); pathlib.Path(sys.argv[1], 'saved').touch(); sys.exit()\n"
        "signal.signal(signal.SIGTERM, save); pathlib.Path(sys.argv[1], 'ready').touch(); time.sleep(60)"
    )
    wrapper = subprocess.Popen(
        ["sh", "-c", f'"{sys.executable}" -c "$1" "$2"; true', "sh", program, str(tmp_path)], start_new_session=True
    )
    deadline = time.monotonic() + 20
    while not (tmp_path / "ready").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    left = terminate(
        lambda: members("", [wrapper.pid]), polite=[wrapper.pid], signum=15, grace_s=20, between=wrapper.poll
    )
    assert left == set() and (tmp_path / "saved").exists()
    assert time.monotonic() < deadline, "the grace is not waited out when all have ended"
