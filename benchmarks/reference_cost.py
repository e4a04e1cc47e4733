"""What knowing costs: the same training step with a reference process that scores it, over the step without.

    python -m benchmarks.reference_cost [--quick]

A ResNet-20 on random images of Fashion-MNIST's shape, under kgtrun with one reference, one rank and then two. Each rank
holds three jobs: `off` (policy none), `on` (policy kgt, with a tolerance that nothing reaches, so that all of the network
is always trained), and `short` (the same, but 200 steps in all, of which it makes a few a turn). It runs them in turns of
several decisions each. A turn begins when the reference is idle. What it still works on when a turn of `on` ends is not
in that turn's time, but in the reference's CPU seconds.

Figures: `step_on_over_off_1rank` and `_2ranks`; `short_job_over_off_…`, a step of a job too short to freeze in;
`reference_cpu_share_…`, CPU seconds of the reference over those of the whole job while `on` runs;
`scores_per_decision_…`, that the reference did score.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from benchmarks.harness import Figures, interleave, parser, ratios, seconds
from benchmarks.machine import ROOT
from benchmarks.turns import REFERENCE

TOTAL_STEPS = 6_000
"""Of the job that is played: decides how often there is a decision, every 40 steps."""
INTERVAL = TOTAL_STEPS // 150
SHORT_STEPS = 200
NEVER = "kgt:tolerance=1e-9,late_tolerance=1e-9"
_IDLE_S = 0.4
_IDLE_BOUND_S = 60.0


def reference_cpu_s() -> float:
    """CPU seconds of this launch's reference processes so far."""
    found = 0.0
    for process in psutil.Process(os.getppid()).children(recursive=True):
        try:
            if REFERENCE in process.cmdline():
                found += sum(process.cpu_times()[:2])
        except psutil.NoSuchProcess:
            continue
    return found


def wait_until_idle() -> None:
    """Until the reference has used no CPU for a moment.

    Raises:
        TimeoutError: it goes on working.
    """
    deadline_s, before = time.monotonic() + _IDLE_BOUND_S, -1.0
    while (now := reference_cpu_s()) != before:
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"the reference is still at work after {_IDLE_BOUND_S:.0f} s")
        before = now
        time.sleep(_IDLE_S)


def worker(answer: Path, batch: int, steps: int, rounds: int) -> None:
    """One rank; rank 0 writes what was measured."""
    from benchmarks.step_overhead import Job, network
    from kgt_ddp import FreezeAwareDDP

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    jobs = {
        "off": Job(FreezeAwareDDP(network(), policy="none", total_steps=TOTAL_STEPS), batch, rank),
        "on": Job(FreezeAwareDDP(network(), total_steps=TOTAL_STEPS), batch, rank),
        "short": Job(FreezeAwareDDP(network(), total_steps=SHORT_STEPS), batch, rank),
    }
    steps_of = {"off": steps, "on": steps, "short": min(steps, SHORT_STEPS // (rounds + 1))}
    reference_s: list[float] = []
    own_s: list[float] = []

    def turn(name: str) -> Callable[[], float]:
        def measure() -> float:
            wait_until_idle()
            dist.barrier()
            reference_before, own_before = reference_cpu_s(), time.process_time()
            found = seconds(lambda: jobs[name].run(steps_of[name])) / steps_of[name]
            own = torch.tensor(time.process_time() - own_before, dtype=torch.float64)
            dist.all_reduce(own)
            if name == "on":
                wait_until_idle()
                reference_s.append(reference_cpu_s() - reference_before)
                own_s.append(own.item())
            return found

        return measure

    # The reference gets its model and as many snapshots as its longest lag, eight decisions, takes.
    jobs["off"].run(steps)
    jobs["on"].run(9 * INTERVAL if rounds > 3 else steps)
    samples = interleave({name: turn(name) for name in jobs}, rounds=rounds)
    assert not any(job.ddp.freezing.frontier for job in jobs.values()), "something was frozen: they did different work"
    if rank == 0:
        answer.write_text(json.dumps({"samples": samples, "reference_s": reference_s, "own_s": own_s}))
    dist.destroy_process_group()


def measure(num_ranks: int, batch: int, steps: int, rounds: int) -> dict[str, Any]:
    """Run the worker under kgtrun; what rank 0 wrote, and the scores a decision from the events."""
    from kgtrun.contract.events import read_events

    with tempfile.TemporaryDirectory(prefix="kgtrun-reference-cost-") as folder:
        run_dir, answer = Path(folder) / "run", Path(folder) / "answer.json"
        launch = [sys.executable, "-m", "kgtrun", "--nproc-per-node", str(num_ranks), "--ref-per-node", "1"]
        launch += ["--policy", NEVER, "--run-dir", str(run_dir), "-m", "benchmarks.reference_cost"]
        work = ["--worker", str(answer), str(batch), str(steps), str(rounds)]
        subprocess.run([*launch, *work], cwd=ROOT, check=True, timeout=3600, stdout=subprocess.DEVNULL)
        found = json.loads(answer.read_text())
        steps_scored = {e["step"] for e in read_events(run_dir) if e["kind"] == "reference_score"}
        return {**found, "scores_per_decision": len(steps_scored) * INTERVAL / max(steps_scored, default=1)}


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--worker", nargs=4, help="what kgtrun starts: not for you")
    options = made.parse_args()
    if options.worker:
        worker(Path(options.worker[0]), *map(int, options.worker[1:]))
        return
    batch, steps, rounds = (16, INTERVAL, 2) if options.quick else (64, 2 * INTERVAL, 9)
    figures = Figures("reference_cost")
    figures.fact("batch_per_rank", batch)
    figures.fact("steps_per_sample", steps)
    figures.fact("steps_per_decision", INTERVAL)
    for num_ranks, name in ((1, "1rank"), (2, "2ranks")):
        found = measure(num_ranks, batch, steps, rounds)
        figures.sampled(f"step_on_over_off_{name}", ratios(found["samples"]["on"], found["samples"]["off"]))
        figures.sampled(f"short_job_over_off_{name}", ratios(found["samples"]["short"], found["samples"]["off"]))
        shares = [r / (r + o) for r, o in zip(found["reference_s"], found["own_s"], strict=True)]
        figures.sampled(f"reference_cpu_share_{name}", shares)
        figures.exact(f"scores_per_decision_{name}", round(found["scores_per_decision"], 3))
    figures.publish(quick=options.quick)


if __name__ == "__main__":
    main()
