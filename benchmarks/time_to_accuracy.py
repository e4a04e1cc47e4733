"""How long training takes to a quality under each policy, against stock DDP under torchrun.

    python -m benchmarks.time_to_accuracy [--quick] [--workloads vision,text] [--policies none,linear,kgt] [--seeds 0,1,2]

Workloads: `vision`, a ResNet-20 from scratch on all 60,000 images of Fashion-MNIST, 10 epochs, without flips; `text`,
all-MiniLM-L6-v2 fine-tuned on 4,000 texts of 20 Newsgroups, 3 epochs of 250 steps, the first 64 tokens of each text
(128 would double the hours, and three seeds of five policies take some already). Policies: what kgtrun's --policy takes,
at its defaults or with options; `none` is torchrun with torch's own DistributedDataParallel, without anything of ours:
what all others are compared with. `+cache` after a policy (`kgt+cache`) turns the activation cache on; otherwise it is off.

All policies of one workload and seed are started together and take turns, an epoch each (`benchmarks.turns`): a slow hour
of the machine falls on all. What is measured, how and against what, is in `benchmarks.accuracy_summary`.

A plain run counts as finished where it was made with this CPU's arithmetic: with another, the same seed trains another model.

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
import socket
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import epoch_gate, plots, run_log
from benchmarks.accuracy_summary import PACE_EPOCHS, PLAIN, Record, by_policy, compared, summary
from benchmarks.harness import RESULTS, Figures, order_of_round, parser
from benchmarks.machine import ROOT, arithmetic, commit
from benchmarks.turns import Job, JobFailed

RUNS = ROOT / "runs" / "time_to_accuracy"
KEPT_RUNS = RESULTS / "time_to_accuracy_runs.jsonl"
POLICIES = (PLAIN, "linear", "gradnorm", "kgt-paper", "kgt")
QUICK_POLICIES = (PLAIN, "linear")
CACHE = "+cache"
PACE = "pace"
"""Name of the plain job that runs for `PACE_EPOCHS` epochs where the whole plain run is from another heat."""
KEPT_VARIABLES = ("KGTRUN_FASHION_MNIST_DIR", "KGTRUN_LANGUAGE_DIR")


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A script and its size."""

    script: str
    options: Mapping[str, Any]
    quick_options: Mapping[str, Any] = field(default_factory=dict)
    num_ranks: int = 2
    threads_per_rank: int = 1
    turn_timeout_s: float = 3 * 3600.0


WORKLOADS = {
    "vision": Workload(
        script="fashion_resnet.py",
        options={
            **{"epochs": 10, "batch-size": 128, "lr": 0.1},
            **{"train-images": 60_000, "test-images": 10_000, "val-images": 10_000},
        },
        quick_options={"epochs": 2, "train-images": 512, "test-images": 500, "val-images": 500},
    ),
    "text": Workload(
        script="minilm_newsgroups.py",
        options={
            **{"epochs": 3, "batch-size": 16, "lr": 5e-5, "max-tokens": 64},
            **{"train-texts": 4_000, "test-texts": 7_528, "val-texts": 2_000},
        },
        quick_options={"epochs": 2, "max-tokens": 16, "train-texts": 64, "test-texts": 64, "val-texts": 64},
    ),
}


def settings(name: str, *, quick: bool, changed: Mapping[str, Any]) -> dict[str, Any]:
    """What two runs must have in common to be compared, as plain data; options that a workload has not are not changed."""
    workload = WORKLOADS[name]
    options = {**workload.options, **(workload.quick_options if quick else {})}
    options |= {key: value for key, value in changed.items() if key in options and value is not None}
    threads = max(len(os.sched_getaffinity(0)) // workload.num_ranks, 1)
    return {**asdict(workload), "options": options, "quick_options": None, "threads_per_rank": threads}


def command(policy: str, chosen: Mapping[str, Any], seed: int, *, folder: Path, name: str) -> list[str]:
    """The command line of one run. Its script is the gate, whose script is the example."""
    # A port of its own and a static rendezvous: torch's dynamic one takes a launcher that was stopped for one that is dead.
    launch = ["--master-port", str(_free_port()), "--nproc-per-node", str(chosen["num_ranks"])]
    script = [str(Path(epoch_gate.__file__)), str(ROOT / "examples" / chosen["script"]), "--seed", str(seed)]
    for option, value in chosen["options"].items():
        script += [f"--{option}", str(value)]
    script += ["--json-out", str(folder / f"{name}.json")]
    if policy in (PLAIN, PACE):
        return [sys.executable, "-m", "torch.distributed.run", *launch, *script, "--stock-ddp"]
    ours = ["--policy", policy.removesuffix(CACHE), "--cache", "auto" if policy.endswith(CACHE) else "off"]
    ours += ["--hang-timeout", "0", "--run-dir", str(folder / name)]  # stopped is not hung
    return [sys.executable, "-m", "kgtrun", *launch, *ours, *script]


def environment(chosen: Mapping[str, Any], environ: Mapping[str, str]) -> dict[str, str]:
    """The same for all runs: nothing of ours but where the data is, and the same threads a rank under both launchers."""
    kept = {k: v for k, v in environ.items() if not k.startswith("KGTRUN_") or k in KEPT_VARIABLES}
    return {**kept, "OMP_NUM_THREADS": str(chosen["threads_per_rank"])}


def run_name(workload: str, policy: str, seed: int) -> str:
    """A file name of it."""
    return f"{workload}-{''.join(c if c.isalnum() or c in '+-.' else '_' for c in policy)}-seed{seed}"


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
        jobs: dict[str, Job] = {}
        for policy, name in names.items():
            shutil.rmtree(folder / name, ignore_errors=True)  # events of an attempt that was cut off
            jobs[policy] = stack.enter_context(
                Job(
                    command(policy, chosen, seed, folder=folder, name=name),
                    env=environment(chosen, os.environ),
                    cwd=folder,
                    log=folder / f"{name}.log",
                    turn_timeout_s=chosen["turn_timeout_s"],
                )
            )
        turn_number, pace = 0, jobs.get(PACE)
        while set(jobs) - {PACE}:
            for policy in order_of_round(list(jobs), turn_number):
                if policy == PACE and turn_number not in _pace_rounds(chosen["options"]["epochs"]):
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
                    run_log.add(
                        folder / "runs.jsonl",
                        {
                            **{"workload": workload, "policy": policy, "seed": seed, "heat": heat},
                            **{"settings": dict(chosen), "commit": commit(), "arithmetic": arithmetic()},
                            **(
                                {"pace": [asdict(t) for t in pace.turns]}
                                if pace and len(pace.turns) > PACE_EPOCHS
                                else {}
                            ),
                            **{"turns": [asdict(t) for t in job.turns], "result": result},
                        },
                    )
            turn_number += 1
    return failures


def finished_runs(path: Path, chosen: Mapping[str, Mapping[str, Any]]) -> list[Record]:
    """Runs in the file that have these settings (by workload), the last of each kind; a torn line is skipped."""
    found = {}
    for record in run_log.read(path):
        if record["settings"] == chosen.get(record["workload"]):
            found[record["workload"], record["policy"], record["seed"], record.get("arithmetic")] = record
    return list(found.values())


def is_finished(records: Sequence[Record], workload: str, policy: str, seed: int) -> bool:
    """A plain run counts only if it was made with this CPU's arithmetic."""
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


def _pace_rounds(epochs: int) -> tuple[int, ...]:
    """Rounds in which the pace has a turn: its start, and epochs spread over the heat, the first where others begin, too."""
    return (0, *(1 + i * epochs // PACE_EPOCHS for i in range(PACE_EPOCHS)))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


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
