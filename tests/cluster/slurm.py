"""A real Slurm on hosts of namespaces for a test: see `slurm-cluster` in this folder."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cluster.hosts import HERE, Hosts

ROOT = HERE.parents[1]
TOOL = str(HERE / "slurm-cluster")
JOB = str(HERE / "resume_job.py")
SCRIPTS = ROOT / "scripts" / "slurm"

missing = [
    name for name in ("slurmctld", "slurmd", "munged", "srun", "ip", "nsenter", "pgrep") if not shutil.which(name)
]
freezer = Path("/sys/fs/cgroup/freezer")
reason = (
    "a real Slurm needs root"
    if os.geteuid() != 0
    else f"no {', '.join(missing)}: scripts/setup-slurm installs them"
    if missing
    else "signals as on a real cluster need cgroup v1 with a writable freezer"
    if not os.access(freezer, os.W_OK)
    else ""
)
needs_slurm = pytest.mark.skipif(bool(reason), reason=reason)


class Slurm(Hosts):
    """A Slurm that is up. Jobs run in `folder`; every command is bounded."""

    def __init__(self, environ: dict[str, str], folder: Path) -> None:
        super().__init__(environ)
        self.folder = folder

    def command(self, *words: str, **environ: str) -> str:
        return self.run("login", "env", "-C", str(self.folder), *words, **environ)

    def sbatch(self, *words: str, **environ: str) -> str:
        """Submit a script and return the job's number."""
        return self.command("sbatch", "--parsable", *words, **environ).strip()

    def show(self, job: str) -> dict[str, str]:
        return dict(re.findall(r"(\w+)=(\S*)", self.command("scontrol", "-o", "show", "job", job)))

    def wait_for_state(self, job: str, *states: str, timeout_s: float = 60) -> dict[str, str]:
        try:
            wait_until(lambda: self.show(job)["JobState"] in states, f"job {job} to be {states}", timeout_s)
        except AssertionError as error:
            raise AssertionError(f"{error}; {self.show(job)}\n{self.output(job)}") from None
        return self.show(job)

    def output(self, job: str) -> str:
        """What the job has printed so far, over all its starts."""
        path = self.folder / f"slurm-{job}.out"
        return path.read_text() if path.exists() else "no output"


def wait_until(condition: Callable[[], object], what: str, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s:g} s for {what} in vain"
        time.sleep(0.1)


def number_in(path: Path) -> int:
    """The number that a job writes, 0 before it does."""
    text = path.read_text() if path.exists() else ""
    return int(text or 0)


def starts(path: Path) -> list[dict]:
    return [json.loads(line) for line in (path / "starts").read_text().splitlines()]


@contextmanager
def slurm(nodes: int, folder: Path) -> Iterator[Slurm]:
    """A cluster of `nodes` for the time of a test; kgtrun is found by its name on all of them."""
    folder.mkdir(parents=True, exist_ok=True)
    programs = folder / "bin"
    programs.mkdir()
    (programs / "kgtrun").write_text(f'#!/bin/sh\nexec {sys.executable} -m kgtrun "$@"\n')
    (programs / "kgtrun").chmod(0o755)
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("KGTRUN_", "PET_", "OMP_", "SLURM", "SBATCH"))}
    environ = {
        **kept,
        "NETNS_CLUSTER_DIR": str(folder / "net"),
        "PROCTRACK": "cgroup",
        "PYTHONPATH": str(ROOT),
        "PATH": f"{programs}:{kept.get('PATH', '')}",
    }
    bounded = {"env": environ, "check": True, "timeout": 90, "stdin": subprocess.DEVNULL}
    try:
        subprocess.run([TOOL, "up", str(nodes)], **bounded)
        yield Slurm(environ, folder)
    finally:
        subprocess.run([TOOL, "down"], **bounded)
