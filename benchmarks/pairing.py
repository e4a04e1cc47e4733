"""What can each pairing see, and what does it cost? Signal over floor of the four, on three jobs of real data.

    python -m benchmarks.pairing [--quick] [--only resnet|minilm|seq2seq]

While a job trains, each pairing is evaluated every `L` steps on the blocks in front of the head, 64 samples:

    signal          its score at the distance L
    floor           its score at the distance 0: the model against its own snapshot of this moment
    NAME_snr        signal over floor, the median over blocks and the evaluations of the later half
    NAME_seen       share of these whose signal is at least three times their floor
    NAME_scatter    a score's relative standard deviation over three disjoint sets of samples, the median
    front_snr       the same as snr for the two front blocks alone: the ones that are judged first

`live_fp32` is `live` against an fp32 snapshot: it tells how much of its floor is the mode and how much the precision.

    probe_bf16_over_fp32   what bf16 reports over what fp32 snapshots would report, the median; 1 is right

Costs are of the real thing, a reference process and a client, in CPU seconds, which do not depend on who else is on the
machine: of a submit in the trainer's thread (tap and extra pass included), of a submit in the reference, and the share
of a training step if done every 20 steps. One thread each.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import Figures, parser
from benchmarks.machine import machine_facts
from benchmarks.pairing_workloads import WORKLOADS, MissingData, Workload
from kgt_ddp.reference.arena import named_tensors
from kgt_ddp.reference.client import ReferenceClient
from kgt_ddp.reference.model import model_from, pickled_structure
from kgt_ddp.reference.pairing import PAIRINGS, Values, compare
from kgt_ddp.reference.runner import Runner, Similarities, make_runner
from kgt_ddp.reference.samples import Samples, masks_in, sub_batch
from kgt_ddp.reference.tap import ActivationTap

NUM_SAMPLES = 64
SEEN = 3.0
STEPS = {"resnet": (150, 25), "minilm": (60, 15), "seq2seq": (120, 30)}
"""Steps of the job and the distance L, for the full run."""
QUICK_STEPS = (4, 1)
START_S = 120.0

Weights = dict[str, Tensor]


class Observer:
    """Evaluates every pairing at one step of a job, in this process, with the parts that the reference is made of."""

    def __init__(self, job: Workload, num_samples: int) -> None:
        structure = pickled_structure(job.net)
        self._job = job
        self._count = num_samples
        self._half: Runner = make_runner(model_from(structure), job.watched, "bf16")
        self._exact: Runner = make_runner(model_from(structure), job.watched, "fp32")
        self._tap = ActivationTap(job.net, job.watched, limit=num_samples)
        self._probe = self._samples(torch.arange(num_samples))

    def look(self, past: Weights, live: Similarities, indices: Tensor, fresh: list[Tensor]) -> dict[str, Any]:
        """Signal and floor per pairing and block.

        Args:
            past: the weights L steps ago.
            live: what the tap saw of this step's training forward.
            indices: the samples that forward began with.
            fresh: disjoint sets of samples, for the scatter.
        """
        now = snapshot(self._job.net)
        sets = [self._samples(chosen) for chosen in fresh]
        batch = self._samples(indices[: self._count])
        trainer = self._tap.evaluate(batch)
        on_probe = self._run(now, self._probe)
        on_batch = self._run(now, batch)
        batch_before = self._run(past, batch)
        signal = {
            "probe": self._compare(self._run(past, self._probe), on_probe),
            "fresh": self._compare(batch_before, on_batch),
            "eval": self._compare(batch_before, trainer),
            "live": self._compare(batch_before, live),
            "live_fp32": self._compare(self._run(past, batch, self._exact), live),
        }
        floor = {
            "probe": self._compare(self._run(now, self._probe, self._exact), on_probe),
            "fresh": self._compare(self._run(now, batch, self._exact), on_batch),
            "eval": self._compare(on_batch, trainer),
            "live": self._compare(on_batch, live),
            "live_fp32": self._compare(self._run(now, batch, self._exact), live),
        }
        scatter = [self._compare(self._run(past, s), self._run(now, s)) for s in sets]
        exact = self._compare(self._run(past, self._probe, self._exact), self._run(now, self._probe, self._exact))
        return {"signal": signal, "floor": floor, "scatter": scatter, "exact": exact}

    def recording(self, indices: Tensor) -> Any:
        """Context in which the training forward of these samples is looked at; `take` gives what was seen."""
        args, kwargs = self._job.call(indices)
        return self._tap.recording(masks_in(Samples(args, kwargs)))

    def take(self) -> Similarities:
        return self._tap.take()

    def _samples(self, indices: Tensor) -> Samples:
        args, kwargs = self._job.call(indices)
        return sub_batch(args, kwargs, len(indices))

    def _run(self, weights: Weights, samples: Samples, runner: Runner | None = None) -> Similarities:
        runner = runner or self._half
        runner.load(weights)
        return runner.similarities(samples)

    def _compare(self, first: Similarities, second: Similarities) -> Values:
        return compare(self._job.watched, first, second)


def snapshot(net: nn.Module) -> Weights:
    return {name: tensor.detach().clone() for name, tensor in named_tensors(net).items()}


def train(job: Workload, num_steps: int, lag: int, num_samples: int) -> tuple[list[dict[str, Any]], float]:
    """Train the job; what was seen, evaluation by evaluation, and the median CPU seconds of a step."""
    observer = Observer(job, num_samples)
    generator = torch.Generator().manual_seed(0)
    past: Weights = {}
    seen, step_s = [], []
    job.net.train()
    for step in range(num_steps + 1):
        indices = torch.randint(0, job.num_samples, (max(job.batch_size, num_samples),), generator=generator)
        due = step % lag == 0
        if due:
            # A forward in training mode that changes nothing: BatchNorm's statistics are put back.
            before = snapshot(job.net)
            with observer.recording(indices), torch.no_grad():
                args, kwargs = job.call(indices)
                job.net(*args, **kwargs)
            with torch.no_grad():
                for name, tensor in named_tensors(job.net).items():
                    tensor.copy_(before[name])
            live = observer.take()
            if past:
                shuffled = torch.randperm(job.num_samples, generator=generator)
                fresh = [shuffled[i * num_samples : (i + 1) * num_samples] for i in range(3)]
                seen.append(observer.look(past, live, indices, fresh))
            past = before
        started = time.process_time()
        chosen = indices[: job.batch_size]
        args, kwargs = job.call(chosen)
        job.optimizer.zero_grad(set_to_none=True)
        loss = job.loss(job.net(*args, **kwargs), chosen)
        loss.backward()
        job.optimizer.step()
        job.scheduler.step()
        step_s.append(time.process_time() - started)
    return seen, statistics.median(step_s)


def summarise(seen: list[dict[str, Any]]) -> dict[str, float]:
    """Figures of one job; see the file."""
    later = seen[len(seen) // 2 :]
    found: dict[str, float] = {}
    for pairing in seen[0]["signal"]:
        pairs = [
            [(s, f) for s, f in zip(one["signal"][pairing], one["floor"][pairing], strict=True) if s and f]
            for one in later
        ]
        every = [s / f for blocks in pairs for s, f in blocks]
        front = [s / f for blocks in pairs for s, f in blocks[:2]]
        if every:
            found[f"{pairing}_snr"] = statistics.median(every)
            found[f"{pairing}_front_snr"] = statistics.median(front)
            found[f"{pairing}_seen"] = sum(ratio >= SEEN for ratio in every) / len(every)
    for blocks, key in ((slice(None), "probe_bf16_over_fp32"), (slice(2), "probe_front_bf16_over_fp32")):
        found[key] = statistics.median(
            half / exact
            for one in later
            for half, exact in zip(one["signal"]["probe"][blocks], one["exact"][blocks], strict=True)
            if half is not None and exact
        )
    scatter = []
    for one in later:
        for values in zip(*one["scatter"], strict=True):
            known = [v for v in values if v is not None]
            if len(known) > 1 and statistics.mean(known) > 0:
                scatter.append(statistics.stdev(known) / statistics.mean(known))
    found["fresh_scatter"] = statistics.median(scatter) if scatter else 0.0
    return found


@contextmanager
def reference_process(precision: str) -> Iterator[Path]:
    """A reference of one thread; yields the directory of its socket. At this process's priority, where that is allowed:
    with the least, which it gives itself, other work on the machine makes this take hours."""
    with tempfile.TemporaryDirectory(prefix="kgt") as directory:
        os.chmod(directory, 0o700)
        settings = {
            "KGTRUN_REFERENCE_DIR": directory,
            "KGTRUN_REFERENCE_INDEX": "0",
            "KGTRUN_REFERENCE_PRECISION": precision,
            "KGTRUN_RUN_DIR": "",
            "OMP_NUM_THREADS": "1",
        }
        process = subprocess.Popen(
            [sys.executable, "-m", "kgt_ddp.reference.worker"], env={**os.environ, **settings}, stdin=subprocess.DEVNULL
        )
        try:
            end = time.monotonic() + START_S
            while not (Path(directory) / "ref0.sock").exists():
                if process.poll() is not None or time.monotonic() > end:
                    raise RuntimeError("the reference did not start")
                time.sleep(0.05)
            with suppress(PermissionError):
                os.setpriority(os.PRIO_PROCESS, process.pid, os.getpriority(os.PRIO_PROCESS, 0))
            yield Path(directory)
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(30)


def costs(job: Workload, directory: Path, pairing: str, *, submits: int, num_samples: int) -> tuple[float, float]:
    """Median CPU seconds of a submit in this process and in the reference, two distances asked for."""
    client = ReferenceClient(directory, 0)
    if not client.offer_model(job.net, job.watched, lags=(1, 2), pairing=pairing):
        raise RuntimeError(client.problem)
    indices = torch.arange(max(job.batch_size, num_samples))
    args, kwargs = job.call(indices)
    tap = ActivationTap(job.net, job.watched, limit=num_samples)
    client.retain_probe(sub_batch(args, kwargs, num_samples))
    here, there = [], []
    for step in range(submits):
        end = time.monotonic() + START_S
        busy_s, extra_s, accepted = 0.0, 0.0, False
        extra: dict[str, Any] = {}
        started = time.process_time()
        if pairing != "probe":
            extra["samples"] = sub_batch(args, kwargs, num_samples)
        if pairing == "eval":
            extra["similarities"] = tap.evaluate(extra["samples"])
        extra_s = time.process_time() - started
        if pairing == "live":
            extra["similarities"], live_s = live_similarities(job, tap, args, kwargs)
            extra_s += live_s
        while not accepted:
            started = time.process_time()
            accepted = client.submit(step, 0, **extra)
            busy_s = time.process_time() - started
            client.poll(0.01)
            if time.monotonic() > end:
                raise RuntimeError(f"the reference takes nothing: {client.problem}")
        scores = []
        while client.in_flight:
            scores += client.poll(0.1)
            if time.monotonic() > end:
                raise RuntimeError(f"the reference does not answer: {client.problem}")
        if step >= 3:  # before that: the model's first forward, fresh memory, the first floor
            here.append(busy_s + extra_s)
            there += [s.cpu_s for s in scores[:1]]
    client.close()
    return statistics.median(here), statistics.median(there)


def live_similarities(job: Workload, tap: ActivationTap, args: Any, kwargs: Any) -> tuple[Similarities, float]:
    """What a tapped training forward gives, and what the tap adds to it: with less without, best of three each."""

    def forward_s() -> float:
        started = time.process_time()
        job.net(*args, **kwargs)
        return time.process_time() - started

    masks = masks_in(Samples(tuple(args), dict(kwargs)))
    plain_s = min(forward_s() for _ in range(3))
    tapped = []
    for _ in range(3):
        with tap.recording(masks):
            tapped.append(forward_s())
    return tap.take(), max(min(tapped) - plain_s, 0.0)


def run(name: str, figures: Figures, directory: Path, *, quick: bool) -> bool:
    """Measure one job; False if its data is missing."""
    torch.manual_seed(0)
    num_steps, lag = QUICK_STEPS if quick else STEPS[name]
    num_samples = 8 if quick else NUM_SAMPLES
    try:
        job = WORKLOADS[name](num_steps, quick=quick)
    except MissingData as missing:
        print(f"{name} is left out: {missing}", flush=True)
        return False
    seen, step_s = train(job, num_steps, lag, num_samples)
    for key, value in summarise(seen).items():
        figures.exact(f"{name}_{key}", value)
    figures.exact(f"{name}_step_s", step_s)
    sizes = {"steps": num_steps, "lag": lag, "samples": num_samples, "blocks": job.watched}
    figures.fact(name, {**sizes, "seen": seen, "machine": machine_facts()})
    for pairing in ("probe",) if quick else PAIRINGS:
        here_s, there_s = costs(job, directory, pairing, submits=5 if quick else 7, num_samples=num_samples)
        figures.exact(f"{name}_{pairing}_trainer_ms", 1e3 * here_s)
        figures.exact(f"{name}_{pairing}_reference_ms", 1e3 * there_s)
        figures.exact(f"{name}_{pairing}_share_of_step_every_20", here_s / (20 * step_s))
    print(f"{name}: done", flush=True)
    return True


def main() -> None:
    command = parser(__doc__)
    command.add_argument("--only", choices=WORKLOADS, help="one job; the results file keeps what it has of the others")
    options = command.parse_args()
    torch.set_num_threads(1)
    figures = Figures("pairing")
    names = [options.only] if options.only else list(WORKLOADS)
    if options.only and not options.quick:
        figures.take_up()
    with reference_process("bf16") as directory:
        for name in names:
            if run(name, figures, directory, quick=options.quick):
                figures.publish(quick=options.quick)  # so that a stopped run leaves something


if __name__ == "__main__":
    main()
