from __future__ import annotations

import pytest

from launcher.slurm import count_gpus, read_place
from tests.launcher.slurm_environments import batch_script, salloc, step


def test_outside_of_slurm_there_is_no_place():
    assert read_place({"PATH": "/bin"}) is None


def test_one_task_a_node():
    place = read_place(step(node=1))
    assert (place.hosts, place.node, place.task, place.num_tasks) == (("h0", "h1"), 1, 1, 2)
    assert not place.task_is_rank and place.cores == 4 and place.name == "slurm-17.0"


def test_one_task_a_rank():
    place = read_place(step(tasks=(2, 2), node=1, local=1))
    assert place.task_is_rank and (place.task, place.local_task, place.tasks_by_node) == (3, 1, (2, 2))
    assert place.cores == 2
    assert read_place(step(tasks=(2, 2), SLURM_CPUS_PER_TASK="3")).cores == 3


def test_nodes_may_have_different_numbers_of_tasks():
    environ = step(nodes=4, tasks=(2, 2, 2, 1), node=3)
    assert environ["SLURM_PROCID"] == "6"
    environ["SLURM_STEP_TASKS_PER_NODE"] = "2(x3),1"
    assert read_place(environ).tasks_by_node == (2, 2, 2, 1)


def test_the_step_counts_and_not_its_job():
    environ = {**step(nodes=2), "SLURM_JOB_NODELIST": "h[0-7]", "SLURM_NNODES": "8", "SLURM_TASKS_PER_NODE": "4(x8)"}
    assert read_place(environ).hosts == ("h0", "h1")


def test_arrays_and_requeues():
    place = read_place(step(SLURM_ARRAY_JOB_ID="16", SLURM_ARRAY_TASK_ID="3", SLURM_RESTART_COUNT="2"))
    assert (place.name, place.restarts, place.job) == ("slurm-16_3.0", 2, "17")


def test_ports_do_not_collide_between_neighbouring_jobs_and_steps():
    ports = {
        read_place(step(SLURM_JOB_ID=str(job), SLURM_STEP_ID=str(number))).port
        for job in range(100, 160)
        for number in range(20)
    }
    assert len(ports) == 60 * 20 and min(ports) >= 16384 and max(ports) < 32768


@pytest.mark.parametrize(
    ("extra", "gpus"),
    [
        ({}, 0),
        ({"SLURM_GPUS_ON_NODE": "4"}, 4),
        ({"SLURM_GPUS_PER_NODE": "a100:4"}, 4),
        ({"SLURM_GPUS_ON_NODE": "4", "CUDA_VISIBLE_DEVICES": "2"}, 1),
        ({"CUDA_VISIBLE_DEVICES": "GPU-1a,GPU-2b"}, 2),
        ({"SLURM_GPUS_ON_NODE": "2", "CUDA_VISIBLE_DEVICES": "NoDevFiles"}, 0),
    ],
)
def test_gpus(extra, gpus):
    assert read_place(step(**extra)).gpus == gpus


def test_kinds_of_gpus_add_up():
    assert count_gpus("a100:2,v100:1") == 3 and count_gpus("a100:4(S:0-1)") == 4
    with pytest.raises(ValueError, match="a100:4"):
        count_gpus("many")


def test_the_batch_script_of_one_node_is_that_node():
    place = read_place(batch_script())
    assert (place.step, place.num_tasks, place.cores, place.name) == (None, 1, 4, "slurm-17.batch")
    assert read_place(batch_script(SLURM_STEP_ID="4294967291")).step is None  # Slurm's number of the batch script
    assert read_place(batch_script(SLURM_STEP_ID="4294967290")).step is None  # and of salloc's interactive step


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        (batch_script(nodes=2), "srun --ntasks-per-node=1 kgtrun.*--no-slurm"),
        (salloc(), "does not run on its node h0.*srun kgtrun"),
        (salloc(nodes=2), "has 2 nodes"),
        ({"SLURM_JOB_ID": "17"}, "SLURM_STEP_NODELIST, SLURM_JOB_NODELIST.*container.*--no-slurm"),
        (step(SLURM_STEP_NODELIST="h[0-"), "SLURM_STEP_NODELIST.*not closed.*--no-slurm"),
        (step(SLURM_STEP_NUM_NODES="3"), "names 2 hosts, but SLURM_STEP_NUM_NODES is 3"),
        (step(SLURM_NODEID="2"), "SLURM_NODEID=2.*expanded outside of the step"),
        (step(SLURM_NODEID="one"), "SLURM_NODEID='one' is no number"),
        (step(SLURM_STEP_TASKS_PER_NODE="2(x2)"), "does not give 2 tasks on 2 nodes"),
        (step(SLURM_STEP_TASKS_PER_NODE="two"), "SLURM_STEP_TASKS_PER_NODE.*2\\(x3\\),1"),
        (step(SLURM_HET_SIZE="2"), "heterogeneous.*--no-slurm"),
        ({k: v for k, v in step().items() if k != "SLURM_LOCALID"}, "none of SLURM_LOCALID is set"),
    ],
)
def test_what_cannot_be_known_fails_and_says_what_to_set(environ, message):
    with pytest.raises(ValueError, match=message):
        read_place(environ)
