"""What the nodes of one launch tell each other about failures, through the rendezvous store.

Torch's agents notice a failure on another node only when a collective of theirs breaks; a rank that computes, sleeps
or waits for data would go on for ever. Here a node whose restarts are used up publishes its first failure, the others
look once a second, stop their ranks, and all agree on the earliest one. Moments are wall-clock times of different
hosts: with clocks that differ by more than the time between cause and consequence the order may be wrong, the end is
not.

A store that cannot be reached is no news: torch's own agent notices that.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from typing import Any, Protocol

from launcher.outcome import Failure

_LOOK_S = 1.0
_LINGER_S = 3.0
_POLL_S = 0.05


class Store(Protocol):
    """The part of torch's store that is used."""

    def set(self, key: str, value: str) -> Any: ...

    def get(self, key: str) -> bytes: ...

    def check(self, keys: list[str]) -> bool: ...


class Peers:
    """One attempt's view of the other nodes; with one node it knows nobody and costs nothing."""

    def __init__(self, store: Store, *, node: int, num_nodes: int) -> None:
        self._store, self._node = store, node
        self._others = [other for other in range(num_nodes) if other != node]
        self._looked_s = time.monotonic()
        self._published = False
        self.saw_failure = False

    def failed(self) -> bool:
        """Whether another node has published a failure; looks once a second."""
        if not self._others or time.monotonic() - self._looked_s < _LOOK_S:
            return False
        self._looked_s = time.monotonic()
        self.saw_failure = any(self._read(other) is not None for other in self._others)
        return self.saw_failure

    def publish(self, failure: Failure | None, moment_s: float) -> None:
        """Tell the others, then give them a moment to read: this node may be the one that hosts the store.

        Args:
            failure: the first on this node, None when this node stopped because of another one.
            moment_s: unix time of it.
        """
        if not self._others or self._published:
            return
        self._published = True
        try:
            self._store.set(f"kgtrun/failure/{self._node}", json.dumps([moment_s, failure and asdict(failure)]))
        except Exception:  # the store has gone, whatever torch calls that in this release
            return
        deadline = time.monotonic() + _LINGER_S
        while time.monotonic() < deadline and not all(self._has_published(other) for other in self._others):
            time.sleep(_POLL_S)

    def earliest(self) -> Failure | None:
        """The earliest failure that other nodes have published."""
        found = [item for other in self._others if (item := self._read(other)) and item[1]]
        return min(found, key=lambda item: item[0])[1] if found else None

    def earliest_moment(self) -> float:
        """Unix time of `earliest`, infinity without one."""
        return min((item[0] for other in self._others if (item := self._read(other)) and item[1]), default=float("inf"))

    def _has_published(self, node: int) -> bool:
        try:
            return self._store.check([f"kgtrun/failure/{node}"])
        except Exception:  # gone: nobody there to wait for
            return True

    def _read(self, node: int) -> tuple[float, Failure | None] | None:
        key = f"kgtrun/failure/{node}"
        try:
            if not self._store.check([key]):
                return None
            moment_s, fields = json.loads(self._store.get(key))
        except Exception:  # as above
            return None
        return moment_s, Failure(**{**fields, "last_lines": tuple(fields["last_lines"])}) if fields else None
