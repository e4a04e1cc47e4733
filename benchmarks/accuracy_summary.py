"""From finished runs to what is reported: quality over time, time to target, what was frozen, what knowing cost.

Pure: records in, numbers out. A record is one run of `benchmarks.time_to_accuracy`: its turns, the figures its script wrote
(accuracy after each epoch, seconds of validation, what froze when), its workload, policy and seed.

Quality after an epoch is accuracy in percent on the validation texts or images; after the last one, final quality, it is
that on the whole test set. (Validation of `text` is 2,000 texts, on which two equally good models easily differ by a point.)
The clock of a run is the sum of its own turns up to the end of an epoch, start-up included, less its validations and its
final test: those are the yardstick, not the job. The target of a seed is plain training's final quality with that seed,
less `TARGET_POINTS`; it is reached at the end of the first epoch whose quality is at least that, without
interpolation. `plain` is stock DDP under torchrun, policy "none".

A run that took its turns in another heat than its plain run met another hour of the machine, or another machine. There, a
plain job ran `PACE_EPOCHS` epochs in the heat's turns, which are in the record as `pace`: the clocks of the plain run go by
them (each of its epochs costs the same), `plain_clock` says so, and quality stays that of the whole plain run.

The same seed trains another model on another kind of CPU, also where torch names the same instructions: kernels differ, and
sums are rounded otherwise. What was trained before anything froze tells: the mean loss of the first epoch is then the same to
the last digit or it is not. A run is compared with a plain run of its own heat, else of its own first loss, and
`plain_model` is "same"; if there is none, with the last there is, and it is "another".
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

PLAIN = "none"
PACE_EPOCHS = 2
TARGET_POINTS = 0.3

Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Course:
    """One run, epoch by epoch."""

    seconds: list[float]
    """On the run's clock, at the end of each epoch."""
    cpu_s: list[float]
    """CPU seconds of the whole process tree until then, without validations."""
    seconds_with_validation: list[float]
    quality: list[float]
    """Percent, after each epoch; the last is of the whole test set."""


def same_model(record: Record, plain: Record) -> bool:
    """Would both have trained the same model, had neither frozen anything? (Of another heat a run that froze in its first epoch
    counts as another.)"""
    first, theirs = (one["result"]["epochs"][0]["loss"] for one in (record, plain))
    return bool(record["heat"] == plain["heat"] or first == theirs)


def course(record: Record) -> Course:
    """The course of one run.

    Raises:
        ValueError: turns and epochs do not belong together.
    """
    epochs = record["result"]["epochs"]
    turns = {turn["place"]: turn for turn in record["turns"]}
    if [t["place"] for t in record["turns"]] != ["start", *map(str, range(len(epochs))), "exit"]:
        raise ValueError(f"{len(epochs)} epochs, but the turns were {', '.join(turns)}")
    wall_s, cpu_s, validation_s = turns["start"]["wall_s"], turns["start"]["cpu_s"], 0.0
    seconds, cpu, with_validation = [], [], []
    for index, epoch in enumerate(epochs):
        wall_s += turns[str(index)]["wall_s"]
        cpu_s += turns[str(index)]["cpu_s"] - epoch["val_cpu_s"]
        validation_s += epoch["val_wall_s"]
        if index == len(epochs) - 1:  # the final test is in the turn of the last epoch
            cpu_s -= record["result"]["test_cpu_s"]
            validation_s += record["result"]["test_wall_s"]
        seconds.append(wall_s - validation_s)
        cpu.append(cpu_s)
        with_validation.append(wall_s)
    quality = [_percent(accuracy) for accuracy in (*(e["accuracy"] for e in epochs[:-1]), record["result"]["accuracy"])]
    return Course(seconds=seconds, cpu_s=cpu, seconds_with_validation=with_validation, quality=quality)


def plain_clock(record: Record, plain: Record) -> str:
    """How the plain run's time is known beside this one's: "same turns", "paced" (see the module) or "other turns"."""
    if record["heat"] == plain["heat"]:
        return "same turns"
    return "paced" if record.get("pace") else "other turns"


def paced(plain: Course, record: Record, plain_record: Record) -> Course:
    """The plain course as long as it would have taken in the turns of `record`; as it is where no pace was taken."""
    if plain_clock(record, plain_record) != "paced":
        return plain

    def factor(clock: str) -> float:
        # Whole turns on both sides, validation included, without start and exit: what an epoch is, here and there. The
        # last one holds the final test, which a pace does not have.
        here, there = (
            [t[clock] for t in turns if t["place"].isdigit()] for turns in (record["pace"], plain_record["turns"])
        )
        return statistics.fmean(here) / statistics.fmean(there[:-1])

    wall, cpu = factor("wall_s"), factor("cpu_s")
    return Course(
        seconds=[wall * s for s in plain.seconds],
        cpu_s=[cpu * s for s in plain.cpu_s],
        seconds_with_validation=[wall * s for s in plain.seconds_with_validation],
        quality=plain.quality,
    )


def time_to(target: float, seconds: Sequence[float], quality: Sequence[float]) -> float | None:
    """Seconds at the end of the first epoch whose quality is at least `target`; None: it was never reached."""
    # A millionth of a point: 91.6 - 0.3 is not 91.3 in binary.
    return next((s for s, q in zip(seconds, quality, strict=True) if q >= target - 1e-6), None)


def frozen_fraction(record: Record) -> float:
    """Share of all (block, step) pairs in which the block was frozen; blocks that thawed count until then."""
    freezing, steps = record["result"].get("freezing", {}), record["result"]["steps"]
    freezes = freezing.get("freezes", [])
    ends = [entry["step"] for entry in freezes[1:]] + [steps]
    held = sum(entry["frontier"] * (end - entry["step"]) for entry, end in zip(freezes, ends, strict=False))
    return held / (freezing["num_blocks"] * steps) if held else 0.0


def overhead_fraction(record: Record) -> float:
    """CPU seconds of the reference processes over those of the whole job."""
    return sum(t["reference_cpu_s"] for t in record["turns"]) / sum(t["cpu_s"] for t in record["turns"])


def compare(record: Record, plain: Record) -> dict[str, Any]:
    """One run against the plain run of its seed, as plain data: ratios above 1 mean that plain took longer."""
    mine, theirs = course(record), paced(course(plain), record, plain)
    target = theirs.quality[-1] - TARGET_POINTS

    def ratio(clock: str) -> float | None:
        ours = time_to(target, getattr(mine, clock), mine.quality)
        base = time_to(target, getattr(theirs, clock), theirs.quality)
        return base / ours if ours and base else None

    return {
        "workload": record["workload"],
        "policy": record["policy"],
        "seed": record["seed"],
        "target": target,
        "final_quality": _percent(record["result"]["accuracy"]),
        "plain_quality": _percent(plain["result"]["accuracy"]),
        "seconds_to_target": time_to(target, mine.seconds, mine.quality),
        "time_to_target_ratio": ratio("seconds"),
        "time_to_target_ratio_with_validation": ratio("seconds_with_validation"),
        "cpu_to_target_ratio": ratio("cpu_s"),
        "whole_job_ratio": theirs.seconds[-1] / mine.seconds[-1],
        "frozen_fraction": frozen_fraction(record),
        "overhead_fraction": overhead_fraction(record),
        "plain_clock": plain_clock(record, plain),
        "plain_model": "same" if same_model(record, plain) else "another",
        "course": vars(mine),
        "freezes": record["result"].get("freezing", {}).get("freezes", []),
        "num_blocks": record["result"].get("freezing", {}).get("num_blocks"),
        "steps": record["result"]["steps"],
        "commit": record["commit"],
    }


def compared(records: Iterable[Record]) -> list[dict[str, Any]]:
    """Every run of which there is a plain one of the same workload and seed, compared with that; by policy, then seed.

    Of several plain runs of one seed only the last is listed.
    """
    records = list(records)
    plain: dict[tuple[str, int], list[Record]] = {}
    for record in records:
        if record["policy"] == PLAIN:
            plain.setdefault((record["workload"], record["seed"]), []).append(record)

    def partner(record: Record) -> Record | None:
        candidates = plain.get((record["workload"], record["seed"]), [])
        # Of equals the last: `max` takes the first it meets.
        return max(
            reversed(candidates), key=lambda c: (c["heat"] == record["heat"], same_model(record, c)), default=None
        )

    chosen = [r for r in records if r["policy"] != PLAIN] + [runs[-1] for runs in plain.values()]
    chosen.sort(key=lambda r: (r["workload"] != "vision", r["workload"], r["policy"] != PLAIN, r["policy"], r["seed"]))
    return [compare(r, theirs) for r in chosen if (theirs := partner(r)) is not None]


def by_policy(runs: Iterable[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Compared runs by (workload, policy), a run a seed."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault((run["workload"], run["policy"]), []).append(run)
    return groups


def summary(runs: Iterable[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """The table of all policies: medians over seeds; lists are a number a seed, in order of seeds.

    A policy has a `time_to_target_ratio` only if it reached the target with every seed.
    """
    table: dict[str, dict[str, dict[str, Any]]] = {}
    for (workload, policy), seeds in by_policy(runs).items():
        ratios = [run["time_to_target_ratio"] for run in seeds]
        table.setdefault(workload, {})[policy] = {
            "time_to_target_ratio": None if None in ratios else statistics.median(ratios),
            "final_quality": [run["final_quality"] for run in seeds],
            "plain_quality": [run["plain_quality"] for run in seeds],
            "frozen_fraction": statistics.median(run["frozen_fraction"] for run in seeds),
            "overhead_fraction": statistics.median(run["overhead_fraction"] for run in seeds),
        }
    return table


def _percent(share: float) -> float:
    """To a thousandth of a point: a hundredth is one image of 10,000."""
    return round(100 * share, 3)
