"""One trainer's connection, in the reference process: its model, its memory of snapshots, its latest submit.

States: new (only a "model" message is accepted) → ready (submits are scored, or, where the model could not be built,
answered without a score). A protocol error ends the session; an error of the model's own code is reported to the
trainer and recorded once.
"""

from __future__ import annotations

import logging
import pickle
import socket
import time
from collections import deque
from typing import Any, Final

import torch
from torch import Tensor

from kgt_ddp.reference import model, protocol
from kgt_ddp.reference.arena import Layout, named_tensors, read_payload
from kgt_ddp.reference.pairing import Scorer, Work
from kgt_ddp.reference.protocol import ProtocolError
from kgt_ddp.reference.runner import Runner, make_runner
from kgt_ddp.reference.samples import Samples
from kgtrun.contract.events import EventWriter

MAX_SLOTS: Final = 4
MAX_UNSENT: Final = 256

logger = logging.getLogger(__name__)


class _Submit:
    """A submit that waits: its header, what came with it, and the weights of earlier ones that it leaves out."""

    def __init__(self, header: dict[str, Any], weights: dict[str, Tensor], samples: Any, similarities: Any) -> None:
        self.header = header
        self.weights = weights
        self.samples = samples
        self.similarities = similarities


class Session:
    """See the file."""

    def __init__(self, connection: socket.socket, *, precision: str, events: EventWriter) -> None:
        self._connection = connection
        self._precision = precision
        self._events = events
        self._generation = 0
        self._watched: list[str] = []
        self._lags: tuple[int, ...] = ()
        self._pairing = ""
        self._slots: list[dict[str, Tensor]] = []
        self._taken: set[int] = set()
        self._runner: Runner | None = None
        self._scorer: Scorer | None = None
        self._ready = False
        self._waiting: _Submit | None = None
        self._unsent: deque[bytes] = deque()
        self._told: str | None = None

    @property
    def has_work(self) -> bool:
        return self._waiting is not None

    def close(self) -> None:
        """Close the connection and let the model and the shared memory go."""
        self._connection.close()
        self._slots, self._runner, self._scorer, self._waiting = [], None, None, None

    def read(self) -> None:
        """Take in every message that has arrived.

        Raises:
            ProtocolError: the peer sent what this protocol does not have, or not now.
            EOFError, OSError: the peer has gone.
        """
        while (packet := protocol.receive(self._connection)) is not None:
            data, fds = packet
            try:
                message = protocol.decode(data)
                if message["type"] == "model" and not self._ready:
                    self._take_model(message, fds)
                elif message["type"] == "submit" and self._ready:
                    self._take_submit(message, fds)
                else:
                    raise ProtocolError(f"a {message['type']!r} message out of turn")
            finally:
                protocol.close_all(fds)

    def flush(self) -> bool:
        """Send what waits to be sent, as far as the peer takes it; False if it has gone."""
        try:
            while self._unsent and protocol.send(self._connection, self._unsent[0]):
                self._unsent.popleft()
        except OSError:
            return False
        return True

    def work(self) -> None:
        """Score the submit that waits."""
        submit, self._waiting = self._waiting, None
        if submit is None:
            return
        step, generation, slot = (submit.header[name] for name in ("step", "generation", "slot"))
        freed: list[int] = []

        def taken() -> None:
            submit.weights = {}
            if slot is not None and not freed:
                freed.append(slot)
                self._free(slot)
                self.flush()

        cost = {"cost_s": 0.0, "cpu_s": 0.0}
        try:
            if self._scorer is not None and self._runner is not None:
                cost = self._score(submit, step, generation, taken)
        except (Exception, SystemExit) as error:
            self._report(f"{type(error).__name__}: {error}")
        finally:
            taken()
        self._send("done", step=step, generation=generation, **cost)

    def _score(self, submit: _Submit, step: int, generation: int, taken: Any) -> dict[str, float]:
        """Send the scores, if there are any; returns what they cost."""
        assert self._scorer is not None and self._runner is not None
        work = Work(
            step=step,
            lags=self._lags,
            weights=submit.weights,
            samples=submit.samples,
            similarities=submit.similarities,
        )
        started_s, started_cpu_s = time.perf_counter(), time.process_time()
        comparisons = self._scorer.score(work, taken)
        cost_s, cpu_s = time.perf_counter() - started_s, time.process_time() - started_cpu_s
        cost = {"cost_s": round(cost_s, 6), "cpu_s": round(cpu_s, 6)}
        for comparison in comparisons:
            fields = {
                "step": step,
                "generation": generation,
                "pairing": self._pairing,
                "precision": self._runner.precision,
                "lag_steps": comparison.lag_steps,
                "values": comparison.values,
                "floors": self._scorer.floors,
                **cost,
            }
            self._send("score", **fields)
            self._events.write("reference_score", **fields)
        return cost

    def _take_model(self, message: dict[str, Any], fds: list[int]) -> None:
        if message["version"] != protocol.VERSION:
            raise ProtocolError(f"protocol version {message['version']} instead of {protocol.VERSION}")
        if not 1 <= message["num_slots"] <= MAX_SLOTS or len(fds) != 1 + message["num_slots"]:
            raise ProtocolError("a model without its payload and slots")
        self._generation = message["generation"]
        envelope = _unpickled(fds[0], "a model")
        try:
            layout = Layout(dict(envelope["entries"]), int(envelope["num_bytes"]))
            self._watched = [str(name) for name in envelope["watched"]]
            self._lags = _lags(envelope["lags"])
            self._pairing = str(envelope["pairing"])
            structure, surroundings = envelope["structure"], dict(envelope["surroundings"])
        except (KeyError, TypeError, ValueError) as error:
            raise ProtocolError(f"a model's description that makes no sense: {error!r}") from None
        self._slots = [layout.map(fd) for fd in fds[1:]]
        self._ready = True
        try:
            self._build(structure, surroundings, layout)
            self._events.write("reference_model", blocks=self._watched, pairing=self._pairing, bytes=layout.num_bytes)
        except (Exception, SystemExit) as error:
            self._report(f"the model cannot be built here: {type(error).__name__}: {error}")

    def _build(self, structure: bytes, surroundings: dict[str, Any], layout: Layout) -> None:
        model.enter(surroundings)
        module = model.model_from(structure)
        if not layout.fits(named_tensors(module)):
            raise ValueError("its parameters are not those of the trainer's model")
        runner = make_runner(module, self._watched, self._precision)
        exact = None
        if self._precision != "fp32":
            exact = make_runner(model.model_from(structure), self._watched, "fp32")
        self._scorer = Scorer(self._pairing, runner, exact, self._watched)
        self._runner = runner

    def _take_submit(self, message: dict[str, Any], fds: list[int]) -> None:
        slot, generation = message["slot"], message["generation"]
        if len(fds) != message["samples"] + message["similarities"]:
            raise ProtocolError("a submit without its payloads")
        if slot is None or slot not in range(len(self._slots)) or slot in self._taken:
            raise ProtocolError(f"a submit with slot {slot}")
        weights = _selected(self._slots[slot], message["names"])
        payloads = iter(fds)
        try:
            samples = _unpickled(next(payloads), "samples") if message["samples"] else None
        except ProtocolError as error:
            # Of a type of the user's own that does not load here: no fault of the connection's, and a new one would not help.
            self._report(f"no scores: {error}")
            samples = None
            if self._pairing == "probe":
                self._scorer = None  # there will be no others
        similarities = _unpickled(next(payloads), "similarities") if message["similarities"] else None
        if samples is not None and not isinstance(samples, Samples):
            raise ProtocolError("samples of another type")
        if similarities is not None and not _are_similarities(similarities):
            raise ProtocolError("similarities of another type")
        if message.get("lags") is not None:
            self._lags = _lags(message["lags"])
        self._taken.add(slot)
        if generation < self._generation:
            self._events.write("reference_stale", step=message["step"], generation=generation, now=self._generation)
            self._free(slot)
            self._pass_over(message)
            return
        self._generation = generation
        self._supersede(_Submit(message, weights, samples, similarities))

    def _supersede(self, newer: _Submit) -> None:
        """The newer submit takes the place of one that waits, with what only that one brought."""
        older, self._waiting = self._waiting, newer
        if older is None:
            return
        for name, value in older.weights.items():
            if name not in newer.weights:
                newer.weights[name] = value.clone()
        if newer.samples is None and newer.similarities is None:
            newer.samples = older.samples
        self._free(older.header["slot"])
        self._pass_over(older.header)

    def _pass_over(self, header: dict[str, Any]) -> None:
        fields = {"cost_s": 0.0, "cpu_s": 0.0, "superseded": True}
        self._send("done", step=header["step"], generation=header["generation"], **fields)

    def _free(self, slot: int) -> None:
        self._taken.discard(slot)
        self._send("free", slot=slot)

    def _report(self, text: str) -> None:
        """Tell the trainer, and record it unless it is what was recorded last."""
        text = text[:2000]
        logger.debug("%s", text)
        if text != self._told:
            self._events.write("reference_error", text=text)
        self._told = text
        self._send("error", text=text)

    def _send(self, kind: str, **fields: Any) -> None:
        """Queue a message. A trainer that does not listen loses its oldest scores, never a "free" or a "done"."""
        self._unsent.append(protocol.encode(kind, **fields))
        if len(self._unsent) > MAX_UNSENT:
            for index, data in enumerate(self._unsent):
                if data.startswith((b'{"type": "score"', b'{"type": "error"')):
                    del self._unsent[index]
                    return


def _unpickled(fd: int, what: str) -> Any:
    """Content of a payload. Unpickling runs what the peer says: a process of the same user, the kernel assures.

    Raises:
        ProtocolError: it cannot be unpickled.
    """
    try:
        return pickle.loads(read_payload(fd))
    except (Exception, SystemExit) as error:
        raise ProtocolError(f"{what} that cannot be unpickled ({type(error).__name__}: {error})") from None


def _lags(value: Any) -> tuple[int, ...]:
    if (
        not isinstance(value, list)
        or len(value) > 16
        or not all(isinstance(lag, int) and 0 < lag < 2**40 for lag in value)
    ):
        raise ProtocolError(f"lags {value!r:.80}")
    return tuple(value)


def _selected(slot: dict[str, Tensor], runs: list[Any] | None) -> dict[str, Tensor]:
    """Tensors of a slot by runs [first, end) of their positions; None: all."""
    if runs is None:
        return dict(slot)
    names = list(slot)
    chosen: dict[str, Tensor] = {}
    for run in runs:
        if not (isinstance(run, list) and len(run) == 2 and all(isinstance(i, int) for i in run)):
            raise ProtocolError("names that are no runs of positions")
        if not 0 <= run[0] < run[1] <= len(names):
            raise ProtocolError(f"names {run} of {len(names)}")
        chosen.update((name, slot[name]) for name in names[run[0] : run[1]])
    return chosen


def _are_similarities(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(name, str) and (gram is None or (isinstance(gram, torch.Tensor) and gram.dim() == 2))
        for name, gram in value.items()
    )
