"""`kgtrun report RUN_DIR`: what was frozen when and why, what it saved and what it cost, as text.

Reads the run directory only. Bytes are counted; time saved is an estimate and called one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kgtrun.contract.events import read_events
from kgtrun.contract.run_dir import RunDir

Event = dict[str, Any]

TROUBLES = ("rank_failure", "hang", "reference_exit", "reference_error", "reference_refused", "not_repeatable")
"""Kinds of events that tell of something that went wrong, as launcher, trainers and references write them."""


def main(argv: Sequence[str]) -> int:
    """Print the report of one run directory.

    Raises:
        ValueError: not one argument, or not a run directory.
    """
    if len(argv) != 1 or argv[0].startswith("-"):
        raise ValueError("report takes one argument: kgtrun report RUN_DIR (the --run-dir of a run)")
    print(report(Path(argv[0])))
    return 0


def report(root: Path) -> str:
    """The report as text.

    Raises:
        ValueError: `root` holds no events of a run.
    """
    if not RunDir(root).events.is_dir():
        raise ValueError(f"{root} is no run directory: it has no events (give the --run-dir of a run)")
    events = list(read_events(root))
    parts = [_ending(root), _job(events), _freezes(events), _savings(events), _costs(events), _troubles(events)]
    return "\n\n".join(part for part in parts if part)


def _ending(root: Path) -> str:
    try:
        result = json.loads(RunDir(root).result.read_text())
    except (OSError, ValueError):
        return "The run has not ended, or its launcher was killed: there is no result.json."
    text = f"The run {result.get('status', 'ended')} with exit code {result.get('exit_code')}"
    seconds = result.get("seconds")
    text += f" after {_duration(seconds)}" if seconds is not None else ""
    text += f", {result['restarts']} restarts" if result.get("restarts") else ""
    return text + "." + (f"\n{result['message']}" if result.get("message") else "")


def _job(events: list[Event]) -> str:
    blocks = _first(events, "blocks")
    if blocks is None:
        return "Nothing could be frozen: no FreezeAwareDDP took part, or it never trained."
    names = [b["name"] for b in blocks["blocks"]]
    total = f" of {blocks['total_steps']} steps" if blocks.get("total_steps") else ""
    learned = _first(events, "job_length")
    if not total and learned is not None and learned["total_steps"]:
        total = f" of {learned['total_steps']} steps, as {learned['source']} has it"
    pace = f"a decision every {blocks['interval']} steps"
    pace += "".join(f", every {e['interval']} from step {e['step']}" for e in _of_first_rank(events, ("interval",)))
    return f"Policy {blocks['policy']}{total}, {pace}.\n{len(names)} blocks, front to back: {', '.join(names)}"


def _freezes(events: list[Event]) -> str:
    applied = _of_first_rank(events, ("apply", "resume"))
    if not applied:
        return "No block was frozen."
    lines = ["Frozen front blocks, and why:"]
    for event in applied:
        decision = _decision_for(events, event)
        why = "resumed from a checkpoint" if event["kind"] == "resume" else (decision or {}).get("reason", "")
        rate = f", learning rate {event['learning_rate']:.3g}" if event.get("learning_rate") is not None else ""
        at_mean = ", at the mean of their last weights" if event.get("at_mean") else ""
        lines.append(f"  step {event['step']:>7}: {event['was']} -> {event['frontier']}{at_mean}{rate}; {why}")
    return "\n".join(lines)


def _decision_for(events: list[Event], applied: Event) -> Event | None:
    """The last decision before a mask was applied that asked for it."""
    asked = [
        e
        for e in events
        if e["kind"] == "decision" and e["step"] <= applied["step"] and e["frontier"] == applied["frontier"]
    ]
    return asked[-1] if asked else None


def _savings(events: list[Event]) -> str:
    ends = [e for e in events if e["kind"] == "trainer_end"]
    if not ends:
        return ""
    end = min(reversed(ends), key=lambda e: e["index"])  # its last: counters go on through a checkpoint
    reduced, dropped = end["reduced_bytes"], end["dropped_bytes"]
    share = dropped / (reduced + dropped) if reduced + dropped else 0.0
    lines = [
        f"Saved, on rank {end['index']}, over {end['steps']} steps:",
        f"  gradient bytes not reduced: {_bytes(dropped)} of {_bytes(reduced + dropped)} ({share:.0%}), counted",
    ]
    if end.get("saved_s_estimate") is not None and end["freezes"]:
        lines.append(
            f"  time: about {_duration(end['saved_s_estimate'])}, estimated from steps before the first freeze"
        )
    cache = end.get("cache") or {}
    if cache.get("hits"):
        rate = cache["hits"] / (cache["hits"] + cache.get("misses", 0))
        lines.append(f"  samples whose frozen forward was read from the cache: {cache['hits']} ({rate:.0%}), counted")
    return "\n".join(lines)


def _costs(events: list[Event]) -> str:
    applied = _of_first_rank(events, ("apply",))
    lines = []
    if applied:
        seconds = sum(e["seconds"] for e in applied)
        lines.append(f"  applying {len(applied)} masks: {_duration(seconds)}")
    scores = [e for e in events if e["kind"] == "reference_score"]
    if scores:
        # An evaluation gives a score for each distance, and each tells the cost of the whole.
        names = ("host", "pid", "generation", "step", "cost_s")
        evaluations = {tuple(map(e.get, names)): e.get("cpu_s") or 0.0 for e in scores}
        cpu = _duration(sum(evaluations.values()))
        lines.append(f"  reference processes: {len(evaluations)} evaluations, {cpu} of computing")
    return "\n".join(["Cost:", *lines]) if lines else ""


def _troubles(events: list[Event]) -> str:
    counts: dict[str, int] = {}
    for event in events:
        if event["kind"] in TROUBLES:
            counts[event["kind"]] = counts.get(event["kind"], 0) + 1
    if not counts:
        return ""
    return "Noticed: " + ", ".join(f"{kind.replace('_', ' ')} {n} times" for kind, n in sorted(counts.items()))


def _first(events: list[Event], kind: str) -> Event | None:
    return next((e for e in events if e["kind"] == kind), None)


def _of_first_rank(events: list[Event], kinds: tuple[str, ...]) -> list[Event]:
    """Events of the lowest rank that wrote any: all ranks write the same masks."""
    found = [e for e in events if e["kind"] in kinds]
    lowest = min((e["index"] for e in found), default=0)
    return [e for e in found if e["index"] == lowest]


def _bytes(number: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if abs(number) < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"


def _duration(seconds: float) -> str:
    if abs(seconds) < 1:
        return f"{seconds * 1000:.0f} ms"
    if abs(seconds) < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min"
