"""A trace of what a finished run's policy was fed, from its events: what would another rule have done with these scores?

    python -m benchmarks.trace_of_run RUN_DIR --out trace.json

The trace (`benchmarks.traces`) has what a run records: step, learning rate and plasticity. It holds for another policy up to
the run's own first freeze, and for the blocks that are not frozen beyond it; frozen ones score zero.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.traces import SIGNALS, rounded, write
from kgt_ddp.signals import longer_lags, score_lags
from kgtrun.contract.events import read_events


def trace_of(events: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Each decision with the scores that came since the one before; their mean where several ranks had one.

    Raises:
        ValueError: no decision was recorded, or the distances changed with the interval: a trace has one lag.
    """
    head: dict[str, Any] = {}
    lags = (0, 0, 0)
    names: list[str] = []
    scores: list[Mapping[str, Any]] = []
    records = []
    for event in events:
        if event["kind"] == "blocks" and not names:
            names = [block["name"] for block in event["blocks"]]
            head = {"policy": event["policy"], "blocks": names, "total_steps": event["total_steps"]}
            lags = score_lags(event["interval"])
            head |= {"interval": event["interval"], "lag_steps": lags[0]}
        elif event["kind"] == "interval":
            if longer_lags(lags, event["interval"]) != lags:
                raise ValueError(f"the distances changed at step {event['step']}: only runs with one lag make a trace")
            head["interval"] = event["interval"]
        elif event["kind"] == "score":
            scores.append(event)
        elif event["kind"] == "decision" and names:
            records.append(_record(event, scores, len(names), head["lag_steps"]))
            scores = []
    if not records:
        raise ValueError("no decision in the events")
    return {**head, "records": records}


def _record(
    decision: Mapping[str, Any], scores: Sequence[Mapping[str, Any]], num_blocks: int, lag_steps: int
) -> dict[str, Any]:
    record: dict[str, Any] = {"step": decision["step"], "learning_rate": decision["learning_rate"]}
    record["grad_norm"] = [None] * num_blocks
    for name, times in SIGNALS.items():
        rows = [score["values"] for score in scores if score["lag_steps"] == times * lag_steps]
        record[name] = _means(rows, num_blocks)
    record["floor"] = _means([score["floors"] for score in scores if score["lag_steps"] == lag_steps], num_blocks)
    return record


def _means(rows: Sequence[Sequence[float | None]], num_blocks: int) -> list[float | None]:
    """Block by block; None where nobody had a number."""
    columns = [[row[block] for row in rows if block < len(row)] for block in range(num_blocks)]
    known = [[value for value in column if value is not None] for column in columns]
    return [rounded(sum(values) / len(values)) if values else None for values in known]


def main(argv: Sequence[str] | None = None) -> int:
    command = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    command.add_argument("run_dir", type=Path)
    command.add_argument("--out", type=Path, required=True)
    args = command.parse_args(argv)
    if not args.run_dir.is_dir():
        command.error(f"{args.run_dir} is no run directory")
    try:
        write(trace_of(read_events(args.run_dir)), args.out)
    except ValueError as error:
        command.error(f"{args.run_dir}: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
