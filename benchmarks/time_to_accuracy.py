"""How long training takes to a quality under each policy, against stock DDP under torchrun.

    python -m benchmarks.time_to_accuracy [--quick] [--workloads vision,text] [--policies none,linear,kgt] [--seeds 0,1,2]

Workloads: `vision`, a ResNet-20 from scratch on all 60,000 images of Fashion-MNIST, 10 epochs, without flips; `text`,
all-MiniLM-L6-v2 fine-tuned on 4,000 texts of 20 Newsgroups, 3 epochs of 250 steps, the first 64 tokens of each text
(128 would double the hours, and three seeds of five policies take some already). Policies: what kgtrun's --policy takes,
at its defaults or with options; `none` is torchrun with torch's own DistributedDataParallel, without anything of ours:
what all others are compared with. `+cache` after a policy (`kgt+cache`) turns the activation cache on; otherwise it is off.

All policies of one workload and seed are started together and take turns, an epoch each (`benchmarks.heat`): a slow hour
of the machine falls on all. What is measured, how and against what, is in `benchmarks.accuracy_summary`.

A plain run counts as finished where it was made on this kind of CPU: on another, the same seed trains another model.

A full run takes hours. Each finished run is a line in `runs/time_to_accuracy/runs.jsonl`; starting again goes on with what
is missing, as long as the sizes are the same. What was stopped in mid-run starts over. If the plain run has ended before, a
plain job takes two epochs' turns among the others, so that its time is known at this hour and on this machine; the results
say so (`plain_clock`). While there is a file `hold` beside it, no turn begins: the
machine is free for something else, and no run's time is spoiled.

Results of the full sizes go to `benchmarks/results/`, also into `summary.json`, and the finished runs go there, too: a
fresh clone goes on where the last commit of results stopped. With other sizes all stays in `runs/time_to_accuracy/`.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import plots, run_log
from benchmarks.accuracy_jobs import CACHE, WORKLOADS, settings
from benchmarks.accuracy_summary import PLAIN, Record, by_policy, compared, summary
from benchmarks.harness import RESULTS, Figures, parser
from benchmarks.heat import run_heat
from benchmarks.machine import ROOT, arithmetic

RUNS = ROOT / "runs" / "time_to_accuracy"
KEPT_RUNS = RESULTS / "time_to_accuracy_runs.jsonl"
POLICIES = (PLAIN, "linear", "gradnorm", "kgt-paper", "kgt")
QUICK_POLICIES = (PLAIN, "linear")


def finished_runs(path: Path, chosen: Mapping[str, Mapping[str, Any]]) -> list[Record]:
    """Runs in the file that have these settings (by workload), the last of each kind, and of plain runs that of each heat:
    what took its turns beside one is compared with that. A torn line is skipped."""
    found = {}
    for record in run_log.read(path):
        if record["settings"] == chosen.get(record["workload"]):
            heat = record.get("heat") if record["policy"] == PLAIN else None
            found[record["workload"], record["policy"], record["seed"], record.get("arithmetic"), heat] = record
    return list(found.values())


def is_finished(records: Sequence[Record], workload: str, policy: str, seed: int) -> bool:
    """A plain run counts only if it was made on this kind of CPU."""
    return any(
        (record["workload"], record["policy"], record["seed"]) == (workload, policy, seed)
        and (policy != PLAIN or record.get("arithmetic") == arithmetic())
        for record in records
    )


def run_all(
    workloads: Sequence[str],
    policies: Sequence[str],
    seeds: Sequence[int],
    chosen: Mapping[str, Mapping[str, Any]],
    folder: Path,
) -> list[str]:
    """Everything that is not finished yet, seed by seed; returns what failed."""
    folder.mkdir(parents=True, exist_ok=True)
    failures = []
    for seed in seeds:
        for workload in workloads:
            finished = finished_runs(folder / "runs.jsonl", chosen)
            missing = [policy for policy in policies if not is_finished(finished, workload, policy, seed)]
            if missing:
                failures += run_heat(workload, missing, seed, chosen[workload], folder)
    return failures


def publish(records: Sequence[Record], chosen: Mapping[str, Any], *, quick: bool, results: Path) -> None:
    """Write what is finished, and print the figures as the last line."""
    runs = compared(records)
    figures = Figures("time_to_accuracy")
    for (workload, policy), seeds in by_policy(runs).items():
        for key in ("time_to_target_ratio", "time_to_target_ratio_with_validation", "cpu_to_target_ratio"):
            ratios = [run[key] for run in seeds]
            if None in ratios:
                figures.exact(f"{workload} {policy} {key}", None)
            else:
                figures.sampled(f"{workload} {policy} {key}", ratios)
        for key in ("whole_job_ratio", "final_quality", "frozen_fraction", "overhead_fraction"):
            figures.sampled(f"{workload} {policy} {key}", [run[key] for run in seeds])
    figures.fact("settings", {name: dict(value) for name, value in chosen.items()})
    figures.fact("runs", runs)
    if not quick:
        results.mkdir(parents=True, exist_ok=True)
        (results / "summary.json").write_text(json.dumps(summary(runs), indent=2) + "\n")
        try:
            plots.draw(runs, results)
        except SystemExit as missing:
            print(missing, flush=True)  # the figures do not depend on it
    figures.publish(quick=quick, results=results)


def parse_policies(text: str) -> list[str]:
    """Policies between commas; an option of a policy has commas, too: `none,linear:start=0.3,stop=0.7` are two."""
    found: list[str] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        if found and "=" in part and ":" not in part:
            found[-1] += f",{part}"
        else:
            found.append(part)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    made = parser(__doc__)
    add = made.add_argument
    add("--workloads", help=f"comma-separated of {', '.join(WORKLOADS)} (default all; with --quick vision)")
    add("--policies", type=parse_policies, help=f"comma-separated (default {','.join(POLICIES)})")
    add("--seeds", default="0,1,2", help="comma-separated (default 0,1,2; with --quick the first only)")
    add("--epochs", type=int, help="of every workload, instead of its own number")
    add("--train-images", type=int, help="of vision (default 60000)")
    add("--train-texts", type=int, help="of text (default 4000, at most 11293)")
    args = made.parse_args(argv)
    workloads = (args.workloads or ("vision" if args.quick else ",".join(WORKLOADS))).split(",")
    policies = args.policies or list(QUICK_POLICIES if args.quick else POLICIES)
    seeds = [int(seed) for seed in args.seeds.split(",")]
    if unknown := sorted(set(workloads) - set(WORKLOADS)):
        made.error(f"no workload {', '.join(unknown)}: choose from {', '.join(WORKLOADS)}")
    from kgt_ddp.policy_spec import parse_policy  # here: it imports torch, which --help need not

    for policy in policies:
        parse_policy(policy.removesuffix(CACHE))
    signal.signal(signal.SIGTERM, lambda signum, _: sys.exit(128 + signum))  # so that what runs is cleared away
    changed = {"epochs": args.epochs, "train-images": args.train_images, "train-texts": args.train_texts}
    chosen = {name: settings(name, quick=args.quick, changed=changed) for name in WORKLOADS}
    full_size = chosen == {name: settings(name, quick=False, changed={}) for name in WORKLOADS}
    if args.quick:
        with tempfile.TemporaryDirectory(prefix="kgtrun-time-to-accuracy-") as folder:
            failures = run_all(workloads, policies, seeds[:1], chosen, Path(folder))
            records = finished_runs(Path(folder) / "runs.jsonl", chosen)
    else:
        if os.getloadavg()[0] > 0.5:
            print(f"the machine is busy (load {os.getloadavg()[0]:.1f}): wall times will be too long", flush=True)
        finished = RUNS / "runs.jsonl"
        if full_size and KEPT_RUNS.exists() and not finished.exists():
            RUNS.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(KEPT_RUNS, finished)
        failures = run_all(workloads, policies, seeds, chosen, RUNS)
        records = finished_runs(finished, chosen)
        if full_size:
            shutil.copyfile(finished, KEPT_RUNS)
    publish(records, chosen, quick=args.quick, results=RESULTS if full_size else RUNS)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
