"""The command line: parse, call one function, print, return the exit code.

The first word selects a subcommand when it is one of SUBCOMMANDS; everything else is a launch as torchrun's. A training
script of such a name is started as `kgtrun ./report` or after any option.

Exit codes: 0; the first failing rank's; 128+N for signal N; 2 for a command line that cannot be understood.
"""

from __future__ import annotations

import importlib
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from kgtrun.argv import UsageError, read
from kgtrun.options import ALL, Option
from kgtrun.version import VERSION

USAGE_ERROR = 2

SUBCOMMANDS: dict[str, tuple[str, str]] = {
    "report": ("kgtrun.report", "what a run saved: kgtrun report RUN_DIR"),
    "doctor": ("kgtrun.doctor", "what this machine offers, and what stands in the way"),
    "slurm-script": ("kgtrun.slurm_script", "write a batch script for Slurm"),
}
"""Name → module with `main(argv) -> int`, imported when called; what it does."""


def main(argv: Sequence[str]) -> int:
    """Run one command line and return its exit code."""
    try:
        if argv and argv[0] in SUBCOMMANDS:
            return subcommand(argv[0], argv[1:])
        return launch_command(argv)
    except ValueError as error:
        print(f"kgtrun: {error}", file=sys.stderr)
        return USAGE_ERROR


def subcommand(name: str, argv: Sequence[str]) -> int:
    """Hand the rest of the line to the module that owns the subcommand."""
    module_name = SUBCOMMANDS[name][0]
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name != module_name:
            raise UsageError(f"{name} needs the package {error.name}, which is not installed") from None
        raise UsageError(f"{name} is not part of this version") from None
    return int(module.main(list(argv)) or 0)


def launch_command(argv: Sequence[str]) -> int:
    """`kgtrun [options] train.py [args]`."""
    request = read(argv)
    if request.flag("help"):
        print(help_text())
        return 0
    if request.flag("version"):
        print(f"kgtrun {VERSION}")
        return 0
    from kgtrun.plan import describe, make_plan

    if request.flag("dry_run"):
        data = describe(make_plan(request))
        print(json.dumps(data, indent=2) if request.flag("json") else "\n".join(_outline(data)))
        return 0
    plan = make_plan(request, taken=_taken)
    logging.basicConfig(format="kgtrun: %(message)s", level=logging.WARNING)
    logging.getLogger("launcher").setLevel(logging.INFO)
    from kgtrun.live import progress_line
    from launcher.supervisor import Supervisor

    try:
        plan.run_dir.mkdir(parents=True, exist_ok=True)
        (plan.run_dir / "plan.json").write_text(json.dumps(describe(plan), indent=2) + "\n")
    except OSError as error:
        raise ValueError(f"no run directory {plan.run_dir}: {error.strerror}; choose another with --run-dir") from None
    supervisor = Supervisor(plan)
    with progress_line(lambda: now.words() if (now := supervisor.progress()) else None):
        outcome = supervisor.run()
    if outcome.report():
        print(outcome.report(), file=sys.stderr)
    return outcome.exit_code


def _taken(directory: Path) -> bool:
    """Whether another launch has the directory; if not, this one has it from now on."""
    try:
        directory.mkdir(parents=True)
    except OSError as error:
        return isinstance(error, FileExistsError)  # what else is wrong is told where the directory is used
    return False


def help_text() -> str:
    """Written without click or argparse: --help is the first thing anyone types, and should not wait for imports."""
    lines = ["usage: kgtrun [options] train.py [its arguments]"]
    lines += [f"       kgtrun {name:<14}{what}" for name, (_, what) in SUBCOMMANDS.items()]
    for title, rows in (
        ("kgtrun's own options:", [o for o in ALL if o.ours]),
        ("torchrun's options, with torchrun's meaning:", [o for o in ALL if not o.ours]),
    ):
        lines += ["", title, *(line for option in rows for line in _option_help(option))]
    return "\n".join(lines)


def _option_help(option: Option) -> list[str]:
    import textwrap

    value = "" if option.flag else " " + ("|".join(option.choices) or option.metavar)
    head = "  " + (f"-{option.short}, " if option.short else "") + f"--{option.name}{value}"
    tail = option.help
    if option.default and not option.flag:
        tail += f" [{option.default}]"
    body = textwrap.wrap(tail, 84)
    indent = " " * 32
    if len(head) <= 30:
        return [f"{head:<32}{body[0]}", *(indent + line for line in body[1:])]
    return [head, *(indent + line for line in body)]


def _outline(data: dict, depth: int = 0) -> list[str]:
    """A plan as indented text."""
    lines = []
    for key, value in data.items():
        if isinstance(value, dict) and value:
            lines += [f"{'  ' * depth}{key}:", *_outline(value, depth + 1)]
        else:
            shown = " ".join(map(str, value)) if isinstance(value, list) else value
            lines.append(f"{'  ' * depth}{key}: {shown}")
    return lines
