"""What freezing gains on several nodes, measured on 2 and 3 hosts and predicted for 2 to 64.

Hosts are namespaces of this machine with a limited link each (tests/cluster/netns-cluster): root is needed, and hosts
share its cores, which is why the profile is taken while all hosts compute. The model is `benchmarks.scaling_model`; from
the profile of one host, the nominal rate of the link and the cost of an all_reduce without a limit it predicts the step
time of each case, which is then measured.

Networks: ResNet-20 of the examples (1.1 MB of gradients) and BERT in MiniLM's shape (133 MB; embeddings with half of its
12 layers frozen at k = 6). The quick run has a small transformer in MiniLM's place.

Steps of the ResNet, 0.05 to 0.2 s, come out 11 to 36 % too short: what DDP itself does in a step is not in the profile.

Figures: `prediction_error_max` and `_median` (relative, of all cases; `_max_minilm` of those), `speedup_2hosts_1gbit_k6`,
`speedup_2hosts_200mbit_k6` and `speedup_2hosts_unlimited_k6` (measured, 6 blocks frozen against none, MiniLM; `resnet_…`
likewise), `wire_over_hook_bytes` (2 hosts), `predicted_speedup_64` (MiniLM, 1 Gbit/s, 6 blocks).
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.harness import Figures, parser
from benchmarks.scaling_model import Network, Profile, speedup, step_seconds

ROOT = Path(__file__).resolve().parents[1]
TOOL = str(ROOT / "tests" / "cluster" / "netns-cluster")
RATES = {"unlimited": math.inf, "1gbit": 1e9, "200mbit": 2e8}
NODES = (2, 4, 8, 16, 32, 64)
LARGE = 8 << 20


@contextmanager
def cluster(nodes: int, folder: Path) -> Iterator[dict[str, str]]:
    """Hosts h0, h1, …; the environment to call the tool with."""
    environ = {**os.environ, "NETNS_CLUSTER_DIR": str(folder), "PYTHONPATH": str(ROOT)}
    call(environ, "up", str(nodes))
    try:
        yield environ
    finally:
        call(environ, "down")


def call(environ: dict[str, str], *words: str) -> None:
    subprocess.run([TOOL, *words], env=environ, check=True, timeout=60, stdin=subprocess.DEVNULL)


def measure(nodes: int, models: list[str], steps: int, *, timeout_s: float) -> dict[str, Any]:
    """Run the worker on `nodes` hosts; see `benchmarks.scaling_worker` for what comes back."""
    with tempfile.TemporaryDirectory(prefix="kgtrun-scaling-") as name, cluster(nodes, Path(name) / "net") as environ:
        folder = Path(name)
        worker = [str(ROOT / "benchmarks" / "scaling_worker.py"), name, ",".join(models), str(steps), ",".join(RATES)]
        launchers = [
            subprocess.Popen(
                [
                    TOOL, "exec", f"h{node}", sys.executable, "-m", "kgtrun", "--no-slurm", "--no-core-sharing",
                    "--nnodes", str(nodes), "--node-rank", str(node), "--master-addr", "h0", "--master-port", "29400",
                    "--run-dir", f"{name}/run", *worker,
                ],
                env=environ, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
            for node in range(nodes)
        ]  # fmt: skip
        try:
            deadline = time.monotonic() + timeout_s
            for link in RATES:
                while not (folder / f"ready-{link}").exists() and launchers[0].poll() is None:
                    if time.monotonic() > deadline:
                        raise TimeoutError(f"{nodes} hosts were not ready for {link} within {timeout_s:g} s")
                    time.sleep(0.05)
                call(environ, "limit", "all", "none" if link == "unlimited" else link, "none")
                (folder / f"go-{link}").touch()
            outputs = [launcher.communicate(timeout=max(1, deadline - time.monotonic()))[0] for launcher in launchers]
        finally:
            for launcher in launchers:
                launcher.kill()
        if any(launcher.returncode for launcher in launchers):
            raise RuntimeError("a host failed:\n" + "\n".join(outputs))
        return json.loads((folder / "found.json").read_text())


def profile_of(raw: dict[str, Any]) -> Profile:
    gradients = tuple((float(ready), int(size)) for ready, size in raw["gradients"])
    return Profile(**{name: raw[name] for name in ("forward_s", "backward_s", "optimizer_s")}, gradients=gradients)


def network_of(found: dict[str, Any], nodes: int, link: str) -> Network:
    """Latency and copying as measured without a limit; the limit as it is written on the link."""
    small, large = (found["links"]["unlimited"]["all_reduce_s"][str(size)] for size in (4, LARGE))
    rate = 2 * (nodes - 1) / nodes * LARGE / max(large - small, 1e-9)
    return Network.of_link(RATES[link], node_bytes_per_s=rate, latency_s=small / (2 * (nodes - 1)))


def report(figures: Figures, by_nodes: dict[int, dict[str, Any]], models: list[str]) -> None:
    """Predictions against measurements, case by case."""
    errors, cases = [], []
    for nodes, found in by_nodes.items():
        for link in RATES:
            network, measured = network_of(found, nodes, link), found["links"][link]
            for case in found["profiles"]:
                took = statistics.median(measured[case]["step_s"])
                predicted = step_seconds(profile_of(found["profiles"][case]), nodes, network)
                cases.append(case)
                errors.append(abs(predicted - took) / took)
                row = {"measured_s": round(took, 5), "predicted_s": round(predicted, 5), "error": round(errors[-1], 4)}
                figures.fact(f"{nodes} hosts, {link}, {case} blocks", row)
                print(f"{nodes} hosts, {link:>9}, {case:>14}: {row}", file=sys.stderr)
    figures.exact("prediction_error_max", max(errors))
    figures.exact("prediction_error_median", statistics.median(errors))
    heavy_errors = [error for error, case in zip(errors, cases, strict=True) if case.startswith(models[-1])]
    figures.exact(f"prediction_error_max_{models[-1]}", max(heavy_errors))
    two = by_nodes[2]
    for model in models:
        prefix = "" if model == models[-1] else f"{model}_"
        for link in RATES:
            plain, frozen = (two["links"][link][f"{model} {k}"]["step_s"] for k in (0, 6))
            gain = statistics.median(plain) / statistics.median(frozen)
            figures.exact(f"{prefix}speedup_2hosts_{link}_k6", gain)
    heavy = two["links"]["1gbit"][f"{models[-1]} 0"]
    figures.exact("wire_over_hook_bytes", heavy["wire_bytes"] / heavy["hook_bytes"])
    plain, frozen = (profile_of(two["profiles"][f"{models[-1]} {k}"]) for k in (0, 6))
    for link in RATES:
        gains = {nodes: round(speedup(plain, frozen, nodes, network_of(two, 2, link)), 3) for nodes in NODES}
        figures.fact(f"predicted speed-up by nodes, {link}", gains)
    figures.exact("predicted_speedup_64", speedup(plain, frozen, 64, network_of(two, 2, "1gbit")))


def main() -> int:
    options = parser(__doc__).parse_args()
    if os.geteuid() != 0:
        print("benchmarks.scaling: hosts of namespaces need root", file=sys.stderr)
        return 1
    models = ["resnet", "transformer" if options.quick else "minilm"]
    figures = Figures("scaling")
    hosts = (2,) if options.quick else (2, 3)
    steps = 3 if options.quick else 8
    figures.fact("steps a case", steps)
    by_nodes = {nodes: measure(nodes, models, steps, timeout_s=45 if options.quick else 540) for nodes in hosts}
    report(figures, by_nodes, models)
    figures.publish(quick=options.quick)
    return 0


if __name__ == "__main__":
    sys.exit(main())
