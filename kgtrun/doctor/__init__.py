"""`kgtrun doctor`: what this machine offers a run, and what stands in its way, each problem with its cure.

Starts nothing, listens on nothing but a port it tries and lets go, changes nothing. Exit code 1 when there is a
problem.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

import click

from kgtrun.doctor import machine, network, software
from kgtrun.doctor.finding import Finding

CHECKS: tuple[Callable[[], list[Finding]], ...] = (
    software.versions,
    software.accelerators,
    machine.cores,
    machine.memory,
    machine.limits,
    machine.directories,
    network.hostname,
    network.interfaces,
    network.ports,
)


def examine() -> list[Finding]:
    """All checks; one that fails itself is a finding, too."""
    found: list[Finding] = []
    for check in CHECKS:
        try:
            found += check()
        except Exception as error:
            topic = f"{check.__module__.rpartition('.')[2]}.{check.__name__}"
            found.append(Finding(topic, f"could not be checked: {type(error).__name__}: {error}"))
    return found


@click.command(name="kgtrun doctor", help="What this machine offers a run, and what stands in its way.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(as_json: bool) -> int:
    found = examine()
    if as_json:
        click.echo(json.dumps([vars(finding) for finding in found], indent=2))
    else:
        width = max(len(finding.topic) for finding in found)
        for finding in found:
            mark = " " if not finding.cure else "!" if finding.serious else "?"
            click.echo(f"{mark} {finding.topic:<{width}}  {finding.words}")
            if finding.cure:
                click.echo(f"  {'':<{width}}  cure: {finding.cure}")
    return int(any(finding.cure and finding.serious for finding in found))


def main(argv: Sequence[str]) -> int:
    """Entry point of the subcommand."""
    try:
        return command.main(list(argv), standalone_mode=False) or 0
    except click.ClickException as error:
        raise ValueError(error.format_message()) from None
