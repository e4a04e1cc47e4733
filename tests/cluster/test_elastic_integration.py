"""`--nnodes 1:3`: nodes join a running job, leave it, and die; it goes on from its last checkpoint, freezes included."""

from __future__ import annotations

import os
import signal
import sys

import pytest
import torch

from tests.cluster.hosts import HERE, hosts, needs_hosts
from tests.cluster.slurm import JOB, number_in, starts, wait_until

pytestmark = [
    pytest.mark.cluster,
    needs_hosts,
    pytest.mark.skipif(not os.environ.get("KGTRUN_FULL_TESTS"), reason="slow: set KGTRUN_FULL_TESTS=1"),
]
STEPS = 1500


def test_nodes_join_leave_and_die(tmp_path):
    folder = tmp_path / "job"
    folder.mkdir()
    with hosts(3, tmp_path / "net") as cluster:

        def start(node):
            return cluster.start(
                f"h{node}",
                sys.executable, "-m", "kgtrun",
                "--nnodes", "1:3", "--rdzv-backend", "c10d", "--rdzv-endpoint", "h0:29400", "--rdzv-id", "elastic",
                "--rdzv-conf", f"is_host={int(node == 0)},last_call_timeout=2", "--max-restarts", "3",
                "--peer-timeout", "6", "--shutdown-timeout", "5", "--run-dir", str(tmp_path / "run"),
                "--deterministic", "--policy", "linear:start=0.01,stop=0.9", "--total-steps", str(STEPS),
                JOB, str(folder), str(STEPS), "0.03", "--save-every", "10",
                PYTHONPATH=str(HERE.parents[1]),
            )  # fmt: skip

        def worlds():
            return [start["world"] for start in starts(folder)] if (folder / "starts").exists() else []

        def goes_on(world):
            wait_until(lambda: worlds()[-1:] == [world], f"a start with {world} ranks, there were {worlds()}", 60)
            reached = number_in(folder / "step")
            wait_until(lambda: number_in(folder / "step") > reached + 12, f"progress with {world} ranks", 60)

        launchers = [start(0), start(1)]
        try:
            goes_on(2)
            launchers.append(start(2))
            goes_on(3)
            launchers[1].send_signal(signal.SIGTERM)
            output, _ = launchers[1].communicate(timeout=60)
            assert launchers[1].returncode == 143, output
            goes_on(2)
            cluster.kill("h2")
            goes_on(1)
            output, _ = launchers[0].communicate(timeout=120)
            assert launchers[0].returncode == 0, output
        except BaseException:
            for launcher in launchers:
                launcher.kill()
            print("\n".join(launcher.communicate()[0] for launcher in launchers if not launcher.stdout.closed))
            raise
        print(f"\nworlds {worlds()}")
    begins = [start["step"] for start in starts(folder)]
    assert begins == sorted(begins) and begins[-1] > 0
    assert torch.load(folder / "final.pt", weights_only=True)["freezes"][0]["frontier"] == 1
