"""`kgtrun slurm-script [options] train.py`: writes a batch script for sbatch, ready to submit.

Owns the text of the script. kgtrun's own options, told apart from Slurm's by the table below, go to the `srun kgtrun`
line as they were typed; `--nnodes` becomes the job's number of nodes. Nothing is submitted and Slurm need not be here.

The script starts one task a node, asks for a warning before the time limit, allows the job to be requeued and appends to
its output, so that what was there before a requeue stays.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from kgtrun.argv import Request, UsageError, read
from kgtrun.options import ALL, Option
from launcher.slurm import count_gpus

_CORES_PER_GPU = 4

SLURM: tuple[Option, ...] = (
    Option(name="job-name", help="Name of the job (default: that of the script).", metavar="NAME"),
    Option(name="partition", help="Partition.", metavar="NAME"),
    Option(name="account", help="Account to charge.", metavar="NAME"),
    Option(name="qos", help="Quality of service.", metavar="NAME"),
    Option(name="time", help="Time limit, as [DAYS-]HH:MM:SS or minutes.", metavar="TIME"),
    Option(name="gpus-per-node", help="GPUs of each node: 4, or a100:4. One rank each.", metavar="N"),
    Option(
        name="cpus-per-task", help="Cores of each node that the job gets (default: 4, or 4 for each GPU).", metavar="N"
    ),
    Option(name="mem", help="Memory of each node, as 64G.", metavar="SIZE"),
    Option(name="array", help="Run as an array of jobs: 0-9, or 0-9%2 for two at a time.", metavar="RANGE"),
    Option(
        name="warn-s", help="Seconds before the time limit at which ranks get USR1.", default="90", metavar="SECONDS"
    ),
    Option(name="output", help="File of the job's output (default: slurm-%j.out).", metavar="FILE"),
    Option(
        name="setup", help="Shell commands to run first: module load, source .venv/bin/activate.", metavar="COMMANDS"
    ),
    Option(name="write", help="Write to this file, instead of printing.", metavar="FILE"),
)

_TIME = re.compile(r"\d+|(\d+-)?\d+(:\d+){0,2}")


def main(argv: list[str]) -> int:
    """Print or write the script; returns the exit code."""
    if not argv or argv[0] in ("-h", "--help"):
        print(help_text())
        return 0
    request = read(argv, {}, SLURM + ALL)
    text = script(request)
    if not request.text("write"):
        print(text, end="")
        return 0
    path = Path(request.text("write"))
    path.write_text(text)
    path.chmod(0o755)
    print(f"{path} is written: sbatch {path}", file=sys.stderr)
    return 0


def help_text() -> str:
    lines = ["usage: kgtrun slurm-script [options] [kgtrun's options] train.py [its arguments]", ""]
    lines += [f"  --{option.name + ' ' + option.metavar:<26}{option.help}" for option in SLURM]
    return "\n".join(
        [*lines, "", "  All options of kgtrun are passed on to it; --nnodes is the job's number of nodes."]
    )


def script(request: Request) -> str:
    """The text of the batch script.

    Raises:
        UsageError: an option has no usable value, or there is no training script.
    """
    if not request.script:
        raise UsageError("no training script given: kgtrun slurm-script [options] train.py [its arguments]")
    return "\n".join(
        [
            "#!/bin/bash",
            *(f"#SBATCH --{name}={value}" if value else f"#SBATCH --{name}" for name, value in directives(request)),
            "",
            "set -euo pipefail",
            *([request.text("setup")] if request.text("setup") else []),
            "",
            "# srun takes no notice of sbatch's --cpus-per-task since Slurm 22.05: it must be told.",
            'srun --cpus-per-task="$SLURM_CPUS_PER_TASK" \\',
            f"    {command(request)}",
            "",
        ]
    )


def directives(request: Request) -> list[tuple[str, str]]:
    """sbatch's options, in order; the value is empty for switches."""
    gpus = request.text("gpus_per_node")
    cores = request.text("cpus_per_task") or str(_CORES_PER_GPU * max(1, _number_of_gpus(gpus)))
    nodes = request.text("nnodes").rpartition(":")[2]
    time_limit = request.text("time")
    if time_limit and not _TIME.fullmatch(time_limit):
        raise UsageError(f"--time is {time_limit!r}: use minutes, HH:MM:SS or DAYS-HH:MM:SS")
    for name, value in (("cpus-per-task", cores), ("nnodes", nodes), ("warn-s", request.text("warn_s"))):
        if not value.isdecimal():
            raise UsageError(f"--{name} is {value!r}: a whole number is needed")
    found = [
        ("job-name", request.text("job_name") or Path(request.script[0]).stem),
        *((name, request.text(name)) for name in ("partition", "account", "qos")),
        ("nodes", nodes),
        ("ntasks-per-node", "1"),
        ("cpus-per-task", cores),
        ("gpus-per-node", gpus),
        ("mem", request.text("mem")),
        ("time", time_limit),
        ("array", request.text("array")),
        ("output", request.text("output") or ("slurm-%A_%a.out" if request.text("array") else "slurm-%j.out")),
    ]
    return [
        *((name, value) for name, value in found if value),
        ("open-mode", "append"),
        ("signal", f"USR1@{request.text('warn_s')}"),
        ("requeue", ""),
    ]


def _number_of_gpus(text: str) -> int:
    try:
        return count_gpus(text) if text else 0
    except ValueError as error:
        raise UsageError(f"--gpus-per-node: {error}") from None


def command(request: Request) -> str:
    """`kgtrun OPTIONS train.py ARGS` with what was given, quoted for the shell."""
    options: Sequence[Option] = [o for o in ALL if o.dest in request.given and o.name != "nnodes"]
    words = ["kgtrun"]
    if ":" in request.text("nnodes"):
        words.append(f"--nnodes={request.text('nnodes')}")
    words += [f"--{o.name}" if o.flag else f"--{o.name}={request.text(o.dest)}" for o in options]
    return shlex.join([*words, *request.script]).replace(os.linesep, " ")
