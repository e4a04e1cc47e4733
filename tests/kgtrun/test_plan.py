from __future__ import annotations

import signal
import sys

import pytest

from kgtrun.argv import read
from kgtrun.contract import environment as names
from kgtrun.plan import describe, make_plan


def plan(line: str, **environ: str):
    return make_plan(read(line.split(), environ), environ)


def test_one_node_meets_on_a_free_local_port():
    job = plan("train.py").rendezvous
    assert (job.backend, job.endpoint) == ("c10d", "localhost:0")


def test_several_nodes_meet_at_the_master_unless_told_otherwise():
    job = plan("--nnodes 2 --node-rank 1 --master-addr h0 train.py").rendezvous
    assert (job.backend, job.endpoint, job.node_rank) == ("static", "h0:29500", 1)
    job = plan("--nnodes 1:4 --rdzv-backend c10d --rdzv-endpoint h0:1 --rdzv-id j --rdzv-conf a=1,b=2 x.py").rendezvous
    assert (job.min_nodes, job.max_nodes, job.run_id, job.settings) == (1, 4, "j", {"a": "1", "b": "2"})


def test_standalone_meets_on_a_free_local_port_whatever_else_is_said():
    job = plan("--standalone --rdzv-backend etcd --rdzv-endpoint h0:1 --rdzv-id j --master-port 5 x.py").rendezvous
    assert (job.backend, job.endpoint) == ("c10d", "localhost:0") and job.run_id != "j"
    assert plan("x.py", PET_STANDALONE="1").rendezvous.backend == "c10d"


def test_what_torch_is_handed_is_what_was_asked_for():
    found = plan(
        "--role actor --numa-binding socket --virtual-local-rank --local-addr 10.0.0.7 --max-restarts 3"
        " --monitor-interval 0.7 --event-log-handler console --logs-specs mine --duplicate-stderr-filters a,b x.py"
    )
    assert (found.ranks.role, found.ranks.numa_binding, found.ranks.virtual_local_rank) == ("actor", "socket", True)
    assert (found.max_restarts, found.monitor_interval_s, found.event_log_handler) == (3, 0.7, "console")
    assert (found.rendezvous.local_addr, found.logs.specs_plugin) == ("10.0.0.7", "mine")
    assert found.logs.stderr_filters == ("a", "b")


def test_commands():
    assert plan("train.py --x 1").ranks.command[0] == sys.executable
    assert plan("train.py --x 1").ranks.command[-4:] == ("script", "train.py", "--x", "1")
    assert plan("-m pkg.train").ranks.command[-2:] == ("module", "pkg.train")
    assert plan("--no-python ./run.sh a").ranks.command == ("./run.sh", "a")
    assert plan("train.py", PYTHON_EXEC="/opt/py").ranks.command[0] == "/opt/py"


def test_trainers_are_told_by_the_names_of_the_contract():
    found = plan("--policy linear:stop=0.5 --total-steps 9 --deterministic --ref-precision bf16 x.py")
    told = found.ranks.environment
    assert told[names.POLICY] == "linear:stop=0.5" and told[names.TOTAL_STEPS] == "9"
    assert told[names.DETERMINISTIC] == "1" and told[names.REFERENCE_PRECISION] == "bf16"
    told = plan("--cache on --cache-dir there --cache-bytes 2G x.py").ranks.environment
    assert (told[names.CACHE], told[names.CACHE_DIR], told[names.CACHE_BYTES]) == ("on", "there", str(2 * 2**30))
    assert plan("--off x.py").ranks.environment[names.OFF] == "1"
    assert names.OFF not in plan("x.py").ranks.environment


@pytest.mark.parametrize(
    ("line", "count"), [("x.py", 0), ("--policy static:blocks=1 x.py", 0), ("--ref-per-node 2 x.py", 2)]
)
def test_references_are_started_when_asked_for(line, count):
    assert plan(line).sidecars.count == count


def test_policies_that_listen_bring_a_reference(monkeypatch):
    monkeypatch.setattr("kgtrun.plan.check_policy", lambda *_, **__: None)
    assert plan("--policy kgt:x=1 x.py").sidecars.count == 1
    assert plan("--policy kgt --off x.py").sidecars.count == 0
    assert plan("--policy kgt --ref-per-node 0 x.py").sidecars.count == 0


def test_streams_signals_and_timeouts():
    found = plan("--tee 0:3,12:1 --signals-to-handle TERM,SIGUSR1 --shutdown-timeout 5 x.py")
    assert found.logs.tee == {0: 3, 12: 1}
    assert found.stop_signals == (signal.SIGTERM, signal.SIGUSR1)
    assert found.shutdown_timeout_s == 5
    assert plan("x.py", TORCH_ELASTIC_SHUTDOWN_TIMEOUT="7").shutdown_timeout_s == 7


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "no training script"),
        ("--nnodes two x.py", "N or MIN:MAX"),
        ("--nnodes 3:2 x.py", "MIN <= MAX"),
        ("--nproc-per-node 0 x.py", "at least one rank"),
        ("--max-restarts x x.py", "whole number"),
        ("--max-restarts -1 x.py", "0 or more"),
        ("--max-restarts= x.py", "--max-restarts is empty"),
        ("--shutdown-timeout= x.py", "--shutdown-timeout is empty"),
        ("--cache-bytes= x.py", "--cache-bytes is empty"),
        ("--shutdown-timeout inf x.py", "a number is needed"),
        ("--hang-timeout nan x.py", "a number is needed"),
        ("--tee 7 x.py", "3 \\(both\\)"),
        ("--signals-to-handle SIGFOO x.py", "SIGTERM,SIGINT"),
        ("--rdzv-conf a x.py", "KEY=VALUE"),
        ("--no-python -m x", "exclude"),
        ("--run-path x.py", "absolute"),
        ("--policy liner x.py", "none, replay, static"),
        ("--cache-bytes lots x.py", "K, M, G or T"),
        ("--local-ranks-filter a x.py", "0,1,12"),
    ],
)
def test_mistakes_are_value_errors_that_say_what_is_valid(line, message):
    with pytest.raises(ValueError, match=message):
        plan(line)


def test_a_plan_is_json():
    import json

    json.dumps(describe(plan("--local-ranks-filter 0 --duplicate-stdout-filters a,,b,c x.py")))
    assert plan("--duplicate-stdout-filters a,,b,c x.py").logs.stdout_filters == ("a,b", "c")


def test_our_switches():
    assert plan("--no-drop-in x.py").ranks.environment[names.DROP_IN] == "0"
    assert plan("x.py").ranks.environment[names.DROP_IN] == "1"
    assert plan("x.py").share_cores and not plan("--no-core-sharing x.py").share_cores


def test_the_variable_of_the_drop_in_holds_unless_an_option_says_otherwise():
    assert plan("x.py", KGTRUN_DROP_IN="0").ranks.environment[names.DROP_IN] == "0"
    assert plan("x.py", KGTRUN_DROP_IN="").ranks.environment[names.DROP_IN] == "1"
    assert plan("--no-drop-in x.py", KGTRUN_DROP_IN="1").ranks.environment[names.DROP_IN] == "0"
    with pytest.raises(ValueError, match="KGTRUN_DROP_IN='never' is not a switch"):
        plan("x.py", KGTRUN_DROP_IN="never")


def test_what_is_redirected_is_not_on_the_console_unless_tee_says_so():
    assert plan("x.py").logs.tee == 3
    assert plan("-r 3 x.py").logs.tee is None and plan("x.py", PET_REDIRECTS="3").logs.tee is None
    assert plan("-r 3 -t 1 x.py").logs.tee == 1 and plan("-r 3 x.py", PET_TEE="3").logs.tee == 3


def test_launchers_of_several_nodes_do_not_share_log_files():
    from pathlib import Path

    from kgtrun.plan import log_directory
    from launcher.config import RendezvousSpec

    base = Path("logs")
    assert log_directory(base, RendezvousSpec()) == base
    assert log_directory(base, RendezvousSpec(min_nodes=2, max_nodes=2)).parent == base


def test_logs_of_an_earlier_run_in_the_same_directory_are_left_alone(tmp_path):
    from kgtrun.plan import log_directory
    from launcher.config import RendezvousSpec

    (tmp_path / "attempt_0").mkdir()  # torch deletes what it finds there
    assert log_directory(tmp_path, RendezvousSpec()).parent == tmp_path


def test_a_launch_inside_a_rank_does_not_write_into_the_run_it_is_part_of():
    inside = {names.LAUNCH_ID: "1", names.RUN_DIR: "/runs/outer"}
    assert str(plan("x.py", **inside).run_dir) != "/runs/outer"
    assert str(plan("--run-dir mine x.py", **inside).run_dir) == "mine"
    assert str(plan("x.py", **{names.RUN_DIR: "/runs/outer"}).run_dir) == "/runs/outer"
