"""What ranks and references are given of the cores, and what is left alone because the user has decided it."""

from __future__ import annotations

import os

import pytest

from kgtrun.contract import environment as names
from launcher import affinity
from launcher.config import LaunchConfig, LogSpec, RankSpec, RendezvousSpec, SidecarSpec
from launcher.runtime_dir import RuntimeDir
from launcher.spawn_environment import SpawnEnvironment

SHARES = affinity.Shares(
    ranks=(frozenset({0, 1}), frozenset({2, 3})),
    sidecars=(frozenset({4}),),
    rank_threads=2,
    sidecar_threads=1,
    words="shared",
)


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Environments of two ranks and a reference on a machine where cores are shared as `SHARES` says."""
    monkeypatch.setattr(affinity, "share", lambda *_, **__: SHARES)
    monkeypatch.setattr(os, "environ", {"PATH": os.environ["PATH"]})

    def make(*, share_cores: bool = True, **ranks: str) -> tuple[str, list[dict[str, str]]]:
        config = LaunchConfig(
            ranks=RankSpec(command=("x",), count="2", **ranks),
            rendezvous=RendezvousSpec(run_id="x"),
            logs=LogSpec(directory=tmp_path),
            sidecars=SidecarSpec(command=("x",), count=1),
            run_dir=tmp_path,
            share_cores=share_cores,
        )
        environment = SpawnEnvironment(config, RuntimeDir(tmp_path), "id")
        words = environment.share_cores(2)
        its = {"TORCHELASTIC_RESTART_COUNT": "0"}
        every = [environment.of_rank(0, its), environment.of_rank(1, its), environment.of_sidecar(0)]
        kept = (names.CPUS, "OMP_NUM_THREADS")
        return words, [{name: one[name] for name in kept if name in one} for one in every]

    return make


def test_cores_and_threads_follow_the_share(made):
    assert made() == (
        "shared",
        [
            {names.CPUS: "0-1", "OMP_NUM_THREADS": "2"},
            {names.CPUS: "2-3", "OMP_NUM_THREADS": "2"},
            {names.CPUS: "4", "OMP_NUM_THREADS": "1"},
        ],
    )


def test_the_users_number_of_threads_stays_and_it_is_said(made):
    os.environ["OMP_NUM_THREADS"] = "7"
    words, found = made()
    assert "OMP_NUM_THREADS=7 is yours and stays" in words
    assert found == [{names.CPUS: "0-1"}, {names.CPUS: "2-3"}, {names.CPUS: "4"}]


def test_with_a_numa_binding_no_cores_are_given(made, monkeypatch):
    monkeypatch.setattr(os, "sched_setaffinity", None)
    _, found = made(numa_binding="node")
    assert found == [{"OMP_NUM_THREADS": "2"}, {"OMP_NUM_THREADS": "2"}, {"OMP_NUM_THREADS": "1"}]


@pytest.mark.parametrize(("theirs", "threads"), [({}, "1"), ({"OMP_NUM_THREADS": "7"}, "7")])
def test_without_sharing_torchruns_rule_holds(made, theirs, threads):
    os.environ.update(theirs)
    assert made(share_cores=False) == ("cores are not shared out", [{}, {}, {}])
    assert os.environ["OMP_NUM_THREADS"] == threads
