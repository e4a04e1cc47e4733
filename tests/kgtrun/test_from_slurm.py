from __future__ import annotations

import pytest

from kgtrun.argv import read
from kgtrun.contract import environment as names
from kgtrun.plan import make_plan
from launcher.spawn_environment import SpawnEnvironment
from tests.launcher.slurm_environments import batch_script, salloc, step


def plan(line: str, environ: dict[str, str]):
    return make_plan(read(line.split(), environ), environ)


def test_a_step_with_one_task_a_node_needs_no_option():
    found = plan("train.py", step(node=1))
    job = found.rendezvous
    assert (job.backend, job.min_nodes, job.max_nodes, job.node_rank) == ("static", 2, 2, 1)
    assert job.endpoint == f"h0:{16384 + 17 * 97}" and job.run_id == "slurm-17.0"
    assert found.ranks.count == "1" and found.granted_cores == 4
    assert str(found.run_dir) == "runs/slurm-17.0"
    assert found.batch.job == "17" and not found.batch.leader and plan("train.py", step()).batch.leader


def test_ranks_follow_the_gpus_of_the_node():
    assert plan("train.py", step(SLURM_GPUS_ON_NODE="8")).ranks.count == "8"
    assert plan("--nproc-per-node 2 train.py", step(SLURM_GPUS_ON_NODE="8")).ranks.count == "2"


def test_a_step_with_one_task_a_rank_gives_the_script_torchruns_numbers():
    found = plan("train.py", step(nodes=2, tasks=(2, 1), node=0, local=1))
    assert (found.rendezvous.max_nodes, found.rendezvous.node_rank, found.ranks.count) == (3, 1, "1")
    told = found.ranks.environment
    assert {name: told[name] for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE")} == {
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "GROUP_RANK": "0",
        "GROUP_WORLD_SIZE": "2",
    }
    assert "LOCAL_RANK" not in plan("train.py", step()).ranks.environment


def test_a_task_that_sees_its_own_gpu_alone_finds_it_as_number_0():
    environ = step(tasks=(2, 2), local=1, SLURM_GPUS_ON_NODE="2", CUDA_VISIBLE_DEVICES="1")
    assert plan("train.py", environ).ranks.environment["LOCAL_RANK"] == "0"


def test_references_run_once_a_node_and_all_its_launchers_find_them(tmp_path):
    from launcher.runtime_dir import RuntimeDir

    line = "--ref-per-node 1 train.py"
    first, second = (plan(line, step(tasks=(2, 2), node=1, local=local)) for local in (0, 1))
    other = plan(line, step(tasks=(2, 2), node=0, local=0))
    assert (first.sidecars.count, second.sidecars.count, other.sidecars.count) == (1, 0, 1)
    assert first.sidecars.directory == second.sidecars.directory != other.sidecars.directory
    its = SpawnEnvironment(second, RuntimeDir(tmp_path), "id").of_rank(0, {"TORCHELASTIC_RESTART_COUNT": "0"})
    assert its[names.NUM_REFERENCES] == "1" and its[names.REFERENCE_DIR] == str(first.sidecars.directory)
    assert plan(line, step()).sidecars.directory is None


@pytest.mark.parametrize("gpus", [{}, {"SLURM_GPUS_ON_NODE": "2", "CUDA_VISIBLE_DEVICES": "0"}])
def test_a_reference_serves_one_task_of_its_node_also_where_all_find_their_gpu_as_number_0(tmp_path, monkeypatch, gpus):
    from launcher.runtime_dir import RuntimeDir

    found = []
    for local in (0, 1):
        config = plan("--ref-per-node 1 train.py", step(tasks=(2, 2), node=1, local=local, **gpus))
        its = SpawnEnvironment(config, RuntimeDir(tmp_path), "id").of_rank(0, {"TORCHELASTIC_RESTART_COUNT": "0"})
        for name, value in its.items():
            monkeypatch.setenv(name, value)
        found.append((its["LOCAL_RANK"], names.rank_on_node()))
    assert found == [("0", 0), ("0" if gpus else "1", 1)]


def test_elastic_jobs_meet_at_the_first_host_without_guessing_who_that_is():
    found = plan("--nnodes 1:3 --rdzv-conf timeout=5 train.py", step(node=1)).rendezvous
    assert (found.backend, found.min_nodes, found.max_nodes) == ("c10d", 1, 3)
    assert found.endpoint.startswith("h0:") and found.settings == {"timeout": "5", "is_host": "0"}
    assert plan("--rdzv-backend c10d train.py", step()).rendezvous.settings == {"is_host": "1"}


def test_options_win_over_slurm():
    environ = step(node=1)
    job = plan("--nnodes 2 --rdzv-backend c10d --rdzv-endpoint head:1 --rdzv-id x train.py", environ).rendezvous
    assert (job.backend, job.endpoint, job.run_id, job.settings) == ("c10d", "head:1", "x", {})
    job = plan("--nnodes 2 --master-addr h1 train.py", environ).rendezvous
    assert (job.endpoint, job.node_rank) == ("h1:29500", 1)
    assert plan("--master-port 5 train.py", environ).rendezvous.endpoint == "h0:5"
    assert str(plan("--run-dir mine train.py", environ).run_dir) == "mine"
    for line in ("--standalone train.py", "--nnodes 1 train.py"):
        found = plan(line, environ)
        assert (found.rendezvous.endpoint, str(found.run_dir)) == ("localhost:0", "runs/slurm-17.0-1")
    assert plan("train.py", {**environ, "PET_NPROC_PER_NODE": "2"}).ranks.count == "2"


def test_no_slurm_takes_nothing():
    for environ in (step(node=1), batch_script(nodes=2), salloc()):
        found = plan("--no-slurm train.py", environ)
        assert found.rendezvous.endpoint == "localhost:0" and found.batch is None and found.granted_cores is None


def test_a_batch_script_of_one_node_starts_its_ranks_there():
    found = plan("--nproc-per-node 4 train.py", batch_script())
    assert (found.rendezvous.endpoint, found.ranks.count) == ("localhost:0", "4")


def test_a_requeued_job_keeps_its_directory_and_does_not_write_over_its_logs():
    first, again = plan("t.py", batch_script()), plan("t.py", batch_script(SLURM_RESTART_COUNT="1"))
    assert first.run_dir == again.run_dir and first.logs.directory != again.logs.directory


def test_launches_of_one_batch_script_have_a_directory_each(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = plan("a.py", batch_script())
    first.run_dir.mkdir(parents=True)
    second = plan("b.py", batch_script())
    assert second.run_dir.parent == first.run_dir.parent and second.run_dir != first.run_dir
    assert second.run_dir.name.startswith("slurm-17.batch-")


def test_of_an_array_only_the_task_that_was_warned_is_requeued():
    """One task has the array's own number as its job: requeued by that, all tasks would start again."""
    array = {"SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "3"}
    assert plan("t.py", step(**array)).batch.job == "17_3"


def test_nothing_is_requeued_where_the_user_does_not_want_it():
    assert plan("--requeue never train.py", step()).batch is None


@pytest.mark.parametrize(
    ("line", "environ", "message"),
    [
        ("--nproc-per-node 2 t.py", step(tasks=(2, 2)), "each of which is one rank.*--ntasks-per-node=1"),
        ("--node-rank 0 t.py", step(node=1), "task 1 of the Slurm step.*SLURM_NODEID"),
        ("--nnodes 3 t.py", step(), "step of 2 launchers.*--rdzv-endpoint"),
        ("t.py", batch_script(nodes=2), "2 nodes"),
    ],
)
def test_contradictions_are_refused(line, environ, message):
    with pytest.raises(ValueError, match=message):
        plan(line, environ)
