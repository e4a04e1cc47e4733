"""The main job, whole processes: ResNet-20 on Fashion-MNIST under kgtrun with a linear schedule, against stock DDP.

    python -m benchmarks.real_job [--quick] [--seeds 0,1,2] [--cases plain,linear,none]

`plain` is torchrun with torch's own DistributedDataParallel: nothing of ours is imported. `linear` freezes 8 of 10
blocks between 25 % and 75 % of training. `none` is kgtrun that freezes nothing: it tells what of the difference the
launcher makes. Wall and CPU seconds are those of the whole process tree, from start to exit, so that reading the data,
validation and the final test are in them. One round is one seed; every case runs once in it.

A full run takes most of an hour. Each finished run is a line in `runs/real_job/runs.jsonl`; starting again goes on
where it stopped, as long as settings are the same. Remove the file to measure afresh.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import run_log
from benchmarks.harness import Figures, order_of_round, parser, ratios
from benchmarks.machine import ROOT, commit
from benchmarks.process_cost import run_process

SCRIPT = ROOT / "examples" / "fashion_resnet.py"
RUNS = ROOT / "runs" / "real_job"
POLICIES = {"linear": "linear:start=0.25,stop=0.75,fraction=0.8", "none": "none"}
CASES = ("plain", *POLICIES)
GAINS = {"wall": ("cost", "wall_s"), "cpu": ("cost", "cpu_s"), "train_wall": ("result", "train_wall_s")}
"""Ratios between cases: whole processes, and the epochs alone as the example times them."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """The size of one run. Two runs may be compared only if all of it is equal."""

    epochs: int = 10
    batch_size: int = 128
    train_images: int = 20_000
    test_images: int = 10_000
    val_images: int = 2_000
    lr: float = 0.1
    num_ranks: int = 2
    threads_per_rank: int = 1
    timeout_s: float = 3600.0


def quick_job(job: Job) -> Job:
    return dataclasses.replace(job, epochs=4, train_images=512, test_images=500, val_images=0, timeout_s=60.0)


def command(case: str, job: Job, seed: int, *, run_dir: Path, figures: Path) -> list[str]:
    """The command line of one run."""
    ranks = ["--standalone", "--nproc-per-node", str(job.num_ranks)]
    script = [
        *(str(SCRIPT), "--seed", str(seed), "--lr", str(job.lr), "--json-out", str(figures)),
        *("--epochs", str(job.epochs), "--batch-size", str(job.batch_size), "--train-images", str(job.train_images)),
        *("--test-images", str(job.test_images), "--val-images", str(job.val_images)),
    ]
    if case == "plain":
        return [sys.executable, "-m", "torch.distributed.run", *ranks, *script, "--stock-ddp"]
    ours = ["--policy", POLICIES[case], "--run-dir", str(run_dir)]
    return [sys.executable, "-m", "kgtrun", *ranks, *ours, *script]


def environment(job: Job, environ: Mapping[str, str]) -> dict[str, str]:
    """The same for all cases: no setting of ours but the data folder, and the same threads a rank."""
    kept = {k: v for k, v in environ.items() if not k.startswith("KGTRUN_") or k == "KGTRUN_FASHION_MNIST_DIR"}
    # torchrun gives each rank one thread, kgtrun its share of the cores: left alone, that would be measured too.
    return {**kept, "OMP_NUM_THREADS": str(job.threads_per_rank)}


def run_once(case: str, job: Job, seed: int, folder: Path) -> dict[str, Any]:
    """One run, measured; its record as it goes into the file.

    Raises:
        SystemExit: it failed; the message ends with the last lines of its output.
    """
    name = f"{case}-seed{seed}"
    log, figures = folder / f"{name}.log", folder / f"{name}.json"
    shutil.rmtree(folder / name, ignore_errors=True)  # events of an attempt that was cut off
    with log.open("w") as output:
        cost = run_process(
            command(case, job, seed, run_dir=folder / name, figures=figures),
            timeout_s=job.timeout_s,
            env=environment(job, os.environ),
            cwd=folder,
            output=output,
        )
    if cost.exit_code:
        tail = "\n".join(log.read_text().splitlines()[-15:])
        raise SystemExit(f"{name} ended with exit code {cost.exit_code}:\n{tail}")
    return {
        "case": case,
        "seed": seed,
        "job": asdict(job),
        "commit": commit(),
        "cost": asdict(cost),
        "result": json.loads(figures.read_text()),
    }


def finished_runs(path: Path, job: Job) -> dict[tuple[str, int], dict[str, Any]]:
    """Runs of this job in the file, by case and seed; a torn line is skipped."""
    found = {}
    for record in run_log.read(path):
        if record["job"] == asdict(job):
            found[record["case"], record["seed"]] = record
    return found


def run_all(
    cases: Sequence[str], seeds: Sequence[int], job: Job, folder: Path
) -> dict[tuple[str, int], dict[str, Any]]:
    """Every case of every seed, seed by seed; what the file already has is not run again."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "runs.jsonl"
    runs = finished_runs(path, job)
    for index, seed in enumerate(seeds):
        for case in order_of_round(cases, index):
            if (case, seed) not in runs:
                runs[case, seed] = run_once(case, job, seed, folder)
                run_log.add(path, runs[case, seed])
            cost, result = runs[case, seed]["cost"], runs[case, seed]["result"]
            print(
                f"seed {seed}  {case:6}  wall {cost['wall_s']:7.1f} s  CPU {cost['cpu_s']:7.1f} s  "
                f"accuracy {result['accuracy']:.2%}",
                flush=True,
            )
    return runs


def summarise(runs: Mapping[tuple[str, int], dict[str, Any]], cases: Sequence[str], seeds: Sequence[int]) -> Figures:
    """Medians by case, and each case against the first one: ratios above 1 mean that it took less than that."""
    figures = Figures("real_job")

    def column(case: str, *keys: str) -> list[float]:
        values = []
        for seed in seeds:
            value: Any = runs[case, seed]
            for key in keys:
                value = value[key]
            values.append(float(value))
        return values

    base = cases[0]
    for case in cases:
        figures.sampled(f"{case}_wall_s", column(case, "cost", "wall_s"))
        figures.sampled(f"{case}_cpu_s", column(case, "cost", "cpu_s"))
        figures.sampled(f"{case}_accuracy_percent", [100 * a for a in column(case, "result", "accuracy")])
        if case == base:
            continue
        for name, keys in GAINS.items():
            figures.sampled(f"{base}_over_{case}_{name}", ratios(column(base, *keys), column(case, *keys)))
        pairs = zip(column(case, "result", "accuracy"), column(base, "result", "accuracy"), strict=True)
        figures.sampled(f"{case}_accuracy_change_points", [100 * (ours - theirs) for ours, theirs in pairs])
        reduced = column(case, "result", "freezing", "reduced_bytes")
        dropped = column(case, "result", "freezing", "dropped_bytes")
        figures.sampled(f"{case}_bytes_dropped_share", [d / (d + r) for d, r in zip(dropped, reduced, strict=True)])
    figures.exact("num_seeds", len(seeds))
    figures.fact("commits", sorted({runs[case, seed]["commit"] for case in cases for seed in seeds}))
    figures.fact("seeds", list(seeds))
    return figures


def main(argv: Sequence[str] | None = None) -> None:
    made = parser(__doc__)
    made.add_argument("--seeds", default="0,1,2", help="comma-separated (default 0,1,2; with --quick the first only)")
    made.add_argument(
        "--cases", default="plain,linear", help=f"comma-separated of {', '.join(CASES)}; the first is the base"
    )
    args = made.parse_args(argv)
    cases, seeds = args.cases.split(","), [int(seed) for seed in args.seeds.split(",")]
    if unknown := sorted(set(cases) - set(CASES)):
        made.error(f"no case {', '.join(unknown)}: choose from {', '.join(CASES)}")
    job = Job(threads_per_rank=max(len(os.sched_getaffinity(0)) // Job.num_ranks, 1))
    if args.quick:
        with tempfile.TemporaryDirectory(prefix="kgtrun-real-job-") as folder:
            seeds, job = seeds[:1], quick_job(job)
            figures = summarise(run_all(cases, seeds, job, Path(folder)), cases, seeds)
    else:
        if os.getloadavg()[0] > 0.5:
            print(f"the machine is busy (load {os.getloadavg()[0]:.1f}): wall times will be too long", flush=True)
        figures = summarise(run_all(cases, seeds, job, RUNS), cases, seeds)
    for key, value in asdict(job).items():
        figures.fact(key, value)
    figures.publish(quick=args.quick)


if __name__ == "__main__":
    main()
