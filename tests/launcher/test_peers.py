from __future__ import annotations

import json
import signal
import threading
import time
from dataclasses import asdict, replace

import pytest

from launcher import peers
from launcher.outcome import Failure
from launcher.peers import Peers
from launcher.signals import Stopped


class Store(dict):
    def set(self, key, value):
        self[key] = value.encode()

    def check(self, keys):
        return all(key in self for key in keys)

    def get(self, key):
        return self[key]


class Gone:
    """A store whose host has gone."""

    clone = None

    def __getattr__(self, name):
        raise ConnectionError("Connection timed out")


FIRST = Failure(rank=3, local_rank=1, host="h1", pid=9, returncode=-9, after_s=1.0, last_lines=("bye",))


def soon(condition, timeout_s=20.0):
    deadline = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


@pytest.fixture
def meet(monkeypatch):
    """Nodes around one store, closed at the end."""
    monkeypatch.setattr(peers, "_LINGER_S", 0.0)
    monkeypatch.setattr(peers, "HEAR_OUT_S", 0.0)
    made: list[Peers] = []

    def meet(count, store=None, **options):
        store = Store() if store is None else store
        made.extend(Peers(store, node=i, num_nodes=count, look_s=0.01, **options) for i in range(count))
        return made

    yield meet
    for one in made:
        one.close()


def test_the_earliest_failure_of_all_nodes_is_agreed_on(meet):
    store = Store()
    nodes = meet(3, store)
    assert not any(node.failed() for node in nodes)
    nodes[1].publish(FIRST, 100.0)
    assert soon(lambda: nodes[0].failed() and nodes[2].failed()) and nodes[0].saw_failure
    nodes[2].publish(None, 101.0)
    assert nodes[0].earliest() == FIRST and nodes[0].earliest_moment() == 100.0
    assert nodes[1].earliest() is None and nodes[1].earliest_moment() == float("inf")
    assert json.loads(store["kgtrun/failure/1"])[1]["rank"] == asdict(FIRST)["rank"]


def test_nodes_that_only_lost_their_connections_are_told_apart(meet):
    nodes = meet(3)
    nodes[1].publish(replace(FIRST, reaction=True), 100.0)
    assert soon(nodes[0].failed) and nodes[0].only_reactions() and nodes[0].saw_failure_s <= time.monotonic()
    nodes[2].publish(FIRST, 101.0)
    assert not nodes[0].only_reactions()


def test_one_node_asks_nobody():
    alone = Peers(Gone(), node=0, num_nodes=1)
    alone.publish(FIRST, 1.0)
    alone.ended(wait_s=10)
    assert not alone.failed() and alone.earliest() is None and alone.words() == ""
    alone.close()


def test_a_store_that_cannot_be_reached_is_a_loss_that_says_where(meet):
    two = meet(2, Gone(), endpoint="h0:29400")
    assert soon(lambda: two[0].failed())
    assert "no contact with the rendezvous at h0:29400" in two[0].lost and "Connection timed out" in two[0].lost
    two[0].publish(FIRST, 1.0)
    two[0].ended(wait_s=10)
    assert two[0].earliest() is None


def test_a_node_that_falls_silent_is_lost_and_named(meet):
    nodes = meet(3, timeout_s=0.5)
    time.sleep(0.8)
    assert not any(node.failed() for node in nodes)
    nodes[2].close()
    assert soon(lambda: nodes[1].failed())
    assert "node 2 (" in nodes[1].lost and "no sign of life for 0.5 s" in nodes[1].lost
    nodes[1].publish(None, 5.0)
    assert soon(lambda: nodes[0].failed()) and nodes[0].words() == nodes[1].lost and nodes[0].earliest() is None


def test_a_node_whose_ranks_have_ended_may_go_and_the_one_behind_it_is_watched(meet):
    nodes = meet(3, timeout_s=2)
    nodes[1].ended(wait_s=0)
    nodes[1].close()
    time.sleep(2.5)
    assert not nodes[0].failed() and nodes[0].some_ended() and not nodes[1].some_ended()
    nodes[2].close()
    assert soon(nodes[0].failed) and "node 2 (" in nodes[0].lost


def test_the_end_of_the_others_is_waited_for_as_long_as_they_live(meet):
    """The node that hosts the store must not leave while another's last rank writes its checkpoint."""
    nodes = meet(2, timeout_s=2)
    ended = threading.Event()

    def wait():
        nodes[0].ended(wait_s=0.1, patient=True)
        ended.set()

    threading.Thread(target=wait, daemon=True).start()
    assert not ended.wait(2.5)
    nodes[1].ended(wait_s=0)
    assert ended.wait(20) and not nodes[0].others_failed


def test_one_that_falls_silent_is_not_waited_for(meet):
    nodes = meet(2, timeout_s=0.3)
    nodes[1].close()
    nodes[0].ended(wait_s=0.1, patient=True)
    assert nodes[0].others_failed


def test_a_failure_that_was_read_is_known_when_the_store_has_gone(meet):
    class Leaving(Store):
        gone = False

        def check(self, keys):
            if self.gone:
                raise ConnectionError("Connection reset by peer")
            return super().check(keys)

    store = Leaving()
    nodes = meet(2, store)
    nodes[1].publish(FIRST, 100.0)
    assert soon(nodes[0].failed)
    store.gone = True
    assert soon(lambda: nodes[0].lost)
    assert nodes[0].earliest() == FIRST and nodes[0].earliest_moment() == 100.0


def test_a_hang_is_told(meet):
    nodes = meet(2)
    nodes[1].publish(None, 100.0, hung=True)
    assert soon(nodes[0].failed) and nodes[0].hung() and not nodes[1].hung()


def test_silence_is_borne_for_ever_when_asked(meet):
    nodes = meet(2)
    nodes[1].close()
    time.sleep(0.1)
    assert not nodes[0].failed()


def test_the_end_is_waited_for_with_a_bound(meet):
    nodes = meet(2)
    begun = time.monotonic()
    nodes[0].ended(wait_s=0.2)
    assert time.monotonic() - begun >= 0.2
    nodes[1].ended(wait_s=30)
    assert time.monotonic() - begun < 20


def test_the_end_is_not_waited_for_when_another_node_has_failed(meet):
    nodes = meet(2)
    begun = time.monotonic()
    nodes[1].publish(FIRST, 7.0)
    nodes[0].ended(wait_s=60)
    assert time.monotonic() - begun < 20 and nodes[0].others_failed


def test_a_store_that_left_after_the_end_is_no_failure(meet):
    (node, *_) = meet(2, Gone())
    assert soon(node.failed)
    node.ended(wait_s=60)
    assert not node.others_failed


def test_a_stop_signal_while_waiting_for_the_others_goes_through(meet, monkeypatch):
    """It would end in "succeeded", with exit code 0 in place of the signal's."""
    first, _ = meet(2)

    def stop(_):
        raise Stopped("received SIGTERM", signal.SIGTERM)

    monkeypatch.setattr(peers.time, "sleep", stop)
    with pytest.raises(Stopped):
        first.ended(wait_s=30)
