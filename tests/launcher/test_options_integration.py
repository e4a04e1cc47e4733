"""Options of torchrun whose effect is seen from the outside."""

from __future__ import annotations

import signal
import socket
import time

import pytest

pytestmark = pytest.mark.integration

SAY = "import os, sys\nprint('out', os.environ['RANK'])\nprint('err', os.environ['RANK'], file=sys.stderr)\n"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def test_log_directory_redirects_tee_and_filters(runs):
    done = runs.run(
        *("--nproc-per-node", "3", "--log-dir", "elsewhere", "--redirects", "0:1", "--tee", "1:3,2:3"),
        *("--local-ranks-filter", "0,1", "--duplicate-stdout-filters", "out 1,nothing"),
        *("--duplicate-stderr-filters", "err 1"),
        *("--log-prefix", "<${local_rank}> ", "--role", "worker"),
        runs.script(SAY),
    )
    assert done.code == 0, done.err
    logs = runs.directory / "elsewhere/attempt_0"
    assert done.out.splitlines() == ["<1> out 1"]
    assert sorted(line for line in done.err.splitlines() if "err" in line) == ["<1> err 1", "err 0"]
    assert (logs / "0/stdout.log").read_text() == "out 0\n" and (logs / "2/stderr.log").read_text() == "err 2\n"
    assert (logs / "filtered_stdout.log").read_text() == "<1> out 1\n"
    assert (logs / "filtered_stderr.log").read_text() == "<1> err 1\n"


def test_a_signal_named_to_be_handled_ends_the_run(runs):
    script = runs.script("import pathlib, sys, time; pathlib.Path(sys.argv[1]).write_text('x'); time.sleep(60)")
    process = runs.start("--signals-to-handle", "SIGUSR1,SIGTERM", script, str(runs.directory / "up"))
    runs.wait_for(runs.directory / "up")
    process.send_signal(signal.SIGUSR1)
    assert runs.finish(process).code == 128 + signal.SIGUSR1


def test_virtual_local_rank(runs):
    # In one write: print has several where output is unbuffered, and both ranks write to the same pipe.
    script = runs.script(
        'import os; os.write(1, f\'{os.environ["LOCAL_RANK"]} {os.environ["CUDA_VISIBLE_DEVICES"]}\\n\'.encode())'
    )
    done = runs.run("--tee", "0", "--nproc-per-node", "2", "--virtual-local-rank", script, CUDA_VISIBLE_DEVICES="4,6")
    assert sorted(done.out.splitlines()) == ["0 4", "0 6"], done.err


@pytest.mark.parametrize("how", ["c10d", "static"])
def test_two_nodes_meet(runs, how):
    port = free_port()
    meet = {
        "c10d": [["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "job"]] * 2,
        "static": [["--node-rank", str(i), "--master-addr", "127.0.0.1", "--master-port", str(port)] for i in (0, 1)],
    }[how]
    script = runs.script("import os; print(os.environ['RANK'], os.environ['WORLD_SIZE'], os.environ['GROUP_RANK'])")
    nodes = [runs.start("--nnodes", "2", "--local-addr", "127.0.0.1", "--tee", "0", *args, script) for args in meet]
    found = [runs.finish(node) for node in nodes]
    assert [node.code for node in found] == [0, 0], found
    assert sorted("".join(node.out for node in found).splitlines()) == ["0 2 0", "1 2 1"]


def test_a_rendezvous_that_nobody_hosts_is_said_and_recorded(runs):
    endpoint = f"127.0.0.1:{free_port()}"
    where = ["--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--rdzv-conf", "is_host=false,read_timeout=2"]
    done = runs.run("--nnodes", "2", *where, runs.script("pass"))
    assert done.code == 1 and f"no rendezvous at {endpoint}" in done.err and "Traceback" not in done.err
    assert done.result["status"] == "failed"


def seconds_until_both_name_rank_1(runs, script, *arguments: str) -> float:
    """Of two nodes whose rank 1 ends with 9: both end with that code, and say who failed first."""
    args = [
        "--nnodes",
        "2",
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        f"127.0.0.1:{free_port()}",
        "--rdzv-id",
        "job",
    ]
    begun = time.monotonic()
    nodes = [runs.start(*args, "--local-addr", "127.0.0.1", script, *arguments) for _ in range(2)]
    found = [runs.finish(node, 120) for node in nodes]
    assert [node.code for node in found] == [9, 9], found
    assert all("First failure: rank 1" in node.err for node in found)
    return time.monotonic() - begun


def test_a_failing_rank_ends_the_other_node_too_and_both_name_it(runs):
    script = runs.script("import os, sys, time; sys.exit(9) if os.environ['RANK'] == '1' else time.sleep(60)")
    assert seconds_until_both_name_rank_1(runs, script) < 55  # the sleeping rank would take 60


def test_a_rank_that_is_slow_to_say_why_is_named_before_the_one_on_another_node_that_lost_it(runs):
    script = runs.script(
        "import os, socket, sys, time\n"
        "path = sys.argv[1]\n"
        "if os.environ['RANK'] == '0':\n"
        "    server = socket.socket(socket.AF_UNIX); server.bind(path + '.part'); server.listen()\n"
        "    os.rename(path + '.part', path)\n"
        "    server.accept()[0].recv(1)\n"
        "    raise ConnectionResetError('by peer')\n"
        "while not os.path.exists(path): time.sleep(0.02)\n"
        "peer = socket.socket(socket.AF_UNIX); peer.connect(path)\n"
        "try: sys.exit(9)\n"
        "finally: peer.close(); time.sleep(1.8)\n"
    )
    seconds_until_both_name_rank_1(runs, script, str(runs.directory / "socket"))


def test_a_node_that_is_done_does_not_wait_for_one_that_has_failed(runs):
    """Torch's exit barrier would hold it for 300 s, and it would then say that all went well."""
    script = runs.script("import os, sys, time\nif os.environ['RANK'] == '1':\n    time.sleep(4)\n    sys.exit(9)\n")
    assert seconds_until_both_name_rank_1(runs, script) < 60


def test_a_usage_error_is_two_and_names_the_nearest(runs):
    done = runs.run("--nproc-per-nod", "2", "--max-restart", "x", "train.py")
    assert done.code == 2 and "max-restarts" in done.err and "Traceback" not in done.err
    done = runs.run("--max-restats", "1", "train.py")
    assert done.code == 2 and "--max-restarts" in done.err


def test_dry_run_starts_nothing_and_version_is_printed(runs):
    import json

    done = runs.run("--dry-run", "--json", "--nproc-per-node", "4", "train.py", "--lr", "1")
    plan = json.loads(done.out)
    assert plan["ranks"]["command"][-3:] == ["train.py", "--lr", "1"] and not done.run_dir.exists()
    assert "count: 4" in runs.run("--dry-run", "--nproc-per-node", "4", "train.py").out
    assert runs.run("--version").out.startswith("kgtrun ")


def test_help_is_there_without_torch(runs):
    begun = time.monotonic()
    done = runs.run("--help")
    assert done.code == 0 and "--policy" in done.out and "--nproc-per-node" in done.out
    assert time.monotonic() - begun < 5  # 0.05 s measured; torch alone would take 2 on a machine as busy as that
