"""A cut cable, a dead host: outcome, time and message on every host.

The stated bound: `--peer-timeout`, then `--shutdown-timeout` for ranks that do not end at once, and a few seconds.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from kgtrun.contract.events import read_events
from tests.cluster.hosts import HERE, hosts, needs_hosts
from tests.cluster.slurm import JOB, number_in, wait_until

pytestmark = [pytest.mark.cluster, needs_hosts]
slow = pytest.mark.skipif(not os.environ.get("KGTRUN_FULL_TESTS"), reason="slow: set KGTRUN_FULL_TESTS=1")

ROOT = str(HERE.parents[1])
PEER_TIMEOUT_S, GRACE_S, SLACK_S = 6, 3, 15


class Job:
    """One launch on two hosts, training slowly; `ends` are what each host's launcher ended with."""

    def __init__(self, cluster, folder, *options: str, steps: int = 2000, step_s: float = 0.05, count: int = 2) -> None:
        self.cluster, self.folder, self.steps = cluster, folder, steps
        folder.mkdir(exist_ok=True)
        self.options, self.step_s, self.count = options, step_s, count
        self.launchers: dict[str, subprocess.Popen[str]] = {}
        for node in range(count):
            self.start(node)

    def start(self, node: int) -> None:
        self.launchers[f"h{node}"] = self.cluster.start(
            f"h{node}",
            sys.executable, "-m", "kgtrun",
            "--nnodes", str(self.count), "--node-rank", str(node), "--master-addr", "h0", "--master-port", "29400",
            "--peer-timeout", str(PEER_TIMEOUT_S), "--shutdown-timeout", str(GRACE_S),
            "--policy", "static:blocks=2,step=9", "--run-dir", str(self.folder / "run"),
            *self.options, JOB, str(self.folder), str(self.steps), str(self.step_s),
            PYTHONPATH=ROOT,
        )  # fmt: skip

    def wait_for_step(self, step: int) -> None:
        wait_until(lambda: number_in(self.folder / "step") >= step, f"step {step}", 60)

    def end(self, host: str, timeout_s: float) -> tuple[int, str, float]:
        """Exit code, output and seconds until the launcher of `host` ended."""
        begun = time.monotonic()
        try:
            output, _ = self.launchers[host].communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            self.launchers[host].kill()
            raise AssertionError(f"the launcher of {host} had not ended after {timeout_s} s") from None
        return self.launchers[host].returncode, output, time.monotonic() - begun


@pytest.fixture
def two(tmp_path):
    with hosts(2, tmp_path / "net") as cluster:
        yield cluster


BOUND_S = PEER_TIMEOUT_S + GRACE_S + SLACK_S


def test_a_cable_that_stays_out_ends_the_launch_on_both_hosts(two, tmp_path):
    job = Job(two, tmp_path / "job")
    job.wait_for_step(15)
    two.link("h1", "down")
    code, output, seconds = job.end("h0", BOUND_S)
    assert code == 1 and "node 1 (h1) is lost: no sign of life for 6 s" in output, output
    code, output, more = job.end("h1", BOUND_S - seconds)
    assert code == 1 and "no contact with the rendezvous at h0:29400 from h1" in output, output
    print(f"\ncable out: h0 ended after {seconds:.1f} s, h1 {more:.1f} s later")


def test_a_dead_host_of_the_rendezvous_ends_the_launch_on_the_other(two, tmp_path):
    job = Job(two, tmp_path / "job")
    job.wait_for_step(15)
    two.kill("h0")
    code, output, seconds = job.end("h1", BOUND_S)
    assert code != 0, output
    assert "no contact with the rendezvous" in output or "First failure: rank 1 on h1" in output, output
    print(f"\nrank 0's host killed: h1 ended after {seconds:.1f} s with {code}")


@slow
def test_a_dead_host_ends_the_launch_on_the_host_of_the_rendezvous(two, tmp_path):
    job = Job(two, tmp_path / "job")
    job.wait_for_step(15)
    two.kill("h1")
    code, output, seconds = job.end("h0", BOUND_S)
    assert code != 0 and ("First failure: rank 0 on h0" in output or "is lost" in output), output
    print(f"\nhost killed: h0 ended after {seconds:.1f} s with {code}")


@slow
def test_a_cable_that_comes_back_after_10_seconds_costs_that_time_and_nothing_else(two, tmp_path):
    job = Job(two, tmp_path / "job", "--peer-timeout", "40", steps=150)
    job.wait_for_step(15)
    two.link("h1", "down")
    time.sleep(10)
    two.link("h1", "up")
    for host in ("h0", "h1"):
        code, output, _ = job.end(host, 60)
        assert code == 0, output


@slow
def test_references_that_die_on_one_node_do_not_end_the_launch(two, tmp_path):
    job = Job(two, tmp_path / "job", "--policy", "kgt", "--total-steps", "150", "--ref-per-node", "1", steps=150)
    job.wait_for_step(15)
    pids = [
        e["child_pid"] for e in read_events(job.folder / "run") if e["kind"] == "reference_start" and e["host"] == "h1"
    ]
    two.run("h1", "kill", "-9", *map(str, pids))
    for host in ("h0", "h1"):
        code, output, _ = job.end(host, 90)
        assert code == 0, output
        assert ("reference 0 ended with SIGKILL" in output) == (host == "h1"), output
