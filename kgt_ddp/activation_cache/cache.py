"""The activation cache of one wrapped model: ties key, store, gate, prefetch and short circuit together.

    cache = ActivationCache(ddp, blocks, events, options)
    with cache.forward():          # around each training forward of the wrapper
        ...
    cache.summary()
    cache.close()

Each rank decides for itself whether a batch is read or computed; nothing here communicates, and no collective of the
training depends on it. Nothing here raises into training either: a fault switches the cache off with one line.

The wrapper's inputs are seen by a forward pre-hook on it, in front of DDP's copy to the device.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kgt_ddp.activation_cache.arrival import Arrival
from kgt_ddp.activation_cache.counters import Counters
from kgt_ddp.activation_cache.folder import CacheFolder
from kgt_ddp.activation_cache.gate import Gate
from kgt_ddp.activation_cache.options import CacheOptions
from kgt_ddp.activation_cache.prefetch import Prefetch
from kgt_ddp.activation_cache.prefix import Prefix
from kgt_ddp.activation_cache.recut import Progress, worth_recutting
from kgt_ddp.activation_cache.repeats import RepeatWatch
from kgt_ddp.activation_cache.session import Session
from kgt_ddp.activation_cache.writer import Writer
from kgt_ddp.blocks import Blocks
from kgtrun.contract.events import EventWriter

logger = logging.getLogger(__name__)


class ActivationCache:
    """See the module docstring.

    Args:
        ddp: the wrapper; held weakly.
        blocks: its partition, whose frontier the cache follows.
        events: where states and totals are recorded.
        progress: step and steps of the whole job (None: not known), the same on all ranks.
    """

    def __init__(
        self,
        ddp: nn.Module,
        blocks: Blocks,
        events: EventWriter,
        options: CacheOptions | None = None,
        *,
        progress: Callable[[], tuple[int, int | None]] = lambda: (0, None),
    ) -> None:
        self.options = options if options is not None else CacheOptions.from_environment()
        self.counters = Counters()
        self.off: str | None = "it is switched off" if self.options.mode == "off" else None
        """Why there is no cache at all, or None."""
        self._ddp = weakref.ref(ddp)
        self._blocks = blocks
        self._events = events
        self._folder = CacheFolder(self.options.directory or CacheFolder.default_path(), self.options.budget_bytes)
        self._writer = Writer(self._folder.may_grow)
        self._prefetch = Prefetch()
        self._session: Session | None = None
        self._progress = progress
        self._frontier = 0
        """At the last forward."""
        self._compiled = False
        self._began_again = False
        """Whether the current cut's gate was opened once more, see `_begin_again`."""
        self._said: tuple[Any, ...] = ()
        self._ids: Sequence[int] | None = None
        self._repeats = RepeatWatch(_world_size(ddp))
        self._tap = InputTap()
        self._hook = None if self.off else ddp.register_forward_pre_hook(self._tap, with_kwargs=True)

    # ---- one forward ------------------------------------------------------------------------------------------------

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Around one training forward of the wrapper, after its mask was applied."""
        inputs, arrival = self._tap.take(), self._tap.arrival
        if arrival is not None and inputs is not None:
            arrival.find(*inputs)
        with ExitStack() as stack:
            try:
                if inputs is not None and self._wonders():
                    self._repeats.note(*inputs)
                session = self._session_now()
                if session is not None and inputs is not None:
                    ids, self._ids = self._ids, None
                    around = session.forward(inputs[0], inputs[1], ids, arrival)
                    stack.enter_context(_Guarded(around, self._failed))
                elif arrival is not None:
                    arrival.give_up()
            except Exception as error:
                self._failed(error)
                if arrival is not None:
                    arrival.give_up()
            yield
        if arrival is not None:
            arrival.ids.tell()
        self._tell()

    def _wonders(self) -> bool:
        """Whether it is of use to know if samples come again, and when."""
        if self.off is not None:
            return False
        return self._repeats.epoch is None or (self.options.mode == "auto" and self.state != "open")

    def _session_now(self) -> Session | None:
        """The session of the current frontier, or of one before it; None where nothing is frozen."""
        frontier = self._blocks.frontier
        if self.off is not None:
            return None
        if frontier != self._frontier:
            self._frontier = frontier
            if self._session is not None and not self._stays(self._session, frontier):
                self._compiled = self._compiled or self._session.compiled
                self._session.close(discard=True)
                self._session = None
        if self._session is None and frontier:
            ddp = self._ddp()
            assert ddp is not None, "a cache does not outlive its wrapper"
            model = ddp.module
            assert isinstance(model, nn.Module)
            self._writer.resume()
            self._session = Session(
                model,
                Prefix(model, self._blocks),
                folder=self._folder,
                writer=self._writer,
                prefetch=self._prefetch,
                counters=self.counters,
                compact=not self.options.exact,
                gate=self._gate(),
                compiled=self._compiled,
            )
            self._began_again = False
        self._begin_again()
        return self._session

    def _stays(self, session: Session, frontier: int) -> bool:
        """Whether the records of the session's cut go on being used, now that the frontier is another one."""
        if session.prefix.cut > frontier or session.state in ("refused", "closed"):
            return False
        if session.read_only:
            return True  # nor could records of another cut be written there
        step, total_steps = self._progress()
        progress = Progress(
            epoch=self._repeats.epoch, num_samples=self._repeats.num_samples, step=step, total_steps=total_steps
        )
        return not worth_recutting(
            session.prefix.cut, frontier, progress, num_filled=session.num_looked_up, finds=session.finds
        )

    def _gate(self) -> Gate | None:
        """One for a new frontier, which knows what was seen of the data until now; None where nothing shall stop it."""
        if self.options.mode != "auto":
            return None
        repeats = self._repeats
        gate = Gate(self._patience(), repeating=repeats.share)
        if repeats.in_vain(self.options.patience):
            gate.give_up(f"of the last samples {repeats.share:.0%} had come before, in {repeats.num_samples:,}")
        return gate

    def _patience(self) -> int:
        """An epoch and a half, where something is known of it."""
        period = self._repeats.period
        if period is None:
            return self.options.patience
        # Just behind the first epoch what came again is what came late in it: the mean is too small.
        return max(self.options.patience, int(1.5 * max(period, self._repeats.epoch or 0)))

    def _begin_again(self) -> None:
        """Once a cut, if its gate was closed for lack of hits in a long first epoch and samples come again since. Tries would
        find only what was written before it was closed."""
        session, repeats = self._session, self._repeats
        if session is None or self._began_again or session.state != "closed" or not session.gate.in_vain:
            return
        if repeats.period is not None and not repeats.in_vain(0):
            self._began_again = True
            session.gate.begin_again(self._patience(), repeating=repeats.share, reason="samples come again by now")

    def _failed(self, error: Exception) -> None:
        self.off = f"{type(error).__name__}: {error}"
        logger.warning("activation cache: off after an error of its own: %s", self.off, exc_info=error)
        self._events.write("cache", state="failed", reason=self.off)

    def _tell(self) -> None:
        """One line and one event for each change of state."""
        session = self._session
        if session is None:
            return
        state = session.state
        reason = session.refused or session.gate.reason or "it is used wherever it can be"
        said = (session.prefix.cut, state, session.refused)
        if said == self._said or (state == "trying" and not self._said):
            self._said = said
            return
        self._said = said
        self._events.write("cache", state=state, reason=reason, cut=session.prefix.cut, **self._totals())
        if state == "refused":
            logger.warning("activation cache: the first %d blocks go uncached: %s", session.prefix.cut, reason)
        else:
            logger.info("activation cache: %s behind block %d: %s", state, session.prefix.cut - 1, reason)

    # ---- for loaders ------------------------------------------------------------------------------------------------

    def expect(self, ids: Sequence[int]) -> None:
        """A batch of these samples will come; see `loader.CachedLoader`."""
        self._prefetch.announce(ids)

    def comes(self, ids: Sequence[int], arrival: Arrival | None = None) -> None:
        """The next training forward is of these samples. `arrival`: they have stable ids."""
        self._ids = ids
        self._tap.arrival = arrival

    @property
    def folder(self) -> Path:
        """Where the files are."""
        return self._folder.path

    @property
    def watching(self) -> bool:
        """Whether there is a frozen prefix whose outputs may be kept just now."""
        return self.off is None and self._session is not None and self._session.state not in ("refused", "closed")

    # ---- totals -----------------------------------------------------------------------------------------------------

    @property
    def refused(self) -> str | None:
        """Why the current frontier goes uncached, or None."""
        return self.off or (self._session.refused if self._session is not None else None)

    @property
    def state(self) -> str:
        """off, idle (nothing frozen), refused, or the gate's state."""
        if self.off is not None:
            return "off"
        if self._session is None:
            return "idle"
        return self._session.state

    def drain(self, timeout_s: float = 10.0) -> bool:
        """Wait, at most so long, until what was computed is written."""
        return self._writer.drain(timeout_s)

    def summary(self) -> dict[str, Any]:
        """Mode, state and counters, as plain data."""
        return {"mode": self.options.mode, "state": self.state, "reason": self.refused, **self._totals()}

    def _totals(self) -> dict[str, Any]:
        self.counters.bytes_written = self._writer.num_bytes
        self.counters.background_s = self._writer.seconds + self._prefetch.seconds
        return self.counters.as_dict()

    def close(self) -> None:
        """Record the totals and let go of the file, which stays for the next start of the same job."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
            self._writer.drain(2.0)
            self._events.write("cache_end", **self.summary())
        if self._session is not None:
            self._session.close()
            self._session = None
        self.off = self.off or "it is closed"


class InputTap:
    """A forward pre-hook of the wrapper that keeps the arguments until `forward` asks for them. A copy keeps nothing.

    A forward that trains nothing gets samples that were not decoded put back: no cache is around it.
    """

    def __init__(self) -> None:
        self.arrival: Arrival | None = None
        self._inputs: tuple[tuple[Any, ...], dict[str, Any]] | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._inputs = (args, kwargs) if module.training else None
        trains = module.training and torch.is_grad_enabled()
        if not trains and self.arrival is not None and self.arrival.find(args, kwargs, strict=False):
            self.arrival.fill()

    def take(self) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        inputs, self._inputs = self._inputs, None
        return inputs

    def __reduce__(self) -> tuple[Any, ...]:
        return (InputTap, ())


class _Guarded:
    """A context manager whose end does not raise: what fails there is reported."""

    def __init__(self, inner: Any, failed: Any) -> None:
        self._inner, self._failed = inner, failed

    def __enter__(self) -> None:
        self._inner.__enter__()

    def __exit__(self, *exc: Any) -> None:
        try:
            self._inner.__exit__(None, None, None)
        except Exception as error:
            self._failed(error)


def _world_size(ddp: nn.Module) -> int:
    group = getattr(ddp, "process_group", None)
    return group.size() if group is not None else 1
