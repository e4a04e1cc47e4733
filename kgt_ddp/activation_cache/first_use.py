"""Before a frontier is used: run the model both ways and compare, and learn what the short circuit needs.

One batch answers for the form of its call (`key`), in this order:

1. does the prefix compute the same twice, without random numbers, and each sample for itself, in whatever company?
   Text: also padded to another length;
2. is the model's outcome (outputs and gradients) the same when the frontier unit returns what a record holds and every
   other skipped module returns NaN? A module whose NaN shows is read from behind the frontier: a stray goes on computing
   (a target embedding, say), a unit makes the frontier uncacheable, and the objection names it;
3. which of the arguments that are named like labels leave the prefix alone? Those stay out of the keys.

All runs are side runs (`side_run`), without collectives; they cost about four steps, once a frontier and form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from kgt_ddp.activation_cache.key import Batch, Keys
from kgt_ddp.activation_cache.outputs import Outline, UnsupportedOutputError, map_tensors, poisoned
from kgt_ddp.activation_cache.prefix import Prefix
from kgt_ddp.activation_cache.record import Codec, segments
from kgt_ddp.activation_cache.shapes import ShapeRule
from kgt_ddp.activation_cache.short_circuit import Replacement, captured, replaced, stopped_at
from kgt_ddp.activation_cache.side_run import Outcome, close, on_the_side, outcome, random_states

_LABELS = ("label", "target", "decoder_")


class ObjectionError(Exception):
    """This frontier cannot be cached; the text says why, and which block it is."""


class PaddingObjectionError(ObjectionError):
    """It cannot be cached by tokens without padding; by whole padded samples it may."""


class NotYetError(Exception):
    """This batch cannot answer (one sample, no finite outcome); the next one may."""


@dataclass
class Route:
    """How to go round the prefix."""

    codec: Codec
    outlines: dict[nn.Module, list[Outline]]
    """What each skipped module returns, call by call; the frontier unit is not among them."""
    padding_seen: bool
    """Whether the check saw padding. Without, the first padded batch is checked again."""
    num_calls: dict[nn.Module, ShapeRule]
    """How often each is called: as a shape of one dimension, it may follow from the number of frames, say."""
    most: int
    """Samples of the largest batch that was computed: a larger one may be computed in pieces."""
    excluded: set[str] = field(default_factory=set)

    def predictable(self, batch: Batch) -> bool:
        return (
            batch.size <= self.most
            and self.codec.knows_shared(batch)
            and all(
                self.num_calls[module].predict(batch.dims) == (len(outlines),)
                and all(outline.predictable(batch.dims) for outline in outlines)
                for module, outlines in self.outlines.items()
            )
        )

    @contextmanager
    def learning(self, batch: Batch) -> Iterator[None]:
        """Around a forward that computes: if shapes for such a batch are unknown, learn them."""
        if self.predictable(batch):
            yield
            return
        seen: dict[nn.Module, list[Any]] = {module: [] for module in self.outlines}

        def observer(outlines: list[Outline], calls: list[Any]) -> Callable[[Any], None]:
            def observe(output: Any) -> None:
                calls.append(None)
                if len(calls) <= len(outlines):
                    outlines[len(calls) - 1].observe(output, batch.dims)

            return observe

        with ExitStack() as stack:
            for module, outlines in self.outlines.items():
                stack.enter_context(captured(module, observer(outlines, seen[module])))
            yield
        for module, calls in seen.items():
            self.num_calls[module].observe(batch.dims, (len(calls),))
        self.most = max(self.most, batch.size)

    def table(self, unit: nn.Module, value: Any, batch: Batch) -> Mapping[nn.Module, Replacement]:
        """What to replace so that the frontier unit returns `value`."""

        def stand_in(compute: Callable[..., Any], outlines: list[Outline]) -> Replacement:
            def forward(call: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                # Nobody knows what one call more would return, and computing is always right.
                return outlines[call].stand_in(batch.dims) if call < len(outlines) else compute(*args, **kwargs)

            return forward

        found: dict[nn.Module, Replacement] = {m: stand_in(m.forward, o) for m, o in self.outlines.items()}
        found[unit] = lambda call, args, kwargs: value
        return found


def first_use(model: nn.Module, prefix: Prefix, keys: Keys, batch: Batch, *, compact: bool) -> Route:
    """See the module docstring.

    Raises:
        ObjectionError, PaddingObjectionError: the frontier is to be left uncached.
        NotYetError: ask again with another batch.
    """
    if batch.size < 2:
        raise NotYetError
    with on_the_side(model):
        try:
            return _Check(model, prefix, keys, batch).route(compact)
        except (ObjectionError, NotYetError):
            raise
        except UnsupportedOutputError as error:
            raise ObjectionError(f"block {prefix.blocks[-1].name}: {error}") from error
        except TypeError as error:
            raise ObjectionError(f"the model: {error}") from error
        except (RuntimeError, ValueError, LookupError) as error:
            kind = PaddingObjectionError if batch.cut else ObjectionError
            raise kind(f"its forward cannot be repeated on the side: {str(error).splitlines()[0]}") from error


class _Check:
    def __init__(self, model: nn.Module, prefix: Prefix, keys: Keys, batch: Batch) -> None:
        assert prefix.unit is not None, "Prefix.objection() comes first"
        self._model, self._prefix, self._keys, self._batch = model, prefix, keys, batch
        self._unit = prefix.unit
        self._device = next(model.parameters()).device
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._outputs: dict[nn.Module, list[Any]] = {}
        self._watching = False

    def route(self, compact: bool) -> Route:
        plain = self._plain()
        if not plain.finite():
            raise NotYetError
        calls = len(self._outputs.get(self._unit, []))
        if calls != 1:
            raise ObjectionError(f"block {self._prefix.blocks[-1].name} is called {calls} times in a forward")
        value = self._outputs[self._unit][0]
        exact = Codec(value, self._batch, compact=False)
        if self._batch.cut and not exact.by_token:
            raise PaddingObjectionError("records of this block hold padding, which their keys would leave out")
        self._prefix_repeats(value)
        self._samples_are_independent(exact, value)
        skipped = self._both_ways(plain, exact, value)
        codec = Codec(value, self._batch, compact=compact)
        codec.remember_shared(value, self._batch)
        outlines = self._outlines(skipped)
        num_calls = {module: ShapeRule() for module in outlines}
        for module, rule in num_calls.items():
            rule.observe(self._batch.dims, (len(outlines[module]),))
        independent = self._independent_arguments(value)
        return Route(codec, outlines, self._batch.padded, num_calls, self._batch.size, independent)

    # ---- 1: the prefix for itself -----------------------------------------------------------------------------------

    def _plain(self) -> Outcome:
        """The forward as ever, all outputs of the prefix noted."""
        with replaced({part: self._noting(part) for part in self._prefix.parts}):
            return outcome(self._watched_run, self._parameters)

    def _watched_run(self) -> Any:
        self._watching = True
        try:
            return self._run()
        finally:
            self._watching = False  # a checkpoint calls modules again, in the backward

    def _noting(self, part: nn.Module) -> Replacement:
        compute = part.forward

        def forward(_: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            output = compute(*args, **kwargs)
            if self._watching:
                self._outputs.setdefault(part, []).append(map_tensors(lambda t: t.detach().clone(), output))
            return output

        return forward

    def _run(self, arguments: Any = None) -> Any:
        args, kwargs = self._batch.own(self._batch.arguments() if arguments is None else arguments, self._device)
        return self._model(*args, **kwargs)

    def _frontier_output(self, arguments: Any = None) -> Any:
        with torch.no_grad():
            return stopped_at(self._unit, lambda: self._run(arguments))

    def _prefix_repeats(self, value: Any) -> None:
        torch.manual_seed(1)
        before = random_states(self._device)
        again = self._frontier_output()
        drawn = any(not torch.equal(a, b) for a, b in zip(before, random_states(self._device), strict=True))
        if drawn or not _all_close(value, again):
            raise ObjectionError(f"blocks up to {self._prefix.blocks[-1].name} compute with random numbers")

    def _samples_are_independent(self, codec: Codec, value: Any) -> None:
        rows = list(range(self._batch.size))[:: -2 if self._batch.size > 3 else -1]
        self._compare_rows(codec, value, rows, None)
        lengths = self._batch.lengths
        if lengths is not None and codec.by_token and self._batch.padded:
            rows = [i for i in range(self._batch.size) if lengths[i] < self._batch.padded_length]
            rows = rows * 2 if len(rows) == 1 else rows  # a batch of one would have other tensors look like samples
            try:
                self._compare_rows(codec, value, rows, int(lengths[rows].max()))
            except ObjectionError as error:
                raise PaddingObjectionError(str(error)) from error

    def _compare_rows(self, codec: Codec, value: Any, rows: list[int], length: int | None) -> None:
        arguments = self._batch.select(rows, length)
        part = self._keys.batch(*arguments)
        output = self._frontier_output(arguments)
        whole, some = codec.samples(value, self._batch), codec.samples(output, part)
        alone = f"in block {self._prefix.blocks[-1].name} a sample depends on the rest of its batch"
        if whole is None or some is None or list(part.keys) != [self._batch.keys[r] for r in rows]:
            raise ObjectionError(alone)
        for row, theirs in zip(rows, some, strict=True):
            if not all(close(a, b) for a, b in zip(whole[row], theirs, strict=True)):
                raise ObjectionError(alone)
        shared = zip(codec.shared(value), codec.shared(output), strict=True)
        if length is None and not all(close(a, b) for a, b in shared):
            raise ObjectionError(f"block {self._prefix.blocks[-1].name} returns a tensor that belongs to no sample")

    # ---- 2: both ways -----------------------------------------------------------------------------------------------

    def _both_ways(self, plain: Outcome, codec: Codec, value: Any) -> list[nn.Module]:
        """The modules that may be skipped."""
        restored = self._restored(codec, value)
        skipped = [m for m in self._prefix.parts if m is not self._unit and m in self._outputs]
        if self._agrees(plain, skipped, skipped, restored):
            return skipped
        read = [m for m in skipped if not self._agrees(plain, [m], skipped, value)]
        units = [m for m in read if not self._prefix.is_stray(m)]
        if units:
            raise ObjectionError(
                f"the model reads inside block {self._prefix.parts[units[0]]} from behind the frontier"
            )
        kept = [m for m in skipped if m not in read]
        if not self._agrees(plain, kept, kept, value):
            names = ", ".join(self._prefix.name_of(m) for m in read) or "in front"
            raise ObjectionError(f"the model reads {names} of block {self._prefix.blocks[-1].name} from behind it")
        if not self._agrees(plain, kept, kept, restored):
            raise PaddingObjectionError("the model reads the padding of its texts")
        return kept

    def _restored(self, codec: Codec, value: Any) -> Any:
        """The frontier output as it comes out of exact records."""
        rows, lengths = codec.rows(value, self._batch), codec.lengths(self._batch)
        assert rows is not None and lengths is not None
        tensors, target = codec.empty_rows(self._batch)
        for row in range(self._batch.size):
            for here, there in zip(segments(rows, lengths[row], row), segments(target, lengths[row], row), strict=True):
                there[:] = here
        codec.remember_shared(value, self._batch)
        return codec.output(tensors, self._batch)

    def _agrees(self, plain: Outcome, poison: list[nn.Module], skipped: list[nn.Module], value: Any) -> bool:
        """Is the outcome the plain one with these modules skipped, and these of them returning NaN?"""

        def giving(outputs: list[Any], change: Callable[[torch.Tensor], torch.Tensor]) -> Replacement:
            return lambda call, args, kwargs: map_tensors(change, outputs[call])

        table = {m: giving(self._outputs[m], poisoned if m in poison else torch.Tensor.clone) for m in skipped}
        table[self._unit] = giving([value], torch.Tensor.clone)
        try:
            with replaced(table):
                return plain.same(outcome(self._run, self._parameters))
        except (RuntimeError, ValueError, IndexError):
            return False

    def _outlines(self, skipped: list[nn.Module]) -> dict[nn.Module, list[Outline]]:
        found: dict[nn.Module, list[Outline]] = {}
        for module in skipped:
            try:
                found[module] = [Outline(output, self._batch.dims) for output in self._outputs[module]]
            except UnsupportedOutputError as error:
                raise ObjectionError(f"block {self._prefix.parts[module]}: {error}") from error
        return found

    # ---- 3: what keys can leave out ---------------------------------------------------------------------------------

    def _independent_arguments(self, value: Any) -> set[str]:
        found = set()
        for name, leaf, row in zip(self._batch.names, self._batch.leaves, self._batch.rows, strict=True):
            if not row or not name.split(".")[-1].startswith(_LABELS) or torch.equal(leaf, leaf.roll(1, 0)):
                continue
            arguments = self._batch.arguments(lambda n, t, name=name: t.roll(1, 0) if n == name else t)
            if _all_close(value, self._frontier_output(arguments)):
                found.add(name)
        return found


def _all_close(a: Any, b: Any) -> bool:
    pairs = zip(tree_leaves(a), tree_leaves(b), strict=True)
    return all(close(x, y, 0.0 if x.device.type == "cpu" else None) for x, y in pairs if isinstance(x, torch.Tensor))
