"""What reaches torch's agent, and where ranks log; nothing is started."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.elastic.agent.server.api import RunResult, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.rendezvous import RendezvousConnectionError

from launcher import elastic
from launcher.config import LaunchConfig, LogSpec, RankSpec, RendezvousSpec, SidecarSpec, parse_streams
from launcher.errors import LostRendezvousError
from launcher.logs import Follower


def config(tmp_path: Path, *, ranks=None, rendezvous=None, logs=None, **rest) -> LaunchConfig:
    return LaunchConfig(
        ranks=RankSpec(**{"command": ("python", "x.py"), "count": "2", **(ranks or {})}),
        rendezvous=RendezvousSpec(**{"run_id": "job", **(rendezvous or {})}),
        logs=LogSpec(**{"directory": tmp_path / "logs", **(logs or {})}),
        sidecars=SidecarSpec(),
        run_dir=tmp_path,
        **rest,
    )


def agent_of(made: LaunchConfig, **rest) -> elastic.RankAgent:
    return elastic.build_agent(
        made,
        num_ranks=2,
        environment=lambda *_: {},
        stop=lambda _: None,
        started=lambda *_: None,
        failed=lambda: False,
        follower=Follower(),
        **rest,
    )


@pytest.fixture
def gpus(monkeypatch):
    """Two GPUs and numactl, as far as a check can see."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")


def test_the_workers_are_specified_as_asked_for(tmp_path, gpus):
    asked = config(
        tmp_path,
        ranks={"role": "actor", "numa_binding": "node", "virtual_local_rank": True},
        rendezvous={"local_addr": "10.0.0.7", "settings": {"read_timeout": "61"}},
        max_restarts=3,
        monitor_interval_s=0.7,
        event_log_handler="console",
    )
    spec = agent_of(asked).get_worker_group().spec
    assert (spec.role, spec.max_restarts, spec.monitor_interval) == ("actor", 3, 0.7)
    assert spec.event_log_handler == "console" and spec.virtual_local_rank and spec.local_addr == "10.0.0.7"
    assert spec.numa_options.affinity_mode.value == "node"
    assert (spec.entrypoint, spec.args) == ("python", ("x.py",))
    parameters = elastic.rendezvous_parameters(asked.rendezvous)
    assert parameters.get("read_timeout") == "61" and parameters.get("timeout") == 900


def test_a_numa_binding_that_cannot_be_is_refused_before_anything_starts(gpus, monkeypatch):
    assert elastic.numa_options(None, 8) is None
    with pytest.raises(ValueError, match="3 ranks find 2 GPUs here"):
        elastic.numa_options("socket", 3)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(ValueError, match="--numa-binding socket: torch needs the program numactl"):
        elastic.numa_options("socket", 2)


def test_static_rendezvous_takes_the_nodes_rank(tmp_path):
    static = {"backend": "static", "endpoint": "h0:29501", "node_rank": 1, "min_nodes": 2, "max_nodes": 2}
    spec = agent_of(config(tmp_path, rendezvous=static)).get_worker_group().spec
    assert (spec.master_addr, spec.master_port) == ("h0", 29501)
    assert elastic.rendezvous_parameters(RendezvousSpec(**static)).get("rank") == 1


def test_words_for_the_number_of_ranks():
    assert elastic.count_ranks("3") == 3
    assert elastic.count_ranks("cpu") >= 1
    for word in ("tpu", "gpu") if not os.path.exists("/dev/nvidia0") else ("tpu",):
        with pytest.raises(ValueError, match="auto, cpu, gpu or xpu"):
            elastic.count_ranks(word)


def reify(tmp_path, num_ranks: int = 13, **logs):
    follower = SimpleNamespace(followed=[])
    follower.follow = lambda path, prefix, write: follower.followed.append((path, prefix))
    specs = elastic.RankLogs(
        LogSpec(directory=tmp_path, **logs),
        num_ranks,
        lambda local_rank, its: {"EXTRA": f"{local_rank}/{its['RANK']}"},
        follower,
    )
    environments = {
        i: {"RANK": str(100 + i), "ROLE_NAME": "r", "TORCHELASTIC_RESTART_COUNT": "2"} for i in range(num_ranks)
    }
    return specs.reify(environments), environments, follower.followed


def test_each_spawn_has_an_environment_and_files_of_its_own(tmp_path):
    destination, environments, followed = reify(tmp_path)
    assert environments[12]["EXTRA"] == "12/112"
    assert destination.stderrs[12] == str(tmp_path / "attempt_2/12/stderr.log")
    assert len(followed) == 26 and not destination.tee_stdouts
    host = os.uname().nodename
    assert followed[12] == (str(tmp_path / "attempt_2/12/stdout.log"), f"{host}:112: ")


def test_tee_redirect_and_filter_work_for_ranks_of_two_digits(tmp_path):
    destination, _, followed = reify(
        tmp_path, redirects=parse_streams("11:3"), tee=parse_streams("0:1,12:2"), only_ranks=frozenset({0, 11, 12})
    )
    assert [Path(path).parent.name for path, _ in followed] == ["0", "12"]
    assert destination.stdouts[11].endswith("11/stdout.log") and destination.stdouts[12] == ""
    assert destination.stdouts[5] == os.devnull  # filtered out and not redirected


def test_what_is_redirected_alone_is_in_files_and_the_rest_on_the_console_as_well(tmp_path):
    destination, _, followed = reify(tmp_path, num_ranks=2, redirects=parse_streams("3"), tee=None)
    assert followed == [] and destination.stdouts[1] and destination.stderrs[1]
    _, _, followed = reify(tmp_path, num_ranks=2, redirects=parse_streams("2"), tee=None)
    assert [Path(path).name for path, _ in followed] == ["stdout.log"] * 2
    destination, _, followed = reify(tmp_path, redirects=parse_streams("0:3,12:1"), tee=None)
    shown = {tuple(Path(path).parts[-2:]) for path, _ in followed}
    assert len(shown) == 23 and ("12", "stderr.log") in shown and destination.stdouts[12]


def test_orphans_are_collected_about_once_a_second_while_ranks_run(tmp_path, monkeypatch):
    now, collected = 100.0, []
    monkeypatch.setattr(elastic, "time", SimpleNamespace(monotonic=lambda: now))
    agent = agent_of(config(tmp_path), leaving=lambda: 1, collect=lambda: collected.append(now))
    for now in (100.1, 100.9, 101.0, 101.1, 101.9, 102.5, 103.4, 103.5):  # noqa: B007
        agent._monitor_workers(agent.get_worker_group())
    assert collected == [101.0, 102.5, 103.5]


def test_prefixes(tmp_path, monkeypatch):
    its = {"RANK": "7", "ROLE_NAME": "r"}
    spec = LogSpec(directory=tmp_path, prefix="<${role_name}${local_rank}>")
    assert elastic.line_prefix(spec, its, 3) == "<r3>"
    monkeypatch.setenv("TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE", "[${rank}]")
    assert elastic.line_prefix(LogSpec(directory=tmp_path), its, 3) == "[7]"


def test_a_logs_plugin_takes_over_and_still_passes_the_environment(tmp_path, monkeypatch):
    import importlib.metadata

    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs

    found = [SimpleNamespace(name="mine", load=lambda: DefaultLogsSpecs)]
    monkeypatch.setattr(
        importlib.metadata, "entry_points", lambda group, name=None: [e for e in found if name in (None, e.name)]
    )
    spec = LogSpec(directory=tmp_path, specs_plugin="mine")
    specs = elastic.log_specs(spec, 1, lambda *_: {"EXTRA": "x"}, Follower())
    environments = {0: {"RANK": "0"}}
    specs.reify(environments)
    assert isinstance(specs, DefaultLogsSpecs) and environments[0]["EXTRA"] == "x"
    with pytest.raises(ValueError, match=r"there is \['mine'\]"):
        elastic.log_specs(LogSpec(directory=tmp_path, specs_plugin="other"), 1, lambda *_: {}, Follower())


def test_a_rendezvous_that_does_not_answer_is_told_by_its_endpoint(tmp_path, monkeypatch):
    def refused(_):
        raise RendezvousConnectionError("The connection to the C10d store has failed.")

    monkeypatch.setattr(elastic.rendezvous_registry, "get_rendezvous_handler", refused)
    with pytest.raises(LostRendezvousError, match="no rendezvous at h0:29400: The connection"):
        agent_of(config(tmp_path, rendezvous={"endpoint": "h0:29400"}))


def test_ranks_that_were_ended_for_a_hang_have_failed_whatever_their_code(tmp_path, monkeypatch):
    agent = agent_of(config(tmp_path))
    monkeypatch.setattr(agent, "_failed", lambda: True)
    monkeypatch.setattr(agent, "_shutdown", lambda *_: None)
    succeeded = RunResult(state=WorkerState.SUCCEEDED, return_values={0: None})
    monkeypatch.setattr(LocalElasticAgent, "_monitor_workers", lambda *_: succeeded)
    assert agent._monitor_workers(agent.get_worker_group()).state == WorkerState.FAILED
