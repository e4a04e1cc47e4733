"""What the nodes of one launch tell each other, through the rendezvous store: failures, signs of life, their end.

Torch's agents notice a failure on another node only when a collective of theirs breaks; a rank that computes, sleeps
or waits for data would go on for ever. Here a node whose restarts are used up publishes its first failure, the others
look once a second, stop their ranks, and all agree on the earliest one. Moments are wall-clock times of different
hosts: with clocks that differ by more than the time between cause and consequence the order may be wrong, the end is
not.

A host that vanishes says nothing. So each node gives a sign of life once a second and watches its successor's: when that
stops for `timeout_s`, or the store cannot be reached any more (`launcher.links` bounds that wait), `lost` says so.

All of it runs on a connection and in a thread of its own: the main thread may be ending ranks, or wait at torch's exit
barrier, and is alive nevertheless. A stop signal that comes while the main thread waits here (`Stopped`) goes through.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any, Protocol

from launcher.first_failure import HEAR_OUT_S
from launcher.outcome import Failure
from launcher.signals import Stopped

LOOK_S = 1.0
_LINGER_S = 3.0
_POLL_S = 0.05


class Store(Protocol):
    """The part of torch's store that is used."""

    def set(self, key: str, value: str) -> Any: ...

    def get(self, key: str) -> bytes: ...

    def check(self, keys: list[str]) -> bool: ...


def connection_of_its_own(store: Any) -> Store:
    """The same store over another connection: torch's clients serve one call at a time, however long it takes."""
    clone: Callable[[], Store] | None = getattr(store, "clone", None)
    return clone() if clone else store


class Peers:
    """One attempt's view of the other nodes; with one node it knows nobody and costs nothing.

    Args:
        timeout_s: silence after which a node is lost; 0 waits for ever.
        endpoint: of the store, for messages.
    """

    def __init__(
        self,
        store: Any,
        *,
        node: int,
        num_nodes: int,
        timeout_s: float = 0.0,
        endpoint: str = "",
        look_s: float = LOOK_S,
    ) -> None:
        self._node, self._timeout_s, self._endpoint, self._look_s = node, timeout_s, endpoint, look_s
        self._others = [other for other in range(num_nodes) if other != node]
        self._published = False
        self._unreachable = False
        self._seen: tuple[str, float] = ("", time.monotonic())
        """The successor's last sign of life, and when it changed."""
        self._beats = 0
        self._closing = threading.Event()
        self.saw_failure = False
        self.saw_failure_s = 0.0
        """When, monotonic."""
        self.lost: str | None = None
        """Why a node, or all of them, must be given up."""
        if self._others:
            self._store = connection_of_its_own(store)
            self._thread = threading.Thread(target=self._run, name="peers", daemon=True)
            self._thread.start()

    def failed(self) -> bool:
        """Whether another node has published a failure, or is lost. Never waits."""
        return self.saw_failure or self.lost is not None

    def publish(self, failure: Failure | None, moment_s: float) -> None:
        """Tell the others, then give them a moment to read: this node may be the one that hosts the store.

        Args:
            failure: the first on this node, None when this node stopped because of another one.
            moment_s: unix time of it.
        """
        if not self._others or self._published or self._unreachable:
            return
        self._published = True
        try:
            news = json.dumps([moment_s, failure and asdict(failure), self.lost])
            self._store.set(f"kgtrun/failure/{self._node}", news)
        except Stopped:
            raise
        except Exception:  # the store has gone, whatever torch calls that in this release
            return
        heard_out_s = HEAR_OUT_S if failure is not None and failure.reaction else 0.0
        self._wait_for("failure", self._others, _LINGER_S + heard_out_s)

    def ended(self, *, wait_s: float) -> None:
        """Say that no rank is left here, and wait until all others have said so, at most `wait_s`, or one has failed.

        `others_failed` is the answer.
        """
        if not self._others or self._unreachable:
            return
        try:
            self._store.set(f"kgtrun/ended/{self._node}", "1")
        except Stopped:
            raise
        except Exception:  # as above
            return
        self._wait_for("ended", self._others, wait_s, unless=lambda: self.saw_failure)

    @property
    def others_failed(self) -> bool:
        """Whether the ranks of another node failed, or it fell silent, for one whose own ranks have all succeeded.

        A store that is gone by then is no sign of that: its host leaves as soon as all have ended.
        """
        return self.saw_failure or (self.lost is not None and not self._unreachable)

    def earliest(self) -> Failure | None:
        """The earliest failure that other nodes have published."""
        found = [item for item in self._published_by_others() if item[1]]
        return min(found, key=lambda item: item[0])[1] if found else None

    def earliest_moment(self) -> float:
        """Unix time of `earliest`, infinity without one."""
        return min((item[0] for item in self._published_by_others() if item[1]), default=float("inf"))

    def only_reactions(self) -> bool:
        """Whether others have only published what looks like a reaction to a failure here."""
        return all(item[1] is not None and item[1].reaction for item in self._published_by_others())

    def words(self) -> str:
        """Who was lost, as this node or another one says; empty when nobody was."""
        return self.lost or next((item[2] for item in self._published_by_others() if item[2]), "")

    def close(self) -> None:
        """No more signs of life from here."""
        self._closing.set()
        if self._others:
            self._thread.join(timeout=1)

    def _run(self) -> None:
        while not self._closing.is_set():
            try:
                self._look()
            except Exception as error:
                self._unreachable = True
                if not self._closing.is_set():
                    where = f" at {self._endpoint}" if self._endpoint else ""
                    self.lost = (
                        f"no contact with the rendezvous{where} from {socket.gethostname()}: that host, its launcher or the "
                        f"network between has gone ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
                    )
                return
            self._closing.wait(self._look_s)

    def _look(self) -> None:
        self._beats += 1
        self._store.set(f"kgtrun/alive/{self._node}", f"{self._beats} {socket.gethostname()}")
        if not self.saw_failure and any(self._store.check([f"kgtrun/failure/{other}"]) for other in self._others):
            self.saw_failure_s = time.monotonic()
            self.saw_failure = True
        if not self._timeout_s or self.lost is not None:
            return
        successor = self._others[self._node % len(self._others)]
        key = f"kgtrun/alive/{successor}"
        beat = self._store.get(key).decode() if self._store.check([key]) else ""
        if beat != self._seen[0]:
            self._seen = (beat, time.monotonic())
        elif time.monotonic() - self._seen[1] > self._timeout_s:
            host = beat.partition(" ")[2]
            self.lost = (
                f"node {successor}{f' ({host})' if host else ''} is lost: no sign of life for {self._timeout_s:g} s; its "
                "host, its launcher or the network between has gone"
            )

    def _wait_for(
        self, what: str, nodes: Iterable[int], wait_s: float, unless: Callable[[], bool] = lambda: False
    ) -> None:
        missing, deadline = set(nodes), time.monotonic() + wait_s
        try:
            while missing and time.monotonic() < deadline and not (self._unreachable or self.lost or unless()):
                missing -= {node for node in missing if self._store.check([f"kgtrun/{what}/{node}"])}
                time.sleep(_POLL_S)
        except Stopped:
            raise
        except Exception:  # gone: nobody there to wait for
            return

    def _published_by_others(self) -> list[tuple[float, Failure | None, str | None]]:
        found: list[tuple[float, Failure | None, str | None]] = []
        if self._unreachable:
            return found
        for other in self._others:
            key = f"kgtrun/failure/{other}"
            try:
                if not self._store.check([key]):
                    continue
                moment_s, fields, lost = json.loads(self._store.get(key))
            except Stopped:
                raise
            except Exception:  # as above
                return found
            failure = Failure(**{**fields, "last_lines": tuple(fields["last_lines"])}) if fields else None
            found.append((moment_s, failure, lost))
        return found
