"""What the nodes of one launch tell each other, through the rendezvous store: failures, signs of life, their end.

Torch's agents notice a failure on another node only when a collective of theirs breaks; a rank that computes, sleeps
or waits for data would go on for ever. Here a node whose restarts are used up publishes its first failure, the others
look once a second, note what it says (the store may be gone once their ranks have ended), stop their ranks, and all agree on
the earliest one. Moments are wall-clock times of different
hosts: with clocks that differ by more than the time between cause and consequence the order may be wrong, the end is
not.

A host that vanishes says nothing. So each node gives a sign of life once a second and watches its successor's: when that
stops for `timeout_s`, or the store cannot be reached any more (`launcher.links` bounds that wait), `lost` says so. A node
whose ranks have all ended may go; from then on the one behind it is watched.

All of it runs on a connection and in a thread of its own: the main thread may be ending ranks, or wait at torch's exit
barrier, and is alive nevertheless. A stop signal that comes while the main thread waits here (`Stopped`) goes through.
"""

from __future__ import annotations

import json
import math
import socket
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any, NamedTuple, Protocol

from launcher.first_failure import HEAR_OUT_S
from launcher.outcome import Failure
from launcher.signals import Stopped

LOOK_S = 1.0
_LINGER_S = 3.0
_POLL_S = 0.05
_ANY_FAILURE = "kgtrun/failure"
"""One key to look for each second, however many nodes there are."""


class Store(Protocol):
    """The part of torch's store that is used."""

    def set(self, key: str, value: str) -> Any: ...

    def get(self, key: str) -> bytes: ...

    def check(self, keys: list[str]) -> bool: ...


class News(NamedTuple):
    """What a node publishes when its ranks are ended for good."""

    moment_s: float
    """Unix time of the failure."""
    failure: Failure | None
    """The first on that node; None where it stopped because of another one, or for a hang."""
    lost: str | None
    hung: bool


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
        self._news: dict[int, News] = {}
        """By node, as far as it has been read."""
        self._watched: list[int] = [*self._others[node:], *self._others[:node]]
        """Nodes that may still be lost: the successor first."""
        self._seen: tuple[str, float] = ("", time.monotonic())
        """The last sign of life of the first of these, and when it changed."""
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

    def publish(self, failure: Failure | None, moment_s: float, *, hung: bool = False) -> None:
        """Tell the others, then give them a moment to read: this node may be the one that hosts the store.

        Args:
            failure: the first on this node, None when this node stopped because of another one, or for a hang.
            moment_s: unix time of it.
            hung: the ranks here were ended as they made no progress.
        """
        if not self._others or self._published or self._unreachable:
            return
        self._published = True
        try:
            news = json.dumps([moment_s, failure and asdict(failure), self.lost, hung])
            self._store.set(f"{_ANY_FAILURE}/{self._node}", news)
            self._store.set(_ANY_FAILURE, "1")
        except Stopped:
            raise
        except Exception:  # the store has gone, whatever torch calls that in this release
            return
        heard_out_s = HEAR_OUT_S if failure is not None and failure.reaction else 0.0
        self._wait_for("failure", self._others, _LINGER_S + heard_out_s)

    def ended(self, *, wait_s: float, patient: bool = False) -> None:
        """Say that no rank is left here, and wait until all others have said so, at most `wait_s`, or one has failed.

        `others_failed` is the answer.

        Args:
            patient: wait longer, as long as all give signs of life. This node may be the one that hosts the store, without
                which the others would take themselves for cut off.
        """
        if not self._others or self._unreachable:
            return
        try:
            self._store.set(f"kgtrun/ended/{self._node}", "1")
        except Stopped:
            raise
        except Exception:  # as above
            return
        if patient and self._timeout_s:
            wait_s = math.inf
        self._wait_for("ended", self._others, wait_s, unless=lambda: self.saw_failure)

    @property
    def others_failed(self) -> bool:
        """Whether the ranks of another node failed, or it fell silent, for one whose own ranks have all succeeded.

        A store that is gone by then is no sign of that: its host leaves as soon as all have ended.
        """
        return self.saw_failure or (self.lost is not None and not self._unreachable)

    def earliest(self) -> Failure | None:
        """The earliest failure that other nodes have published."""
        found = [news for news in self._published_by_others() if news.failure]
        return min(found, key=lambda news: news.moment_s).failure if found else None

    def earliest_moment(self) -> float:
        """Unix time of `earliest`, infinity without one."""
        return min((news.moment_s for news in self._published_by_others() if news.failure), default=math.inf)

    def only_reactions(self) -> bool:
        """Whether others have only published what looks like a reaction to a failure here."""
        return all(news.failure is not None and news.failure.reaction for news in self._published_by_others())

    def hung(self) -> bool:
        """Whether another node has stopped ranks that made no progress."""
        return any(news.hung for news in self._published_by_others())

    def some_ended(self) -> bool:
        """Whether the ranks of another node have all ended: it takes part in no further start."""
        try:
            return not self._unreachable and any(self._store.check([f"kgtrun/ended/{other}"]) for other in self._others)
        except Stopped:
            raise
        except Exception:  # as above
            return False

    def words(self) -> str:
        """Who was lost, as this node or another one says; empty when nobody was."""
        return self.lost or next((news.lost for news in self._published_by_others() if news.lost), "")

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
        self._read_news()
        if self._news and not self.saw_failure:
            self.saw_failure_s = time.monotonic()
            self.saw_failure = True
        if not self._timeout_s or self.lost is not None:
            return
        if self._watched and self._store.check([f"kgtrun/ended/{self._watched[0]}"]):
            self._watched.pop(0)
            self._seen = ("", time.monotonic())
        if not self._watched:
            return
        successor = self._watched[0]
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

    def _read_news(self) -> None:
        """Note what others have published since."""
        if not self._store.check([_ANY_FAILURE]):
            return
        for other in self._others:
            key = f"{_ANY_FAILURE}/{other}"
            if other in self._news or not self._store.check([key]):
                continue
            moment_s, fields, lost, hung = json.loads(self._store.get(key))
            failure = Failure(**{**fields, "last_lines": tuple(fields["last_lines"])}) if fields else None
            self._news[other] = News(moment_s, failure, lost, hung)

    def _published_by_others(self) -> list[News]:
        if self._others and not self._unreachable:
            try:
                self._read_news()
            except Stopped:
                raise
            except Exception:  # the store has gone: what was read before is known
                pass
        return list(self._news.values())
