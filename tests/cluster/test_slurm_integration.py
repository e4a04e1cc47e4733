"""Jobs on a real Slurm: they find each other, are warned, preempted, requeued, and end as if nothing had happened.

Set KGTRUN_FULL_TESTS=1 for all of them (scripts/soak does); without it those that wait for Slurm's own slow clocks are
left out.
"""

from __future__ import annotations

import os
import sys

import pytest
import torch

from kgtrun.contract.events import read_events
from tests.cluster.slurm import JOB, SCRIPTS, needs_slurm, number_in, slurm, starts, wait_until

pytestmark = [pytest.mark.slurm, needs_slurm]
slow = pytest.mark.skipif(not os.environ.get("KGTRUN_FULL_TESTS"), reason="slow: set KGTRUN_FULL_TESTS=1")

STEPS = 60
FREEZE = ["--deterministic", "--policy", "linear:start=0.1,stop=0.9", "--total-steps", str(STEPS)]
TASK_PER_NODE, TASK_PER_RANK, ARRAY = (str(SCRIPTS / f"{n}.sh") for n in ("task-per-node", "task-per-rank", "array"))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with slurm(2, tmp_path_factory.mktemp("slurm")) as up:
        yield up


@pytest.fixture(scope="module")
def uninterrupted(cluster):
    """What the job ends with when nobody disturbs it: two ranks, one a node, of a job started as any other."""
    where = cluster.folder / "whole"
    where.mkdir()
    job = cluster.sbatch(TASK_PER_NODE, *FREEZE, JOB, str(where), str(STEPS), "0")
    state = cluster.wait_for_state(job, "COMPLETED", "FAILED", timeout_s=90)
    assert state["JobState"] == "COMPLETED", cluster.output(job)
    assert len(starts(where)) == 1
    return torch.load(where / "final.pt", weights_only=True)


def begin(cluster, name: str, *options: str, script: str = TASK_PER_NODE, step_s: str = "0.15", job_options=()):
    """Submit the job and wait until it has frozen something; returns its folder and number."""
    where = cluster.folder / name
    where.mkdir()
    job = cluster.sbatch(*options, script, *FREEZE, JOB, str(where), str(STEPS), step_s, *job_options)
    try:
        wait_until(lambda: number_in(where / "step") >= STEPS // 3, f"step {STEPS // 3} of job {job}")
    except AssertionError:
        raise AssertionError(cluster.output(job)) from None
    return where, job


def assert_same_end(cluster, where, job, uninterrupted, *, times: int = 2):
    """The job started `times` times, and ended with the weights and the freezes of one that was never stopped."""
    # Once in 14 runs a requeued job had not ended after 90 s; why is not known, and what is printed now would tell.
    state = cluster.wait_for_state(job, "COMPLETED", "FAILED", timeout_s=240)
    text = cluster.output(job)
    assert state["JobState"] == "COMPLETED", text
    assert len(starts(where)) == times and starts(where)[-1]["step"] > 0, text
    ours = torch.load(where / "final.pt", weights_only=True)
    assert ours["freezes"] == uninterrupted["freezes"] and len(ours["freezes"]) > 2
    differing = [n for n, w in uninterrupted["model"].items() if not torch.equal(w, ours["model"][n])]
    assert differing == []
    return text


def test_a_warned_job_saves_is_requeued_once_and_goes_on(cluster, uninterrupted):
    where, job = begin(cluster, "warned")
    cluster.command("scancel", "-s", "USR1", job)
    text = assert_same_end(cluster, where, job, uninterrupted)
    assert text.count(f"asking Slurm to requeue job {job}") == 1 and cluster.show(job)["Restarts"] == "1"


def test_each_task_is_a_rank_and_references_run_once_a_node(cluster):
    where = cluster.folder / "places"
    where.mkdir()
    told = (
        "import os, pathlib, sys; e = os.environ; "
        "names = ['RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'LOCAL_WORLD_SIZE', 'GROUP_RANK', 'SLURM_PROCID', 'SLURM_LOCALID']; "
        "import torch.distributed as dist; dist.init_process_group('gloo'); "
        "names += ['KGTRUN_RANK_ON_NODE', 'KGTRUN_NUM_REFERENCES', 'KGTRUN_REFERENCE_DIR']; "
        "text = ' '.join([*(e[n] for n in names), os.uname().nodename]);"
        "pathlib.Path(sys.argv[1], e['RANK']).write_text(text); dist.barrier()"
    )
    script = cluster.folder / "places.py"
    script.write_text(told)
    job = cluster.sbatch(TASK_PER_RANK, "--ref-per-node", "1", str(script), str(where))
    state = cluster.wait_for_state(job, "COMPLETED", "FAILED", timeout_s=90)
    assert state["JobState"] == "COMPLETED", cluster.output(job)
    found = [path.read_text().split() for path in sorted(where.iterdir())]
    assert [row[:8] for row in found] == [
        [str(rank), str(rank % 2), "4", "2", str(rank // 2), str(rank), str(rank % 2), str(rank % 2)]
        for rank in range(4)
    ]
    assert [row[10] for row in found] == ["h0", "h0", "h1", "h1"] and all(row[8] == "1" for row in found)
    directories = [row[9] for row in found]
    assert len(set(directories)) == 2 and directories[0] == directories[1]
    assert not any(os.path.exists(directory) for directory in directories)
    events = read_events(cluster.folder / "runs" / f"slurm-{job}.0")
    assert sorted(e["host"] for e in events if e["kind"] == "reference_start" and e["role"] == "launcher") == [
        "h0",
        "h1",
    ]


def test_runs_of_an_array_do_not_meet(cluster):
    where = cluster.folder / "array"
    where.mkdir()
    script = cluster.folder / "array.py"
    script.write_text(
        "import os, pathlib, sys; pathlib.Path(sys.argv[1], os.environ['SLURM_ARRAY_TASK_ID']).write_text("
        "os.environ['WORLD_SIZE'] + ' ' + os.environ['KGTRUN_RUN_DIR'])"
    )
    job = cluster.sbatch(ARRAY, "--nproc-per-node", "2", str(script), str(where))
    wait_until(lambda: len(list(where.iterdir())) == 2, "both runs of the array")
    assert [(where / str(i)).read_text().split()[0] for i in range(2)] == ["2", "2"]
    assert {(where / str(i)).read_text().rpartition("/")[2] for i in range(2)} == {
        f"slurm-{job}_{i}.0" for i in range(2)
    }


def test_scancel_ends_a_job_for_good(cluster):
    where, job = begin(cluster, "cancelled")
    cluster.command("scancel", "-s", "TERM", job)
    state = cluster.wait_for_state(job, "COMPLETED", "FAILED", "PENDING")
    assert state["JobState"] == "FAILED" and state["Restarts"] == "0", cluster.output(job)
    assert "ended by SIGTERM" in cluster.output(job) and (where / "checkpoint.pt").exists()


@slow
def test_each_task_a_rank_resumes_as_well(cluster, uninterrupted):
    options = ("--nodes", "1", "--ntasks-per-node", "2")
    where, job = begin(cluster, "ranks", *options, script=TASK_PER_RANK)
    cluster.command("scancel", "-s", "USR1", job)
    assert_same_end(cluster, where, job, uninterrupted)


@slow
def test_the_time_limit_is_survived(cluster, uninterrupted):
    where = cluster.folder / "limit"
    where.mkdir()
    batch = cluster.folder / "limit.sh"
    # Slurm's clock is coarse: with a limit of a minute a warning 30 s before it comes after 15 to 27 s.
    words = ["--nnodes", "2", "--time", "1", "--warn-s", "30", "--write", str(batch), *FREEZE]
    cluster.command(sys.executable, "-m", "kgtrun", "slurm-script", *words, JOB, str(where), str(STEPS), "0.9")
    job = cluster.sbatch(str(batch))
    wait_until(lambda: cluster.show(job)["Restarts"] != "0", f"the first requeue: {cluster.output(job)}", 120)
    wait_until(lambda: cluster.show(job)["JobState"] in ("COMPLETED", "FAILED"), "the end", 240)
    assert_same_end(cluster, where, job, uninterrupted, times=len(starts(where)))


@slow
def test_a_requeue_from_outside_is_survived(cluster, uninterrupted):
    where, job = begin(cluster, "requeued", job_options=("--save-every", "5"))
    cluster.command("scontrol", "requeue", job)
    assert_same_end(cluster, where, job, uninterrupted)


@slow
def test_a_preempted_job_saves_and_goes_on_after_the_other_one(cluster, uninterrupted):
    where, job = begin(cluster, "preempted", step_s="0.3")
    urgent = cluster.sbatch("-p", "urgent", "-N", "2", "--exclusive", "--wrap", "sleep 5")
    wait_until(lambda: cluster.show(job)["JobState"] == "PENDING", "the preemption", 60)
    assert (where / "checkpoint.pt").exists(), cluster.output(job)
    cluster.wait_for_state(urgent, "COMPLETED", timeout_s=60)
    assert_same_end(cluster, where, job, uninterrupted)
