"""Status, exit code and the failure that goes first, from what attempts and peers know."""

from __future__ import annotations

import signal
import threading
import time

import pytest

from launcher.outcome import FAILED, HUNG_EXIT_CODE, SIGNALLED, SUCCEEDED, Failure
from launcher.verdict import Verdict


class Attempt:
    number = 2

    def __init__(self, *failures, hung=False):
        self.failures, self.hung = failures, threading.Event()
        if hung:
            self.hung.set()


class Peers:
    def __init__(self, *, others_failed=False, failure=None, moment_s=float("inf"), lost="", hung=False):
        self.others_failed, self.hung = others_failed, lambda: hung
        self.earliest, self.earliest_moment, self.words = lambda: failure, lambda: moment_s, lambda: lost


def failure(code, host="here", **fields):
    return Failure(rank=1, local_rank=1, host=host, pid=7, returncode=code, after_s=3.0, **fields)


@pytest.fixture
def verdict():
    return Verdict(begun_s=time.monotonic() - 5, hang_timeout_s=60, sidecars=lambda: {"count": 1})


def test_success_and_what_is_always_there(verdict):
    found = verdict.ended(Attempt(), Peers(), failed=False)
    assert (found.status, found.exit_code, found.restarts, found.sidecars) == (SUCCEEDED, 0, 2, {"count": 1})
    assert found.seconds == pytest.approx(5, abs=1)
    assert verdict.ended(None, None, failed=False).restarts == 0


def test_a_signal(verdict):
    found = verdict.signalled(None, signal.SIGTERM)
    assert (found.status, found.exit_code, found.signal) == (SIGNALLED, 143, "SIGTERM")
    assert found.message == "ended by SIGTERM" and verdict.signalled(None, signal.SIGINT, "x").message == "x"


def test_a_hang_goes_before_the_failures_it_led_to(verdict):
    found = verdict.ended(Attempt(failure(-15), hung=True), Peers(), failed=True)
    assert (found.status, found.exit_code, len(found.failures)) == (FAILED, HUNG_EXIT_CODE, 1)
    assert "60 s" in found.message


def test_a_hang_that_another_node_was_the_first_to_see_is_one_here_too(verdict):
    own = Attempt(failure(-15, consequence=True))
    found = verdict.ended(own, Peers(others_failed=True, hung=True), failed=True)
    assert (found.status, found.exit_code) == (FAILED, HUNG_EXIT_CODE) and "60 s" in found.message
    lost = failure(1, reaction=True)  # its ranks were in the same collective
    assert verdict.ended(Attempt(lost), Peers(hung=True), failed=True).exit_code == HUNG_EXIT_CODE
    assert verdict.ended(own, Peers(hung=True, failure=lost), failed=True).exit_code == HUNG_EXIT_CODE
    assert verdict.ended(Attempt(failure(3)), Peers(hung=True), failed=True).exit_code == 3


@pytest.mark.parametrize(("earlier_s", "code", "hosts"), [(1, 5, ["there", "here"]), (-1, 137, ["here"])])
def test_the_earlier_of_two_nodes_goes_first(verdict, earlier_s, code, hosts):
    own = failure(-9)
    peers = Peers(failure=failure(5, "there"), moment_s=verdict.unix_time(own) - earlier_s)
    found = verdict.ended(Attempt(own), peers, failed=True)
    assert (found.exit_code, [its.host for its in found.failures]) == (code, hosts)


def test_a_lost_connection_there_goes_after_the_reason_given_here(verdict):
    own, lost = failure(1), failure(3, "there", reaction=True)
    for earlier_s, hosts in ((1, ["here"]), (4, ["there", "here"])):
        moment_s = verdict.unix_time(lost) - earlier_s
        found = verdict.failed(Attempt(own), Peers(failure=lost, moment_s=moment_s), "")
        assert [its.host for its in found.failures] == hosts


def test_a_success_here_is_none_where_another_node_failed(verdict):
    peers = Peers(others_failed=True, failure=failure(5, "there"), moment_s=0.0)
    assert verdict.ended(Attempt(), peers, failed=False).exit_code == 5
    found = verdict.ended(Attempt(), Peers(others_failed=True), failed=False)
    assert (found.status, found.exit_code, found.message) == (FAILED, 1, "the worker group failed on another node")


def test_a_lost_node_is_named_instead_of_the_ranks_that_were_ended_for_it(verdict):
    own = Attempt(failure(-15, consequence=True))
    found = verdict.ended(own, Peers(lost="node 1 is lost"), failed=True)
    assert (found.exit_code, found.failures, found.message) == (1, (), "node 1 is lost")
