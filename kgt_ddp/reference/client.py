"""The trainer's side of a reference process. It never waits for the reference and never raises into training.

    client = ReferenceClient(directory, index)
    client.offer_model(module, ["layer1.0", "layer1.1"], lags=(50, 100, 200))
    client.retain_probe(sub_batch(args, kwargs, 64))
    ...
    if step % interval == 0:
        client.submit(step, generation)          # copies the weights; False: not now
    for score in client.poll():                  # never waits
        ...
    client.announce()                            # every step: the copy of the weights may have ended by now
    client.close()

States: offline (no connection; tried again with a growing pause) → online (the model is sent, submits are taken). Any
trouble with the connection leads back to offline: a reference may be killed, stopped, or started again at any moment.
What could not be sent is dropped and counted in `stats`, never kept for later: a later step is worth more.

A forked child (a DataLoader worker) that inherits a client does nothing with it.
"""

from __future__ import annotations

import functools
import logging
import os
import select
import socket
import statistics
import time
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final

import cloudpickle
from torch import nn

from kgt_ddp.partition import unwrap
from kgt_ddp.reference import protocol
from kgt_ddp.reference.arena import named_tensors, payload_file
from kgt_ddp.reference.offer import Offer
from kgt_ddp.reference.protocol import ProtocolError, Score
from kgt_ddp.reference.runner import Similarities
from kgt_ddp.reference.samples import Samples
from kgt_ddp.reference.selection import Selection, runs_of_positions
from kgt_ddp.reference.transfer import Transfer
from kgtrun.contract import environment

FIRST_PAUSE_S: Final = 0.25
LONGEST_PAUSE_S: Final = 15.0
REMEMBERED_COSTS: Final = 9
FEWEST_COSTS: Final = 4
"""The first submits are dearer: the model's first forward, the first floor."""

logger = logging.getLogger(__name__)


@dataclass
class Stats:
    """Counts since the client was made."""

    submitted: int = 0
    dropped: int = 0
    """Submits that were refused: no reference, or its mailbox full."""
    scores: int = 0
    stale: int = 0
    """Scores of an older generation, discarded."""
    superseded: int = 0
    """Submits that the reference passed over for a later one."""
    connections: int = 0
    errors: int = 0
    bytes_copied: int = 0
    busy_s: float = 0.0
    """Seconds of the calling thread spent in `submit` and `poll`."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What the reference takes for one submit, the median of the last ones that it worked on."""

    passed_s: float
    """Seconds that pass; submits that come faster are passed over."""
    cpu_s: float
    """Seconds of computing."""


@dataclass
class _Online:
    """State that dies with the connection."""

    connection: socket.socket
    free: list[int]
    in_flight: int = 0
    selection: Selection = field(default_factory=Selection)
    probe_sent: bool = False
    leaving: tuple[dict[str, Any], list[int]] | None = None
    """A submit whose weights are still being copied off the device."""


class ReferenceClient:
    """Connection of one trainer to one reference process of its node. Not for use by several threads at once."""

    def __init__(self, directory: str | os.PathLike[str], index: int, *, num_slots: int = 2) -> None:
        """No connection is made yet.

        Args:
            directory: the node's private directory of reference sockets.
            num_slots: copies of the weights that may be on their way at once; each is shared memory of their size.

        Raises:
            ValueError: the socket's path would be too long for the system.
        """
        self.stats = Stats()
        self.problem: str | None = None
        """Why there are no scores, as far as it is known; None when all is well."""
        self._path = protocol.socket_path(directory, index)
        self._num_slots = num_slots
        self._pid = os.getpid()
        self._offer: Offer | None = None
        self._probe: Samples | None = None
        self._online: _Online | None = None
        self._pause_s = FIRST_PAUSE_S
        self._next_try_s = 0.0
        self._generation = -1
        self._transfer = Transfer()
        self._costs: deque[tuple[float, float]] = deque(maxlen=REMEMBERED_COSTS)

    @classmethod
    def from_environment(cls, rank_on_node: int, environ: Mapping[str, str] | None = None) -> ReferenceClient | None:
        """The client of a trainer under kgtrun: reference `rank_on_node % number of references`. None: there are none."""
        values = os.environ if environ is None else environ
        directory = values.get(environment.REFERENCE_DIR)
        references = environment.integer(environment.NUM_REFERENCES, environ=values)
        return cls(directory, rank_on_node % references) if directory and references else None

    def offer_model(
        self, module: nn.Module, watched: Sequence[str], *, lags: Sequence[int], pairing: str = "probe"
    ) -> bool:
        """Say what is to be scored; to be called again when the model or the watched blocks change.

        Args:
            module: the user's model (not a DistributedDataParallel around it). Only its structure is read here.
            watched: names of the blocks, in order of execution. The reference runs no deeper than needed for these.
            lags: distances in steps at which two versions are compared, for instance (50, 100, 200).
            pairing: see `pairing`: "probe", "fresh", "live" or "eval".

        Returns:
            False if this model cannot be sent; `problem` says why, and training goes on without scores.
        """
        self._drop_offer()
        module = unwrap(module)  # the reference runs eagerly
        try:
            self._offer = Offer.of(module, watched, lags=lags, pairing=pairing, num_slots=self._num_slots)
        except Exception as error:
            self.problem = str(error)
            logger.warning("no reference can score this model: %s", error)
            return False
        self.problem = None
        return True

    def retain_probe(self, samples: Samples) -> None:
        """The samples of the "probe" pairing: sent with the next submit, and again to a reference started anew."""
        self._probe = samples
        if self._online is not None:
            self._online.probe_sent = False

    def submit(
        self,
        step: int,
        generation: int,
        *,
        samples: Samples | None = None,
        similarities: Similarities | None = None,
        unchanged: Collection[str] = (),
        lags: Sequence[int] | None = None,
    ) -> bool:
        """Hand the model's present weights over. Call it where they are whole: after an optimizer step.

        Args:
            step: clock step, for `Score.step`; lags are differences of these.
            generation: mask generation; scores of earlier ones are no longer returned.
            samples: for the pairings "fresh", "live" and "eval": this submit's samples.
            similarities: for "live" and "eval": what `tap.ActivationTap` recorded for these samples.
            unchanged: names of blocks whose weights do not move any more; they are left out once they have arrived.
            lags: distances from now on, instead of those of `offer_model`.

        Returns:
            True if it is on its way; False if it was dropped: no reference, or one that has not caught up.
        """
        started = time.perf_counter()
        try:
            self._generation = max(self._generation, generation)
            accepted = self._submit(step, generation, samples, similarities, unchanged, lags)
        except Exception as error:  # a bug or a lack of memory here must not end training
            self._fail(f"submit failed: {type(error).__name__}: {error}")
            accepted = False
        self.stats.submitted += accepted
        self.stats.dropped += not accepted
        self.stats.busy_s += time.perf_counter() - started
        return accepted

    def announce(self) -> None:
        """Tell the reference of the submit whose weights were still leaving the device, if they have left it by now. For
        every step: a submit that waits for the next `poll` is scored an interval late. Never waits."""
        if self._online is None or self._online.leaving is None or self._pid != os.getpid():
            return
        started = time.perf_counter()
        self._send_leaving()
        self.stats.busy_s += time.perf_counter() - started

    def poll(self, timeout_s: float = 0.0) -> list[Score]:
        """Scores that have arrived, of the latest generation that was submitted. Does not wait, unless it is told to
        wait up to `timeout_s` for the first message (repeatable runs do, with a bound)."""
        started = time.perf_counter()
        scores: list[Score] = []
        try:
            if self._connect() is not None:
                self._send_leaving()
            self._wait(timeout_s)
            while self._online is not None and (packet := protocol.receive(self._online.connection)) is not None:
                protocol.close_all(packet[1])
                self._note(protocol.decode(packet[0]), scores)
        except EOFError:
            self._fail("the reference has gone")
        except (OSError, ProtocolError) as error:
            self._fail(f"the connection to the reference broke: {error}")
        self.stats.busy_s += time.perf_counter() - started
        return scores

    @property
    def in_flight(self) -> int:
        """Submits to which more may come: 0 means that waiting is pointless."""
        return self._online.in_flight if self._online is not None and self._pid == os.getpid() else 0

    @property
    def cost(self) -> Cost | None:
        """What a submit costs the reference, whether or not there was a score; None until a few have been seen."""
        if len(self._costs) < FEWEST_COSTS:
            return None
        passed_s, cpu_s = (statistics.median(column) for column in zip(*self._costs, strict=True))
        return Cost(passed_s=passed_s, cpu_s=cpu_s)

    @property
    def offered(self) -> bool:
        """Is there a model that can be scored? If not, waiting is pointless."""
        return self._offer is not None

    @property
    def connected(self) -> bool:
        """Is there a connection, as far as is known without trying?"""
        return self._online is not None

    def close(self) -> None:
        """Close the connection and give the shared memory back. May be called twice."""
        self._disconnect()
        self._drop_offer()

    def _submit(
        self,
        step: int,
        generation: int,
        samples: Samples | None,
        similarities: Similarities | None,
        unchanged: Collection[str],
        lags: Sequence[int] | None,
    ) -> bool:
        online, offer = self._connect(), self._offer
        if online is None or offer is None or not online.free or online.leaving is not None:
            return False
        tensors = named_tensors(offer.module)
        if not offer.layout.fits(tensors):
            self.problem = "the model's parameters have changed shape since it was offered"
            return False
        if samples is None and not online.probe_sent:
            samples = self._probe
        try:
            fds = _payloads(samples, similarities)
        except OSError:
            raise  # no memory or no descriptors now: `submit` tries again later
        except Exception as error:  # of a type of the user's own
            self._cannot_pickle(samples, error)
            return False
        present = online.selection.choose(tensors, unchanged)
        slot = online.free.pop()
        online.leaving = ({}, fds)  # from here on the connection owns them, whatever fails
        header = {
            "step": step,
            "generation": generation,
            "slot": slot,
            "names": None if len(present) == len(tensors) else runs_of_positions(present, tensors),
            "samples": samples is not None,
            "similarities": similarities is not None,
            "lags": None if lags is None else list(lags),
        }
        self._transfer.start({name: tensors[name] for name in present}, offer.slots[slot])
        self.stats.bytes_copied += sum(tensors[name].nbytes for name in present)
        online.probe_sent = online.probe_sent or samples is not None
        online.leaving = (header, fds)
        self._send_leaving()
        return self._online is not None

    def _cannot_pickle(self, samples: Samples | None, error: Exception) -> None:
        self.problem = f"samples cannot be pickled ({type(error).__name__}: {error})"
        if samples is self._probe:  # nor will they at the next submit
            logger.warning("no reference can score this model: its %s", self.problem)
            self._drop_offer()

    def _send_leaving(self) -> None:
        """Announce the weights whose copy is complete."""
        online = self._online
        if online is None or online.leaving is None or not self._transfer.done():
            return
        (header, fds), online.leaving = online.leaving, None
        try:
            sent = protocol.send(online.connection, protocol.encode("submit", **header), fds)
        except (OSError, ProtocolError) as error:
            self._fail(f"the reference took no more work: {error}")
            return
        finally:
            protocol.close_all(fds)
        if sent:
            online.in_flight += 1
        else:  # cannot happen with two slots and a socket of ordinary size; the next connection begins anew
            self._fail("the socket to the reference is full")

    def _connect(self) -> _Online | None:
        """The connection, made now if it is time to try; None while there is none."""
        if self._pid != os.getpid() or self._offer is None:
            return None
        if self._online is not None or time.monotonic() < self._next_try_s:
            return self._online
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        try:
            connection.connect(str(self._path))
            if protocol.peer_uid(connection) != os.getuid():
                raise PermissionError("the reference's socket belongs to another user")
            self._offer.send(connection, max(self._generation, 0))
        except (OSError, ProtocolError) as error:
            connection.close()
            self._fail(f"no reference at {self._path}: {error}")
            return None
        self._online = _Online(connection, list(range(self._num_slots)))
        self._pause_s, self.problem = FIRST_PAUSE_S, None
        self.stats.connections += 1
        return self._online

    def _note(self, message: dict[str, Any], scores: list[Score]) -> None:
        online, offer = self._online, self._offer
        if online is None or offer is None:
            return
        match message["type"]:
            case "score":
                score = protocol.score_from(message, offer.watched)
                if score.generation == self._generation:
                    self.stats.scores += 1
                    scores.append(score)
                else:
                    self.stats.stale += 1
            case "free":
                if message["slot"] not in range(self._num_slots) or message["slot"] in online.free:
                    raise ProtocolError("a slot was freed that was not taken")
                online.free.append(message["slot"])
            case "done":
                online.in_flight -= 1
                self.stats.superseded += bool(message.get("superseded"))
                if message["cost_s"] > 0:  # it was worked on
                    self._costs.append((message["cost_s"], message["cpu_s"]))
            case "error":
                self.stats.errors += 1
                if self.problem != message["text"]:
                    logger.warning("the reference cannot score: %s", message["text"])
                self.problem = message["text"]

    def _wait(self, timeout_s: float) -> None:
        if timeout_s > 0 and self._online is not None:
            readable = select.poll()  # `select.select` takes no descriptor from 1024 on
            readable.register(self._online.connection, select.POLLIN)
            readable.poll(timeout_s * 1000)

    def _fail(self, why: str) -> None:
        """Go offline, and try again after a pause that grows."""
        if why != self.problem:
            logger.debug("%s", why)
        self.problem = why
        self._disconnect()
        self._next_try_s = time.monotonic() + self._pause_s
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)

    def _disconnect(self) -> None:
        if self._online is None:
            return
        online, self._online = self._online, None
        if online.leaving is not None:
            protocol.close_all(online.leaving[1])
        with suppress(OSError):
            online.connection.close()

    def _drop_offer(self) -> None:
        self._disconnect()
        if self._offer is not None:
            if self._pid == os.getpid():  # a forked child has no device
                self._transfer.release()
            self._offer.close()
        self._offer = None


def _payloads(*values: Any) -> list[int]:
    """Descriptors of the values that are not None, pickled, classes of `__main__` with them; none is left open if one
    cannot be."""
    fds: list[int] = []
    try:
        for value in values:
            if value is not None:
                fds.append(payload_file("kgtrun-payload", functools.partial(cloudpickle.dump, value)))
    except BaseException:
        protocol.close_all(fds)
        raise
    return fds
