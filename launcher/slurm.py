"""What Slurm says of the place this process has in its job, read from the environment inside the step and nowhere else.

`VARIABLES` is the one table from property to variable. `read_place` turns an environment into a `Place`, or raises:

- None without a job;
- a step (`srun kgtrun ...`) with one task a node: this launcher starts the node's ranks;
- a step with one task a rank: each task is a launcher of one rank, `local_task` its local rank. (A first task that
  started the ranks of all would be confined to its own cores and GPUs.)
- no step: the batch script or an salloc shell. A job of one node may start its ranks from there, on that node; with
  several nodes nobody can know which one is meant.

Nothing falls back to one host: what is missing, contradicts itself or cannot be ours raises `ValueError` with what to
set. `--no-slurm` leaves all of this out. No clock, disk, command or name service; no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from launcher.hostlist import expand_counts, expand_hosts

VARIABLES: dict[str, tuple[str, ...]] = {
    "job": ("SLURM_JOB_ID", "SLURM_JOBID"),
    "array_job": ("SLURM_ARRAY_JOB_ID",),
    "array_task": ("SLURM_ARRAY_TASK_ID",),
    "step": ("SLURM_STEP_ID", "SLURM_STEPID"),
    "restarts": ("SLURM_RESTART_COUNT",),
    "components": ("SLURM_HET_SIZE",),
    "hosts": ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST"),
    "nodes": ("SLURM_STEP_NUM_NODES", "SLURM_JOB_NUM_NODES", "SLURM_NNODES"),
    "node": ("SLURM_NODEID",),
    "this_host": ("SLURMD_NODENAME",),
    "tasks": ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS"),
    "tasks_by_node": ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"),
    "task": ("SLURM_PROCID",),
    "local_task": ("SLURM_LOCALID",),
    "cores_per_task": ("SLURM_CPUS_PER_TASK",),
    "cores_on_node": ("SLURM_CPUS_ON_NODE",),
    "gpus_on_node": ("SLURM_GPUS_ON_NODE", "SLURM_GPUS_PER_NODE"),
    "visible_gpus": ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"),
}
"""Property → variables that hold it, the most specific first: a step may have fewer nodes and tasks than its job."""

_FIRST_SPECIAL_STEP = 0xFFFFFFF0
"""Slurm's numbers for the batch script, the interactive shell and external processes begin here; no srun step has one."""
_FIRST_PORT, _NUM_PORTS, _STEPS_APART = 16384, 16384, 97


@dataclass(frozen=True, kw_only=True)
class Place:
    """The place of one launcher in its Slurm job."""

    job: str
    array: str | None
    """`100_3` for task 3 of array 100."""
    step: int | None
    """None in the batch script or a shell."""
    restarts: int
    """How often the job has been requeued."""
    hosts: tuple[str, ...]
    node: int
    tasks_by_node: tuple[int, ...]
    """How many launchers this step has on each node."""
    task: int
    local_task: int
    cores: int | None
    """Logical cores for this launcher; None where Slurm does not say."""
    gpus: int
    """GPUs that this launcher may use."""

    @property
    def num_tasks(self) -> int:
        return sum(self.tasks_by_node)

    @property
    def task_is_rank(self) -> bool:
        """Some node has several tasks: each is one rank. Otherwise a task is a node."""
        return max(self.tasks_by_node) > 1

    @property
    def name(self) -> str:
        """Names the step in directories and in the rendezvous; the same after a requeue."""
        step = "batch" if self.step is None else self.step
        return f"slurm-{self.array or self.job}.{step}"

    @property
    def port(self) -> int:
        """Of the rendezvous, below the ports that systems give out by themselves. Different for any two of 168
        neighbouring jobs with up to 97 steps each: ids are dealt out in order, so a scramble would do worse."""
        return _FIRST_PORT + (int(self.job) * _STEPS_APART + (self.step or 0)) % _NUM_PORTS


class _Facts:
    """Reads properties by the table; what is wrong is told with the variable's name."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ

    def text(self, what: str) -> str | None:
        return next((self._environ[name] for name in VARIABLES[what] if self._environ.get(name)), None)

    def needed(self, what: str) -> str:
        found = self.text(what)
        if found is None:
            raise ValueError(
                f"in Slurm job {self.text('job')}, but none of {', '.join(VARIABLES[what])} is set: start with "
                "`srun kgtrun ...`, pass the variable on into the container, or use --no-slurm"
            )
        return found

    def number(self, what: str, default: int | None = None) -> int:
        text = self.text(what) if default is not None else self.needed(what)
        if text is None:
            assert default is not None
            return default
        if not text.isdecimal():
            raise ValueError(f"{self.where(what)}={text!r} is no number; correct it, or use --no-slurm")
        return int(text)

    def where(self, what: str) -> str:
        """The variable that a property was read from."""
        return next((name for name in VARIABLES[what] if self._environ.get(name)), VARIABLES[what][0])

    def expanded(self, what: str, expand):
        try:
            return expand(self.needed(what))
        except ValueError as error:
            raise ValueError(f"{self.where(what)}: {error}; correct it, or use --no-slurm") from None


def count_gpus(text: str) -> int:
    """`4`, `a100:4` or `a100:2,v100:1` as a number.

    Raises:
        ValueError: it is none of these.
    """
    counts = [item.partition("(")[0].rpartition(":")[2] for item in text.split(",")]
    if not all(count.isdecimal() for count in counts):
        raise ValueError(f"{text!r} is no number of GPUs like 4 or a100:4")
    return sum(map(int, counts))


def _gpus(facts: _Facts) -> int:
    """Visible devices where they are named: a task may see fewer than its node has."""
    visible = facts.text("visible_gpus")
    if visible is not None:
        return 0 if visible in ("-1", "NoDevFiles") else len([d for d in visible.split(",") if d.strip()])
    return facts.expanded("gpus_on_node", count_gpus) if facts.text("gpus_on_node") else 0


def read_place(environ: Mapping[str, str]) -> Place | None:
    """Where this process is; None outside of Slurm.

    Raises:
        ValueError: as the module says.
    """
    facts = _Facts(environ)
    if facts.text("job") is None:
        return None
    if facts.number("components", 1) > 1:
        raise ValueError(
            "a heterogeneous Slurm job has several host lists, and kgtrun cannot know which to use: use --no-slurm "
            "with --nnodes, --node-rank, --master-addr and --master-port"
        )
    hosts = facts.expanded("hosts", expand_hosts)
    if len(hosts) != facts.number("nodes", len(hosts)):
        raise ValueError(
            f"{facts.where('hosts')} names {len(hosts)} hosts, but {facts.where('nodes')} is {facts.text('nodes')}: "
            "they belong to different steps; start with `srun kgtrun ...`, or use --no-slurm"
        )
    step = facts.number("step", _FIRST_SPECIAL_STEP)
    if step >= _FIRST_SPECIAL_STEP or facts.text("task") is None:
        return _in_shell(facts, hosts)
    return _in_step(facts, hosts, step)


def _array(facts: _Facts) -> str | None:
    job, task = facts.text("array_job"), facts.text("array_task")
    return f"{job}_{task}" if job and task else None


def _in_shell(facts: _Facts, hosts: tuple[str, ...]) -> Place:
    job = facts.needed("job")
    if len(hosts) > 1:
        raise ValueError(
            f"this is the shell of Slurm job {job}, which has {len(hosts)} nodes: start one kgtrun on each of them with "
            "`srun --ntasks-per-node=1 kgtrun ...`; for this host alone: --no-slurm"
        )
    if facts.text("this_host") is None:
        raise ValueError(
            f"this shell belongs to Slurm job {job} but does not run on its node {hosts[0]}: start with "
            "`srun kgtrun ...`; to use this host anyway: --no-slurm"
        )
    return Place(
        job=str(facts.number("job")),
        array=_array(facts),
        step=None,
        restarts=facts.number("restarts", 0),
        hosts=hosts,
        node=0,
        tasks_by_node=(1,),
        task=0,
        local_task=0,
        cores=facts.number("cores_on_node", 0) or None,
        gpus=_gpus(facts),
    )


def _in_step(facts: _Facts, hosts: tuple[str, ...], step: int) -> Place:
    node, task, local_task = facts.number("node"), facts.number("task"), facts.number("local_task")
    tasks = facts.expanded("tasks_by_node", expand_counts)
    if len(tasks) != len(hosts) or sum(tasks) != facts.number("tasks"):
        raise ValueError(
            f"{facts.where('tasks_by_node')}={facts.text('tasks_by_node')} does not give {facts.text('tasks')} tasks on "
            f"{len(hosts)} nodes: kgtrun cannot tell its place; use --no-slurm with torchrun's options"
        )
    if node >= len(hosts) or local_task >= tasks[node] or task >= sum(tasks):
        raise ValueError(
            f"SLURM_NODEID={node}, SLURM_PROCID={task}, SLURM_LOCALID={local_task} is no place in {len(hosts)} nodes with "
            f"{', '.join(map(str, tasks))} tasks: was one of them expanded outside of the step? or use --no-slurm"
        )
    on_node = facts.number("cores_on_node", 0) // tasks[node]
    return Place(
        job=str(facts.number("job")),
        array=_array(facts),
        step=step,
        restarts=facts.number("restarts", 0),
        hosts=hosts,
        node=node,
        tasks_by_node=tasks,
        task=task,
        local_task=local_task,
        cores=facts.number("cores_per_task", 0) or on_node or None,
        gpus=_gpus(facts),
    )
