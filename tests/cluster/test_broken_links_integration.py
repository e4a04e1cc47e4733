"""A cut cable, a dead host: outcome, time and message on every host.

The stated bound: `--peer-timeout`, then `--shutdown-timeout` for ranks that do not end at once, and a few seconds.
"""

from __future__ import annotations

import os
import time

import pytest

from kgtrun.contract.events import read_events
from tests.cluster.hosts import hosts, needs_hosts
from tests.cluster.launch import BOUND_S, Launch
from tests.cluster.slurm import JOB, number_in, wait_until

pytestmark = [pytest.mark.cluster, needs_hosts]
slow = pytest.mark.skipif(not os.environ.get("KGTRUN_FULL_TESTS"), reason="slow: set KGTRUN_FULL_TESTS=1")


class Job(Launch):
    """A job that trains slowly and writes down its step."""

    def __init__(self, cluster, folder, *options: str, steps: int = 2000, step_s: float = 0.05) -> None:
        super().__init__(cluster, folder, JOB, str(folder), str(steps), str(step_s), options=options)

    def wait_for_step(self, step: int) -> None:
        wait_until(lambda: number_in(self.folder / "step") >= step, f"step {step}", 240)


@pytest.fixture
def two(tmp_path):
    with hosts(2, tmp_path / "net") as cluster:
        yield cluster


def test_a_cable_that_stays_out_ends_the_launch_on_both_hosts(two, tmp_path):
    job = Job(two, tmp_path / "job")
    job.wait_for_step(15)
    two.link("h1", "down")
    code, output, seconds = job.end("h0", BOUND_S)
    assert code == 1 and "node 1 (h1) is lost: no sign of life for 6 s" in output, output
    code, output, more = job.end("h1", BOUND_S - seconds)
    assert code == 1 and "no contact with the rendezvous at h0:29400 from h1" in output, output
    print(f"\ncable out: h0 ended after {seconds:.1f} s, h1 {more:.1f} s later")


@slow  # in CI the aimed one, inside a decision
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
    job = Job(two, tmp_path / "job", "--policy", "kgt", "--total-steps", "450", "--ref-per-node", "1", steps=150)
    job.wait_for_step(15)
    started = [e for e in read_events(job.folder / "run") if e["kind"] == "reference_start" and e["host"] == "h1"]
    pids = [e["child_pid"] for e in started if e["role"] == "launcher"]  # a reference that is up says so as well
    assert pids
    two.run("h1", "kill", "-9", *map(str, pids))
    for host in ("h0", "h1"):
        code, output, _ = job.end(host, 240)
        assert code == 0, output
        assert ("reference 0 ended with SIGKILL" in output) == (host == "h1"), output
