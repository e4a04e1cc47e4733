"""Environments as Slurm 22.05 sets them, by what was started."""

from __future__ import annotations


def step(
    *, nodes: int = 2, tasks: tuple[int, ...] = (1, 1), node: int = 0, local: int = 0, **extra: str
) -> dict[str, str]:
    """Of one task of an srun step."""
    by_node = (
        ",".join(map(str, tasks)) if len(set(tasks)) > 1 else f"{tasks[0]}(x{nodes})" if nodes > 1 else str(tasks[0])
    )
    hosts = f"h[0-{nodes - 1}]" if nodes > 1 else "h0"
    return {
        "SLURM_JOB_ID": "17",
        "SLURM_STEP_ID": "0",
        "SLURM_JOB_NODELIST": hosts,
        "SLURM_STEP_NODELIST": hosts,
        "SLURM_NNODES": str(nodes),
        "SLURM_STEP_NUM_NODES": str(nodes),
        "SLURM_NODEID": str(node),
        "SLURMD_NODENAME": f"h{node}",
        "SLURM_NTASKS": str(sum(tasks)),
        "SLURM_STEP_NUM_TASKS": str(sum(tasks)),
        "SLURM_TASKS_PER_NODE": by_node,
        "SLURM_STEP_TASKS_PER_NODE": by_node,
        "SLURM_PROCID": str(sum(tasks[:node]) + local),
        "SLURM_LOCALID": str(local),
        "SLURM_CPUS_ON_NODE": "4",
        "SLURM_LAUNCH_NODE_IPADDR": "10.77.0.254",
        "HOSTNAME": "login",
        **extra,
    }


def batch_script(*, nodes: int = 1, **extra: str) -> dict[str, str]:
    """Of the batch script itself: it has the numbers of a first task, but no step."""
    return {
        "SLURM_JOB_ID": "17",
        "SLURM_JOB_NODELIST": f"h[0-{nodes - 1}]" if nodes > 1 else "h0",
        "SLURM_NNODES": str(nodes),
        "SLURM_NODEID": "0",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURMD_NODENAME": "h0",
        "SLURM_TASKS_PER_NODE": f"1(x{nodes})" if nodes > 1 else "1",
        "SLURM_CPUS_ON_NODE": "4",
        **extra,
    }


def salloc(*, nodes: int = 1) -> dict[str, str]:
    """Of the shell that salloc opens on the host where it was typed."""
    found = batch_script(nodes=nodes)
    for name in ("SLURM_NODEID", "SLURM_PROCID", "SLURM_LOCALID", "SLURMD_NODENAME", "SLURM_CPUS_ON_NODE"):
        del found[name]
    return found
