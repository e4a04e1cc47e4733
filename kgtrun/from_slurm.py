"""Fills in what the user left open from the place this launcher has in its Slurm step.

Pure: a request and a place in, a request out. Options and PET_ variables win over Slurm, one by one; a rendezvous of the
user's own (an endpoint, a master address, --standalone, --nnodes 1) is left alone as a whole.

Errors: `ValueError` where an option contradicts the step in a way that cannot be meant.
"""

from __future__ import annotations

from dataclasses import replace

from kgtrun.argv import Request
from launcher.slurm import Place


def fill(request: Request, place: Place) -> Request:
    """The request with Slurm's answers in it.

    Raises:
        ValueError: as the module says.
    """
    values, name = {"nproc_per_node": str(max(place.gpus, 1))}, place.name
    if place.task_is_rank:
        values["nproc_per_node"] = "1"
        _check_ranks(request, place)
    if _alone(request):
        name += f"-{place.task}" if place.num_tasks > 1 else ""
    elif {"rdzv_endpoint", "master_addr"} & request.given:
        values["node_rank"] = str(place.task)
    else:
        values |= _rendezvous(request, place)
    if "rdzv_id" not in request.given:
        values["run_dir"] = f"runs/{name}"
    found = {name: value for name, value in values.items() if name not in request.given or name == "rdzv_conf"}
    return replace(request, values={**request.values, **found})


def _alone(request: Request) -> bool:
    """Whether the user says that there is nobody to meet."""
    one = "nnodes" in request.given and request.text("nnodes") in ("1", "1:1")
    return one or request.flag("standalone")


def _check_ranks(request: Request, place: Place) -> None:
    asked = request.text("nproc_per_node")
    if "nproc_per_node" in request.given and asked != "1":
        raise ValueError(
            f"--nproc-per-node {asked} in a Slurm step with {max(place.tasks_by_node)} tasks a node, each of which is one "
            "rank: leave the option out, or start one task a node (srun --ntasks-per-node=1)"
        )


def _rendezvous(request: Request, place: Place) -> dict[str, str]:
    """Where the launchers of this step meet: at the host of task 0."""
    if "node_rank" in request.given and request.text("node_rank") != str(place.task) and place.num_tasks > 1:
        raise ValueError(
            f"--node-rank is {request.text('node_rank')}, but this is task {place.task} of the Slurm step: was "
            "$SLURM_NODEID expanded in the batch script? Leave the option out, or use --no-slurm"
        )
    elastic = "nnodes" in request.given and ":" in request.text("nnodes")
    if "nnodes" in request.given and not elastic and request.text("nnodes") != str(place.num_tasks):
        raise ValueError(
            f"--nnodes {request.text('nnodes')} in a Slurm step of {place.num_tasks} launchers: leave the option out, "
            "name the place to meet with --rdzv-endpoint, or use --no-slurm"
        )
    port = request.text("master_port") if "master_port" in request.given else str(place.port)
    found = {
        "nnodes": str(place.num_tasks),
        "node_rank": str(place.task),
        "rdzv_id": request.text("rdzv_id") if "rdzv_id" in request.given else place.name,
        "rdzv_backend": "c10d" if elastic else "static",
    }
    backend = request.text("rdzv_backend") if "rdzv_backend" in request.given else found["rdzv_backend"]
    if place.num_tasks == 1 and backend == "static":
        return found  # nobody to meet: a free local port
    if backend == "static":
        return {**found, "master_addr": place.hosts[0], "master_port": port}
    found["rdzv_endpoint"] = f"{place.hosts[0]}:{port}"
    if backend == "c10d" and "is_host" not in request.text("rdzv_conf"):
        # Torch would find out by comparing names and addresses; the first task knows.
        mine = f"is_host={int(place.task == 0)}"
        return {**found, "rdzv_conf": ",".join(filter(None, (request.text("rdzv_conf"), mine)))}
    return found


def of_rank(place: Place) -> dict[str, str]:
    """What one rank of a step with one task a rank must see, where the launcher's own nodes are tasks.

    A task that sees fewer GPUs than its node has ranks was given its own by Slurm: there its device is number 0, and a
    script that chooses by LOCAL_RANK must find it.
    """
    if not place.task_is_rank:
        return {}
    here = place.tasks_by_node[place.node]
    confined = 0 < place.gpus < here
    return {
        "LOCAL_RANK": "0" if confined else str(place.local_task),
        "LOCAL_WORLD_SIZE": str(here),
        "GROUP_RANK": str(place.node),
        "GROUP_WORLD_SIZE": str(len(place.hosts)),
    }
