from __future__ import annotations

import json
from dataclasses import asdict

from launcher import peers
from launcher.outcome import Failure
from launcher.peers import Peers


class Store(dict):
    def set(self, key, value):
        self[key] = value.encode()

    def check(self, keys):
        return all(key in self for key in keys)


FIRST = Failure(rank=3, local_rank=1, host="h1", pid=9, returncode=-9, after_s=1.0, last_lines=("bye",))


def test_the_earliest_failure_of_all_nodes_is_agreed_on(monkeypatch):
    monkeypatch.setattr(peers, "_LOOK_S", 0.0)
    monkeypatch.setattr(peers, "_LINGER_S", 0.0)
    store = Store()
    nodes = [Peers(store, node=i, num_nodes=3) for i in range(3)]
    assert not any(node.failed() for node in nodes)
    nodes[1].publish(FIRST, 100.0)
    assert nodes[0].failed() and nodes[2].failed() and nodes[0].saw_failure
    nodes[2].publish(None, 101.0)
    assert nodes[0].earliest() == FIRST and nodes[0].earliest_moment() == 100.0
    assert nodes[1].earliest() is None and nodes[1].earliest_moment() == float("inf")
    assert json.loads(store["kgtrun/failure/1"])[1]["rank"] == asdict(FIRST)["rank"]


def test_one_node_asks_nobody_and_a_store_that_is_gone_is_no_news(monkeypatch):
    monkeypatch.setattr(peers, "_LOOK_S", 0.0)

    class Gone:
        def __getattr__(self, name):
            raise ConnectionError("gone")

    alone = Peers(Gone(), node=0, num_nodes=1)
    alone.publish(FIRST, 1.0)
    assert not alone.failed() and alone.earliest() is None
    two = Peers(Gone(), node=0, num_nodes=2)
    two.publish(FIRST, 1.0)
    assert not two.failed()
