"""Every environment variable of kgtrun, in one table.

The launcher sets them for trainers and references; a flag of `kgtrun` overrides the variable, the variable overrides
the default. Names that torch.distributed.elastic sets (RANK, LOCAL_RANK, WORLD_SIZE, GROUP_RANK, MASTER_ADDR, …) keep
their meaning and are not repeated here.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

OFF = "KGTRUN_OFF"
RUN_DIR = "KGTRUN_RUN_DIR"
POLICY = "KGTRUN_POLICY"
TOTAL_STEPS = "KGTRUN_TOTAL_STEPS"
DETERMINISTIC = "KGTRUN_DETERMINISTIC"
DROP_IN = "KGTRUN_DROP_IN"
REFERENCE_DIR = "KGTRUN_REFERENCE_DIR"
NUM_REFERENCES = "KGTRUN_NUM_REFERENCES"
REFERENCE_INDEX = "KGTRUN_REFERENCE_INDEX"
REFERENCE_PRECISION = "KGTRUN_REFERENCE_PRECISION"
CPUS = "KGTRUN_CPUS"
CACHE = "KGTRUN_CACHE"
CACHE_DIR = "KGTRUN_CACHE_DIR"
CACHE_BYTES = "KGTRUN_CACHE_BYTES"
CACHE_DTYPE = "KGTRUN_CACHE_DTYPE"
LAUNCH_ID = "KGTRUN_LAUNCH_ID"
RUNTIME_DIR = "KGTRUN_RUNTIME_DIR"
HEARTBEAT = "KGTRUN_HEARTBEAT"
ERROR_FILE = "KGTRUN_ERROR_FILE"
STACK_FILE = "KGTRUN_STACK_FILE"
RANK_ON_NODE = "KGTRUN_RANK_ON_NODE"

DESCRIPTIONS: dict[str, str] = {
    OFF: "1: FreezeAwareDDP behaves as plain DistributedDataParallel",
    RUN_DIR: "directory of this run's events, logs and result",
    POLICY: "freezing policy and its options, for example linear:start=0.25,stop=0.75",
    TOTAL_STEPS: "optimizer steps of the whole job, for policies that plan by progress",
    DETERMINISTIC: "1: decisions consume scores at a fixed lag, so that a run can be repeated",
    DROP_IN: "0: leave torch's DistributedDataParallel as it is",
    REFERENCE_DIR: "node-local directory (mode 0700) of the reference processes' sockets",
    NUM_REFERENCES: "reference processes on this node",
    REFERENCE_INDEX: "index of this reference process on its node",
    REFERENCE_PRECISION: "precision of the reference model: auto, bf16 or fp32",
    CPUS: "cores of this process, as a list like 0-3,8",
    CACHE: "activation cache: off, auto or on",
    CACHE_DIR: "directory of the activation cache",
    CACHE_BYTES: "byte budget of the activation cache on this node",
    CACHE_DTYPE: "records of the activation cache: bf16 (the default) or exact",
    LAUNCH_ID: "marks every process of one launch, so that none is left behind",
    RUNTIME_DIR: "node-local directory (mode 0700) of this launch, removed at its end",
    HEARTBEAT: "file this trainer's progress is written to, see kgtrun.contract.heartbeat",
    ERROR_FILE: "file the boot step writes an uncaught exception of this trainer to",
    STACK_FILE: "file this trainer's stacks are appended to when the launcher asks for them",
    RANK_ON_NODE: "number of this rank on its node, also where LOCAL_RANK is 0 for all: chooses its reference",
}


def flag(name: str, *, default: bool = False, environ: Mapping[str, str] | None = None) -> bool:
    """Read an on/off variable; unset or empty is `default`.

    Raises:
        ValueError: the value is none of 0, 1, false, true, no, yes, off, on.
    """
    value = (os.environ if environ is None else environ).get(name, "").strip().lower()
    if not value:
        return default
    if value in ("1", "true", "yes", "on"):
        return True
    if value in ("0", "false", "no", "off"):
        return False
    raise ValueError(f"{name}={value!r} is not a switch: use 1 or 0")


def integer(name: str, *, environ: Mapping[str, str] | None = None) -> int | None:
    """Read a whole number that may be unset (None).

    Raises:
        ValueError: the value is not a whole number of at least 0.
    """
    value = (os.environ if environ is None else environ).get(name, "").strip()
    if not value:
        return None
    if not value.isdecimal():
        raise ValueError(f"{name}={value!r} is not a whole number of at least 0")
    return int(value)


def rank_on_node() -> int:
    """Number of this rank among those of its node: as the launcher says, or LOCAL_RANK where nobody says otherwise.

    LOCAL_RANK alone will not do. It is 0 for every rank that sees its own GPU only (Slurm's `--gpus-per-task`,
    `--virtual-local-rank`).
    """
    said = integer(RANK_ON_NODE)
    return said if said is not None else integer("LOCAL_RANK") or 0
