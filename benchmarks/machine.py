"""Where and from which code figures were measured. Holds no host name, path or user."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]


def cpu_model() -> str:
    return _cpuinfo("model name") or platform.machine()


def arithmetic() -> str:
    """What decides how sums are rounded on this CPU, as far as we can tell: the instructions that torch computes with, and
    the processor's family and model, by which its libraries choose their kernels ("AVX512, 6-207"). With others the same
    seed trains another model, as different as one of another seed."""
    return f"{torch.backends.cpu.get_cpu_capability()}, {_cpuinfo('cpu family')}-{_cpuinfo('model')}"


def _cpuinfo(key: str) -> str:
    """Of the first processor; empty where the system does not say."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return ""


def commit() -> str:
    """The commit of this checkout, with `+` where tracked files differ from it; empty without git."""

    def git(*args: str) -> str:
        run = subprocess.run(["git", "-C", str(ROOT), *args], capture_output=True, text=True, timeout=30)
        return run.stdout.strip() if run.returncode == 0 else ""

    try:
        head = git("rev-parse", "--short=12", "HEAD")
        return head + "+" if head and git("status", "--porcelain", "--untracked-files=no") else head
    except (OSError, subprocess.TimeoutExpired):
        return ""


def machine_facts() -> dict[str, Any]:
    """CPU, cores this process may use, memory, devices, versions, threads, commit and date."""
    facts = {
        "cpu": cpu_model(),
        "arithmetic": arithmetic(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    if torch.cuda.is_available():
        facts["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return facts
