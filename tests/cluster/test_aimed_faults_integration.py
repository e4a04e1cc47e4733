"""A fault inside a step, and inside a decision: outcome, time and message on every host that is left.

Those that wait out a time limit are left out without KGTRUN_FULL_TESTS=1.
"""

from __future__ import annotations

import json
import os
import time

import pytest

from kgtrun.contract.events import read_events
from tests.cluster.hosts import HERE, hosts, needs_hosts
from tests.cluster.launch import BOUND_S, Launch
from tests.cluster.slurm import wait_until

pytestmark = [pytest.mark.cluster, needs_hosts]
slow = pytest.mark.skipif(not os.environ.get("KGTRUN_FULL_TESTS"), reason="slow: set KGTRUN_FULL_TESTS=1")

JOB = str(HERE / "aimed_job.py")
STEPS = 40
AIM, AFTER, INTERVAL = 20, 6, 3
"""As the job has them."""
GRADIENT_BYTES = 5 * 512 * 512 * 4
"""What a rank of the job sends in a step with one of its six blocks frozen and two hosts."""


@pytest.fixture
def two(tmp_path):
    with hosts(2, tmp_path / "net") as cluster:
        yield cluster


def begin(cluster, folder, moment: str, *options: str, count: int = 2) -> Launch:
    """A job that has stopped at its moment."""
    launch = Launch(cluster, folder, JOB, str(folder), str(STEPS), moment, options=options, count=count)
    if moment != "none":
        try:
            wait_until(lambda: (folder / "held").exists(), f"the job to stop in a {moment}", 240)
        except AssertionError:
            for process in launch.launchers.values():
                process.kill()
            print("\n".join(process.communicate(timeout=60)[0] for process in launch.launchers.values()))
            raise
    return launch


def assert_ended_alike(folder, world: int) -> None:
    everyone = json.loads((folder / "end").read_text())
    assert len(everyone) == world and all(mine == everyone[0] for mine in everyone)
    assert everyone[0][0] == 2, "both decisions were applied"


def ended(launch, host: str, what: str, bound_s: float = BOUND_S) -> tuple[int, str, float]:
    """Exit code, output and seconds until the launch on this host ended; told as a line, too."""
    code, output, seconds = launch.end(host, bound_s)
    words = ("is lost", "no contact", "First failure")
    line = next((line.strip() for line in output.splitlines() if any(w in line for w in words)), "")
    print(f"\n{what}: {host} ended with {code} after {seconds:.1f} s: {line}")
    return code, output, seconds


def assert_both_give_up(launch, what: str) -> None:
    """Within one bound, each for the host it has lost."""
    code, output, seconds = ended(launch, "h0", what)
    assert code == 1 and "node 1 (h1) is lost: no sign of life for 6 s" in output, output
    code, output, _ = ended(launch, "h1", "then, on the other host", BOUND_S - seconds)
    assert code == 1 and "no contact with the rendezvous at h0:29400 from h1" in output, output


def test_a_host_that_dies_inside_a_step_ends_the_launch_on_the_other(two, tmp_path):
    launch = begin(two, tmp_path / "job", "step")
    two.kill("h1")
    code, output, _ = ended(launch, "h0", "host killed inside a step")
    assert code != 0, output
    assert "First failure: rank 0 on h0" in output or "node 1 (h1) is lost" in output, output


def test_rank_0s_host_that_dies_inside_a_decision_ends_the_launch_on_the_other(two, tmp_path):
    launch = begin(two, tmp_path / "job", "decision")
    two.kill("h0")
    code, output, _ = ended(launch, "h1", "rank 0's host killed inside a decision")
    assert code != 0, output
    assert "no contact with the rendezvous" in output or "First failure: rank 1 on h1" in output, output


@slow
def test_a_cable_that_goes_inside_a_decision_and_stays_out_ends_the_launch_on_both(two, tmp_path):
    launch = begin(two, tmp_path / "job", "decision")
    two.link("h1", "down")
    (tmp_path / "job" / "go on").write_text("")
    assert_both_give_up(launch, "cable out for ever inside a decision")


@slow
def test_a_cable_that_is_out_for_10_seconds_inside_a_decision_costs_time_and_nothing_else(two, tmp_path):
    launch = begin(two, tmp_path / "job", "decision", "--peer-timeout", "40")
    two.link("h1", "down")
    (tmp_path / "job" / "go on").write_text("")
    time.sleep(10)
    two.link("h1", "up")
    for host in ("h0", "h1"):
        # TCP asks again at growing distances, so it notices late that the cable is in.
        code, output, _ = ended(launch, host, "cable out for 10 s inside a decision", 60)
        assert code == 0, output
    assert_ended_alike(tmp_path / "job", 2)


def cut_among_the_gradients(cluster, launch) -> None:
    """Slow the link down, let the job go on, and pull h1's cable while its gradients are on their way."""

    def sent() -> int:
        return int(cluster.run("h1", "cat", "/sys/class/net/eth0/statistics/tx_bytes"))

    cluster.limit("h1", "5mbit")  # 5 MB need 8 s
    before = sent()
    (launch.folder / "go on").write_text("")
    wait_until(lambda: sent() - before > GRADIENT_BYTES // 16, "gradients on the wire", 60)
    cluster.link("h1", "down")
    assert sent() - before < GRADIENT_BYTES // 2, "the cable went in the middle of the all_reduce"


@slow
def test_a_cable_that_goes_among_the_gradients_and_stays_out_ends_the_launch_on_both(two, tmp_path):
    launch = begin(two, tmp_path / "job", "gradients")
    cut_among_the_gradients(two, launch)
    assert_both_give_up(launch, "cable out for ever in an all_reduce of gradients")


@slow
def test_a_cable_that_is_out_for_10_seconds_among_the_gradients_costs_time_and_nothing_else(two, tmp_path):
    launch = begin(two, tmp_path / "job", "gradients", "--peer-timeout", "60")
    cut_among_the_gradients(two, launch)
    time.sleep(10)
    two.link("h1", "up")
    two.limit("h1", "none")
    for host in ("h0", "h1"):
        code, output, _ = ended(launch, host, "cable out for 10 s in an all_reduce of gradients", 120)
        assert code == 0 and "is lost" not in output and "no contact" not in output, output
    assert_ended_alike(launch.folder, 2)


def kill_references_until_given_up(cluster, host: str, run_dir) -> None:
    """Kill this host's reference, and each that comes in its place, until its launcher starts no more."""

    def of_host(kind: str) -> list[dict]:
        found = (e for e in read_events(run_dir) if e["role"] == "launcher" and e["host"] == host)
        return [e for e in found if e["kind"] == kind]

    killed = 0

    def is_given_up() -> bool:
        nonlocal killed
        for event in of_host("reference_start")[killed:]:
            cluster.run(host, "sh", "-c", f"kill -9 {event['child_pid']} || true")
            killed += 1
        return any(event["given_up"] for event in of_host("reference_exit"))

    wait_until(is_given_up, f"the launcher of {host} to give its reference up", 180)


@slow
def test_references_dead_on_one_node_leave_the_decisions_to_the_scores_of_the_other(two, tmp_path):
    launch = begin(two, tmp_path / "job", "scores", "--ref-per-node", "1", "--deterministic")
    kill_references_until_given_up(two, "h1", launch.folder / "run")
    (launch.folder / "go on").write_text("")
    for host in ("h0", "h1"):
        code, output, _ = ended(launch, host, "references dead on h1", 180)
        assert code == 0, output
        for words in ("SIGKILL (signal 9); no more restarts", "the connection to the reference broke"):
            assert (words in output) == (host == "h1"), output
    assert_ended_alike(launch.folder, 2)
    events = list(read_events(launch.folder / "run"))
    scores = [e for e in events if e["kind"] == "score" and e["lag_steps"] == 2 * INTERVAL]
    heard = {tuple(e["values"]) for e in scores if e["index"] == 0}
    decisions = [e for e in events if e["kind"] == "decision" and e["numbers"]["plasticity"][0] is not None]
    alone = {e["step"] <= AIM: [] for e in decisions}
    for event in decisions:
        if event["step"] <= AIM or event["step"] >= AIM + AFTER:
            alone[event["step"] <= AIM].append(tuple(event["numbers"]["plasticity"][:-1]) in heard)
    assert alone[True] and not any(alone[True]), "until the fault decisions are made from the mean of both nodes"
    assert alone[False] and all(alone[False]), "then from what the reference of h0 says"
    assert max(e["step"] for e in scores if e["index"] == 1) <= AIM + AFTER
    assert {e["host"] for e in events if e["kind"] == "not_repeatable"} == {"h1"}


@slow
def test_four_hosts_freeze_the_same_and_end_with_the_same_weights(tmp_path):
    with hosts(4, tmp_path / "net") as cluster:
        launch = begin(cluster, tmp_path / "job", "none", count=4)
        for host in launch.launchers:
            code, output, _ = launch.end(host, 180)
            assert code == 0, output
    assert_ended_alike(tmp_path / "job", 4)
