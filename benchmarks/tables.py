"""The tables of docs/benchmarks.md, made from `benchmarks/results/*.json`: no figure in these is typed by hand.

    python -m benchmarks.tables            what would change; exit code 1 if anything would
    python -m benchmarks.tables --write    change it

A table stands between `<!-- table: NAME -->` and `<!-- end: NAME -->`, NAME being a results file without `.json`. Where the
file is missing, the page says that the benchmark has not been run. `summary` is the comparison of policies; every other
name is a table of figures with their spread.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS
from benchmarks.machine import ROOT

PAGE = ROOT / "docs" / "benchmarks.md"
_TABLE = re.compile(r"<!-- table: (?P<name>\S+) -->\n.*?<!-- end: (?P=name) -->", re.DOTALL)
NOT_RUN = "*Not measured yet: there is no `benchmarks/results/{name}.json`. `python -m benchmarks.{module}` makes it.*"


def figures(record: Mapping[str, Any]) -> str:
    """All figures of one benchmark, with quartiles where they were sampled, and under what they were measured."""
    rows = ["| figure | median | quartiles | samples |", "|---|---|---|---|"]
    for key, value in record["figures"].items():
        spread = record["spread"].get(key)
        between = f"{_text(spread['q1'])} to {_text(spread['q3'])}" if spread and spread["count"] > 1 else ""
        rows.append(f"| `{key}` | {_text(value)} | {between} | {spread['count'] if spread else 'counted'} |")
    return "\n".join([*rows, "", _where(record["machine"])])


def policies(table: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """`summary.json`: a row a workload and policy. Quality in percent, mean and the value of each seed."""
    rows = [
        "| workload | policy | plain over policy, time to target | final quality | against plain, points | frozen | overhead |",
        "|---|---|---|---|---|---|---|",
    ]
    for workload, by_policy in table.items():
        for policy, found in by_policy.items():
            ratio, ours, plain = found["time_to_target_ratio"], found["final_quality"], found["plain_quality"]
            each = ", ".join(f"{quality:.2f}" for quality in ours)
            change = statistics.fmean(ours) - statistics.fmean(plain)
            rows.append(
                f"| {workload} | {'plain DDP' if policy == 'none' else f'`{policy}`'} "
                f"| {'not reached with every seed' if ratio is None else f'{ratio:.2f}'} "
                f"| {statistics.fmean(ours):.2f} ({each}) | {change:+.2f} "
                f"| {found['frozen_fraction']:.0%} | {found['overhead_fraction']:.1%} |"
            )
    return "\n".join(rows)


RENDERERS: dict[str, Callable[[Any], str]] = {"summary": policies}
MODULES = {"summary": "time_to_accuracy", "freeze_time_avx2": "freeze_time"}
"""Where the results file has not the name of its benchmark."""


def rendered(page: str, results: Path) -> str:
    """The page with every table as the results say."""

    def table(match: re.Match[str]) -> str:
        name = match["name"]
        source = results / f"{name}.json"
        if source.is_file():
            text = RENDERERS.get(name, figures)(json.loads(source.read_text()))
        else:
            text = NOT_RUN.format(name=name, module=MODULES.get(name, name))
        return f"<!-- table: {name} -->\n{text}\n<!-- end: {name} -->"

    return _TABLE.sub(table, page)


def _text(value: Any) -> str:
    return "none" if value is None else f"{value:.4g}" if isinstance(value, float) else f"{value}"


def _where(machine: Mapping[str, Any]) -> str:
    load = f"load {machine['load_before']:.1f} before, {machine['load_after']:.1f} after"
    return (
        f"{machine['cpu']}, {machine['cores']} cores, torch {machine['torch']}, commit `{machine['commit']}`, "
        f"{machine['date'][:10]}, {load}."
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The tables of docs/benchmarks.md from benchmarks/results/")
    parser.add_argument("--write", action="store_true", help="write the page; otherwise only show what would change")
    args = parser.parse_args(argv)
    old = PAGE.read_text()
    new = rendered(old, RESULTS)
    if args.write:
        PAGE.write_text(new)
        return 0
    sys.stdout.writelines(difflib.unified_diff(old.splitlines(True), new.splitlines(True), "the page", "the results"))
    return int(old != new)


if __name__ == "__main__":
    sys.exit(main())
