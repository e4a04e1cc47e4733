"""A heat: the jobs of one workload and seed, a policy each, in turns until all have ended.

An epoch is a turn, in rotating order (`benchmarks.turns`). Each job that ends well is added to the file of finished runs at
once, so that a heat that is cut off loses only what has not ended.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import run_log
from benchmarks.accuracy_jobs import PACE, command, environment, run_name
from benchmarks.accuracy_summary import PACE_EPOCHS, PLAIN
from benchmarks.harness import order_of_round
from benchmarks.machine import arithmetic, commit
from benchmarks.turns import Job, JobFailed


def run_heat(workload: str, policies: Sequence[str], seed: int, chosen: Mapping[str, Any], folder: Path) -> list[str]:
    """Run the policies of one workload and seed in turns; each that ends well is added to the file of finished runs.

    Returns:
        What failed, as messages: a run that fails leaves the others going.
    """
    failures: list[str] = []
    if PLAIN not in policies:
        policies = [PACE, *policies]
    heat = f"{workload}-{seed}-{os.getpid()}-{'_'.join(policies)}"
    names = {policy: run_name(workload, policy, seed) for policy in policies}
    with ExitStack() as stack:
        jobs = {
            policy: stack.enter_context(_job(policy, chosen, seed, folder=folder, name=name))
            for policy, name in names.items()
        }
        pace = jobs.get(PACE)
        round_number = 0
        while set(jobs) - {PACE}:
            for policy in order_of_round(list(jobs), round_number):
                if policy == PACE and round_number not in _pace_rounds(chosen["options"]["epochs"]):
                    continue
                while (folder / "hold").exists():
                    time.sleep(1)
                job = jobs[policy]
                try:
                    turn = job.turn()
                except JobFailed as failure:
                    failures.append(str(failure))
                    print(failure, flush=True)
                    jobs.pop(policy).close()
                    continue
                print(
                    f"{names[policy]}  {turn.place:>5}  wall {turn.wall_s:7.1f} s  CPU {turn.cpu_s:7.1f} s", flush=True
                )
                if job.ended:
                    jobs.pop(policy).close()
                    result = json.loads((folder / f"{names[policy]}.json").read_text())
                    record = {"workload": workload, "policy": policy, "seed": seed, "heat": heat}
                    record |= {"settings": dict(chosen), **_course(job, pace), "result": result}
                    run_log.add(folder / "runs.jsonl", record)
            round_number += 1
    return failures


def _job(policy: str, chosen: Mapping[str, Any], seed: int, *, folder: Path, name: str) -> Job:
    shutil.rmtree(folder / name, ignore_errors=True)  # events of an attempt that was cut off
    return Job(
        command(policy, chosen, seed, folder=folder, name=name),
        env=environment(chosen, os.environ),
        cwd=folder,
        log=folder / f"{name}.log",
        turn_timeout_s=chosen["turn_timeout_s"],
    )


def _course(job: Job, pace: Job | None) -> dict[str, Any]:
    """What a job took, on what, and beside it the pace, where that has run through its epochs."""
    paced = {"pace": [asdict(turn) for turn in pace.turns]} if pace and len(pace.turns) > PACE_EPOCHS else {}
    return {"commit": commit(), "arithmetic": arithmetic(), **paced, "turns": [asdict(turn) for turn in job.turns]}


def _pace_rounds(epochs: int) -> tuple[int, ...]:
    """Rounds in which the pace has a turn: its start, and epochs spread over the heat, the first where others begin, too."""
    return (0, *(1 + i * epochs // PACE_EPOCHS for i in range(PACE_EPOCHS)))
