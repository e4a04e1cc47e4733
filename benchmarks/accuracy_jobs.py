"""The jobs whose time to accuracy is compared: their scripts and sizes, and the command line of each under each policy.

`none` is torchrun with torch's own DistributedDataParallel and nothing of ours; all other policies are kgtrun's, with the
activation cache where `+cache` follows the name. `PACE` is a second plain job, for the machine's pace of the hour.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import epoch_gate
from benchmarks.accuracy_summary import PLAIN
from benchmarks.machine import ROOT

CACHE = "+cache"
PACE = "pace"
"""Name of the plain job that runs for `PACE_EPOCHS` epochs where the whole plain run is from another heat."""
KEPT_VARIABLES = ("KGTRUN_FASHION_MNIST_DIR", "KGTRUN_LANGUAGE_DIR")


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A script and its size."""

    script: str
    options: Mapping[str, Any]
    quick_options: Mapping[str, Any] = field(default_factory=dict)
    num_ranks: int = 2
    threads_per_rank: int = 1
    turn_timeout_s: float = 3 * 3600.0


WORKLOADS = {
    "vision": Workload(
        script="fashion_resnet.py",
        options={
            **{"epochs": 10, "batch-size": 128, "lr": 0.1},
            **{"train-images": 60_000, "test-images": 10_000, "val-images": 10_000},
        },
        quick_options={"epochs": 2, "train-images": 512, "test-images": 500, "val-images": 500},
    ),
    "text": Workload(
        script="minilm_newsgroups.py",
        options={
            **{"epochs": 3, "batch-size": 16, "lr": 5e-5, "max-tokens": 64},
            **{"train-texts": 4_000, "test-texts": 7_528, "val-texts": 2_000},
        },
        quick_options={"epochs": 2, "max-tokens": 16, "train-texts": 64, "test-texts": 64, "val-texts": 64},
    ),
}


def settings(name: str, *, quick: bool, changed: Mapping[str, Any]) -> dict[str, Any]:
    """What two runs must have in common to be compared, as plain data; options that a workload has not are not changed."""
    workload = WORKLOADS[name]
    options = {**workload.options, **(workload.quick_options if quick else {})}
    options |= {key: value for key, value in changed.items() if key in options and value is not None}
    threads = max(len(os.sched_getaffinity(0)) // workload.num_ranks, 1)
    return {**asdict(workload), "options": options, "quick_options": None, "threads_per_rank": threads}


def command(policy: str, chosen: Mapping[str, Any], seed: int, *, folder: Path, name: str) -> list[str]:
    """The command line of one run. Its script is the gate, whose script is the example."""
    # A port of its own and a static rendezvous: torch's dynamic one takes a launcher that was stopped for one that is dead.
    launch = ["--master-port", str(_free_port()), "--nproc-per-node", str(chosen["num_ranks"])]
    script = [str(Path(epoch_gate.__file__)), str(ROOT / "examples" / chosen["script"]), "--seed", str(seed)]
    for option, value in chosen["options"].items():
        script += [f"--{option}", str(value)]
    script += ["--json-out", str(folder / f"{name}.json")]
    if policy in (PLAIN, PACE):
        return [sys.executable, "-m", "torch.distributed.run", *launch, *script, "--stock-ddp"]
    ours = ["--policy", policy.removesuffix(CACHE), "--cache", "auto" if policy.endswith(CACHE) else "off"]
    ours += ["--hang-timeout", "0", "--run-dir", str(folder / name)]  # stopped is not hung
    return [sys.executable, "-m", "kgtrun", *launch, *ours, *script]


def environment(chosen: Mapping[str, Any], environ: Mapping[str, str]) -> dict[str, str]:
    """The same for all runs: nothing of ours but where the data is, and the same threads a rank under both launchers."""
    kept = {k: v for k, v in environ.items() if not k.startswith("KGTRUN_") or k in KEPT_VARIABLES}
    return {**kept, "OMP_NUM_THREADS": str(chosen["threads_per_rank"])}


def run_name(workload: str, policy: str, seed: int) -> str:
    """A file name of it."""
    return f"{workload}-{''.join(c if c.isalnum() or c in '+-.' else '_' for c in policy)}-seed{seed}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
