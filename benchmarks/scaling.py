"""What freezing gains on several nodes, measured on 2 and 3 hosts and predicted for 2 to 64.

Hosts are namespaces of this machine with a limited link each (tests/cluster/netns-cluster): root is needed, and hosts
share its cores, which is why the profile is taken while all hosts compute. The model is `benchmarks.scaling_model`; from
the profile of the hosts, the nominal rate of the link and the cost of an all_reduce without a limit it predicts the step
time of each case, which is then measured.

Networks: ResNet-20 of the examples (1.1 MB of gradients) and MiniLM (133 MB; embeddings and half of its 12 layers frozen at
k = 6) made of the weights of `scripts/data language` where they are, else of random ones: the results file says which. The
quick run has a small transformer in MiniLM's place. A full run takes some 8 minutes, on a machine that does nothing else.

Figures: `prediction_error_max` and `_median` (relative, of all cases; `_max_minilm` of those; `_max_bare` and
`_median_bare`: what the model's first version, the bare network of one host, would have said), `speedup_2hosts_1gbit_k6`,
`speedup_2hosts_200mbit_k6` and `speedup_2hosts_unlimited_k6` (measured, 6 blocks frozen against none, MiniLM; `resnet_…`
likewise; `…_k3` in full runs), `wire_over_hook_bytes` (2 hosts), `predicted_speedup_64` (MiniLM, 1 Gbit/s, 6 blocks). The
results file holds profiles and links as well, so that another model can be tried on them.
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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.harness import Figures, parser
from benchmarks.scaling_model import Network, Profile, buckets, speedup, step_seconds

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


def measure(nodes: int, models: list[str], ks: Sequence[int], steps: int, *, timeout_s: float) -> dict[str, Any]:
    """Run the worker on `nodes` hosts; see `benchmarks.scaling_worker` for what comes back."""
    with tempfile.TemporaryDirectory(prefix="kgtrun-scaling-") as name, cluster(nodes, Path(name) / "net") as environ:
        folder = Path(name)
        words = (",".join(models), ",".join(map(str, ks)), str(steps), ",".join(RATES))
        worker = [str(ROOT / "benchmarks" / "scaling_worker.py"), name, *words]
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
    times = {name: raw[name] for name in ("forward_s", "backward_s", "optimizer_s")}
    return Profile(**times, gradients=gradients, broadcasts=tuple(raw.get("broadcasts", ())))


def network_of(found: dict[str, Any], nodes: int, link: str) -> Network:
    """Latency and copying as measured without a limit; the limit as it is written on the link."""
    small, large = (found["links"]["unlimited"]["all_reduce_s"][str(size)] for size in (4, LARGE))
    rate = 2 * (nodes - 1) / nodes * LARGE / max(large - small, 1e-9)
    return Network.of_link(RATES[link], node_bytes_per_s=rate, latency_s=small / (2 * (nodes - 1)))


def report(figures: Figures, by_nodes: dict[int, dict[str, Any]], models: list[str], ks: Sequence[int]) -> None:
    """Predictions against measurements, case by case."""
    errors: dict[str, list[float]] = {"": [], "_bare": [], f"_{models[-1]}": []}
    for nodes, found in by_nodes.items():
        for link in RATES:
            network, measured = network_of(found, nodes, link), found["links"][link]
            for case, profiles in found["profiles"].items():
                took = statistics.median(measured[case]["step_s"])
                predicted, bare = (step_seconds(profile_of(profiles[p]), nodes, network) for p in ("wrapped", "bare"))
                error = abs(predicted - took) / took
                errors[""].append(error)
                errors["_bare"].append(abs(bare - took) / took)
                if case.startswith(models[-1]):
                    errors[f"_{models[-1]}"].append(error)
                row = {"measured_s": took, "predicted_s": predicted, "error": error, "bare_predicted_s": bare}
                figures.fact(f"{nodes} hosts, {link}, {case} blocks", {name: rounded(x) for name, x in row.items()})
                print(f"{nodes} hosts, {link:>9}, {case:>14}: {took:.4f} s, {predicted:.4f} predicted", file=sys.stderr)
    for which, found_errors in errors.items():
        figures.exact(f"prediction_error_max{which}", max(found_errors))
        figures.exact(f"prediction_error_median{which}", statistics.median(found_errors))
    two = by_nodes[2]
    for model in models:
        prefix = "" if model == models[-1] else f"{model}_"
        for link in RATES:
            seconds = {k: statistics.median(two["links"][link][f"{model} {k}"]["step_s"]) for k in ks}
            for k in ks[1:]:
                figures.exact(f"{prefix}speedup_2hosts_{link}_k{k}", seconds[0] / seconds[k])
    heavy = two["links"]["1gbit"][f"{models[-1]} 0"]
    figures.exact("wire_over_hook_bytes", heavy["wire_bytes"] / heavy["hook_bytes"])
    plain, frozen = (profile_of(two["profiles"][f"{models[-1]} {k}"]["wrapped"]) for k in (0, 6))
    for link in RATES:
        gains = {nodes: round(speedup(plain, frozen, nodes, network_of(two, 2, link)), 3) for nodes in NODES}
        figures.fact(f"predicted speed-up by nodes, {link}", gains)
    figures.exact("predicted_speedup_64", speedup(plain, frozen, 64, network_of(two, 2, "1gbit")))


def keep(figures: Figures, by_nodes: dict[int, dict[str, Any]]) -> None:
    """What the predictions were made from."""
    for nodes, found in by_nodes.items():
        figures.fact(
            f"{nodes} hosts, all_reduce seconds", {n: link["all_reduce_s"] for n, link in found["links"].items()}
        )
        for case, profiles in found["profiles"].items():
            for which, raw in profiles.items():
                full = {"buckets": json.dumps([(rounded(ready), n) for ready, n in buckets(raw["gradients"])])}
                kept = {name: rounded(x) for name, x in raw.items() if name != "gradients"}
                figures.fact(f"{nodes} hosts, profile, {case} blocks, {which}", {**kept, **full})


def rounded(value: Any) -> Any:
    return round(value, 5) if isinstance(value, float) else value


def main() -> int:
    options = parser(__doc__).parse_args()
    if os.geteuid() != 0:
        print("benchmarks.scaling: hosts of namespaces need root", file=sys.stderr)
        return 1
    models = ["resnet", "transformer" if options.quick else "minilm"]
    figures = Figures("scaling")
    hosts, ks, steps = ((2,), (0, 6), 2) if options.quick else ((2, 3), (0, 3, 6), 8)
    limit_s = 45 if options.quick else 430
    by_nodes = {nodes: measure(nodes, models, ks, steps, timeout_s=limit_s) for nodes in hosts}
    figures.fact("steps a case", steps)
    weights = by_nodes[2]["weights"]
    figures.fact("MiniLM's weights", weights)
    if weights == "random":
        print("MiniLM has random weights: scripts/data language has not been run", file=sys.stderr)
    report(figures, by_nodes, models, ks)
    keep(figures, by_nodes)
    figures.publish(quick=options.quick)
    return 0


if __name__ == "__main__":
    sys.exit(main())
