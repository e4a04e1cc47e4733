"""The communication hook: reduces the gradients of live blocks only, and counts.

Owns: the all-reduce of gradients (one of the two files that issue collectives). Serves `FreezeAwareDDP`, whose buckets
hold live gradients only once it has re-bucketed, and a plain `DistributedDataParallel`:

    state = FreezeHookState(ddp.process_group, blocks=[[p, ...], [p, ...], ...])
    ddp.register_comm_hook(state, freeze_hook)
    state.freeze(2)             # gradients of the first two blocks are neither reduced nor kept

In a bucket that holds both kinds only the live spans travel; the frozen spans become zero. On a plain DDP this saves
traffic but no backward, and the optimizer must be kept from the frozen parameters (`kgt_ddp.optimizer_guard`).

Arithmetic is the reducer's own, in its order: multiply by 1/world, then sum. (`div_` would round differently from 3 ranks
on.) The hook's Future is complete from the start, and the Works are waited for by a callback that the autograd engine runs
at the end of the backward, ahead of the reducer's own: so reduction overlaps with the backward. A reentrant checkpoint runs
a backward inside the backward, at whose end the reducer may do its own: so there all is waited for that is under way.

No gloo thread may need the interpreter's lock: when the interpreter has ended meanwhile, the process aborts ("terminate
called without an active exception"). So there is no `Future.then`, whose callback runs on such a thread, and each Work is
kept until the next backward: were it dropped as soon as it is waited for, the gloo thread that still holds it would be the
last to do so, and would free a tensor that Python knows.
"""

# No `from __future__ import annotations` here: DDP inspects the hook's annotations and wants the types themselves.
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from kgt_ddp import torch_private

Hook = Callable[[Any, Any], "torch.futures.Future[torch.Tensor]"]


_KEPT_OUTSIDE = 64
"""Works kept where no later backward drops them (consecutive shadows of a join)."""


@dataclass(frozen=True)
class Span:
    """Elements [start, stop) of a bucket's flat buffer, all of them live or all of them frozen."""

    start: int
    stop: int
    live: bool


@dataclass(frozen=True)
class Layout:
    """How one bucket divides: merged spans in order, and the bytes of each block in it."""

    spans: tuple[Span, ...]
    live_bytes: tuple[tuple[int, int], ...]
    frozen_bytes: tuple[tuple[int, int], ...]

    @property
    def all_live(self) -> bool:
        return not self.frozen_bytes


class FreezeHookState:
    """What the hook remembers between buckets.

    Args:
        process_group: the group that the wrapper reduces over.
        blocks: parameters of each block, front to back.
    """

    __slots__ = (
        "process_group",
        "scale",
        "inner",
        "num_calls",
        "num_synced_backwards",
        "reduced_bytes",
        "dropped_bytes",
        "on_last_bucket",
        "_blocks",
        "_block_of",
        "_frozen",
        "_absent_bytes",
        "_layouts",
        "_inner_buckets",
        "_under_way",
        "_waited_for",
        "_backward",
        "_complete",
    )

    def __init__(self, process_group: dist.ProcessGroup, blocks: Sequence[Sequence[torch.nn.Parameter]]) -> None:
        self.process_group = process_group
        self.scale = 1.0 / process_group.size()
        self.inner: tuple[Hook, Any] | None = None
        """A user's hook and its state: called on what is live instead of the plain all-reduce."""
        self.num_calls = 0
        self.num_synced_backwards = 0
        self.on_last_bucket: Callable[[], None] | None = None
        self._layouts: dict[tuple[int, ...], Layout] = {}
        self._inner_buckets: dict[int, tuple[int, ...]] = {}
        self._under_way: list[tuple[dist.Work, torch.Stream | None]] = []
        """With the stream in which the reducer will look at the bucket."""
        self._waited_for: list[dist.Work] = []
        """Of the backward under way and the one before it; see the module docstring."""
        self._backward = -1
        self._complete = False
        """The last bucket of a backward has come."""
        self.set_blocks(blocks)

    def set_blocks(self, blocks: Sequence[Sequence[torch.nn.Parameter]]) -> None:
        """Divide the parameters anew; counters start again and nothing is frozen."""
        self._blocks = [list(block) for block in blocks]
        self._block_of = {id(p): index for index, block in enumerate(self._blocks) for p in block}
        self.reduced_bytes = [0] * len(self._blocks)
        """Gradient bytes handed to the reduction, a block. Before any compression by an inner hook."""
        self.dropped_bytes = [0] * len(self._blocks)
        """Gradient bytes that plain DDP would have reduced and we did not, a block."""
        self.set_frozen([])

    def freeze(self, frontier: int) -> None:
        """Drop the gradients of the first `frontier` blocks (for a plain DDP, whose buckets still hold them).

        Raises:
            ValueError: `frontier` is negative or would leave no block.
        """
        if not 0 <= frontier < len(self._blocks):
            raise ValueError(f"frontier {frontier} is out of range 0 to {len(self._blocks) - 1}")
        self.set_frozen([p for block in self._blocks[:frontier] for p in block])

    def set_frozen(self, parameters: Sequence[torch.nn.Parameter], *, in_buckets: bool = True) -> None:
        """Exactly these parameters are frozen. `in_buckets=False`: the reducer knows them no more; they count as
        dropped once a synchronised backward."""
        self._frozen = {id(p) for p in parameters}
        self._layouts.clear()
        self._absent_bytes = [0] * len(self._blocks)
        if not in_buckets:
            for p in parameters:
                self._absent_bytes[self._block_of[id(p)]] += p.numel() * p.element_size()

    def wait_later(self, work: dist.Work, device: torch.device) -> None:
        """Have `work`, on a bucket that lies on `device`, waited for before the reducer looks at the bucket."""
        if self._complete:
            self._complete = False
            self._waited_for = []
        stream = None if device.type == "cpu" else torch.accelerator.current_stream(device)
        self._under_way.append((work, stream))
        if not torch_private.inside_autograd_node():
            self._wait_all()  # join's shadow of a backward, or the delayed reduction of static_graph: nothing runs later
            del self._waited_for[:-_KEPT_OUTSIDE]
            return
        backward = torch_private.backward_id()
        if backward != self._backward:  # of nested ones each has an end of its own; and one that raised had none
            self._backward = backward
            torch_private.at_end_of_backward(self._wait_all)

    def _wait_all(self) -> None:
        for work, stream in self._under_way:
            work.wait()
            if stream is not None and stream != torch.accelerator.current_stream(stream.device):
                with stream:  # backward was called in another one
                    work.wait()
        self._waited_for += [work for work, _ in self._under_way]
        self._under_way = []

    def renew_inner(self, index: int, parameters: Sequence[torch.Tensor]) -> None:
        """Give an inner hook fresh state for a bucket whose content changed.

        PowerSGD keeps error feedback and factors by bucket index; after a re-bucketing the same index is another bucket.
        """
        content = tuple(map(id, parameters))
        if self._inner_buckets.get(index) != content:
            self._inner_buckets[index] = content
            inner_state = self.inner[1] if self.inner else None
            for name in ("error_dict", "p_memory_dict", "q_memory_dict"):
                getattr(inner_state, name, {}).pop(index, None)

    def layout(self, bucket: dist.GradBucket) -> Layout:
        """Divide a bucket into live and frozen spans; remembered until the frontier moves."""
        parameters = bucket.parameters()
        key = tuple(map(id, parameters))
        known = self._layouts.get(key)
        if known is None:
            known = self._layouts[key] = self._divide(parameters, bucket.buffer())
        return known

    def _divide(self, parameters: Sequence[torch.Tensor], buffer: torch.Tensor) -> Layout:
        spans: list[Span] = []
        live: dict[int, int] = {}
        frozen: dict[int, int] = {}
        offset = 0
        for parameter in parameters:
            # A parameter of no block (added by the user after wrapping) is always live.
            block = self._block_of.get(id(parameter), len(self._blocks) - 1)
            is_live = id(parameter) not in self._frozen
            count = live if is_live else frozen
            count[block] = count.get(block, 0) + parameter.numel() * buffer.element_size()
            stop = offset + parameter.numel()
            if spans and spans[-1].live == is_live:
                spans[-1] = Span(spans[-1].start, stop, is_live)
            else:
                spans.append(Span(offset, stop, is_live))
            offset = stop
        if offset != buffer.numel() and frozen:
            raise ValueError(f"a bucket of {buffer.numel()} elements holds parameters of {offset}: cannot divide it")
        return Layout(tuple(spans), tuple(live.items()), tuple(frozen.items()))

    def _count(self, layout: Layout, *, last: bool) -> None:
        self.num_calls += 1
        for block, num_bytes in layout.live_bytes:
            self.reduced_bytes[block] += num_bytes
        for block, num_bytes in layout.frozen_bytes:
            self.dropped_bytes[block] += num_bytes
        if last:
            self.num_synced_backwards += 1
            for block, num_bytes in enumerate(self._absent_bytes):
                self.dropped_bytes[block] += num_bytes


def freeze_hook(state: FreezeHookState, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Reduce what is live in `bucket`; see the module docstring. Signature as DDP's `register_comm_hook` asks."""
    layout = state.layout(bucket)
    state._count(layout, last=bucket.is_last())
    if layout.all_live:
        future = _reduce_all(state, bucket)
    else:
        future = _reduce_live_spans(state, bucket, layout)
    if bucket.is_last():
        state._complete = True
        if state.on_last_bucket is not None:
            state.on_last_bucket()
    return future


def _reduce_all(state: FreezeHookState, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    if state.inner is not None:
        hook, inner_state = state.inner
        state.renew_inner(bucket.index(), bucket.parameters())
        return hook(inner_state, bucket)
    buffer = bucket.buffer()
    work = dist.all_reduce(buffer.mul_(state.scale), group=state.process_group, async_op=True)
    state.wait_later(work, buffer.device)
    return _completed(buffer)


def _reduce_live_spans(
    state: FreezeHookState, bucket: dist.GradBucket, layout: Layout
) -> torch.futures.Future[torch.Tensor]:
    """An inner hook is waited for here: a straddling bucket is rare, and simple beats overlapped."""
    buffer = bucket.buffer()
    pending: list[tuple[torch.Tensor, torch.futures.Future[torch.Tensor]]] = []
    live = [span for span in layout.spans if span.live]
    for span in layout.spans:
        if not span.live:
            buffer[span.start : span.stop].zero_()
    for number, span in enumerate(live):
        part = buffer[span.start : span.stop]
        if state.inner is not None:
            hook, inner_state = state.inner
            view = _LiveBucket(bucket, span, number, last=bucket.is_last() and span is live[-1])
            state.renew_inner(view.index(), view.parameters())
            pending.append((part, hook(inner_state, view)))
        else:
            work = dist.all_reduce(part.mul_(state.scale), group=state.process_group, async_op=True)
            state.wait_later(work, buffer.device)
    for part, future in pending:
        result = future.wait()
        part.copy_(result[0] if isinstance(result, (list, tuple)) else result)
    return _completed(buffer)


def _completed(buffer: torch.Tensor) -> torch.futures.Future[torch.Tensor]:
    # No devices: a future that knows of some pickles what it holds to find the memory in it, and its events would tell
    # of this moment, not of the reduction, which `wait_later` has waited for.
    future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    future.set_result(buffer)
    return future


class _LiveBucket:
    """One live span of a bucket, with the methods of torch's `GradBucket` that its hooks call."""

    def __init__(self, bucket: dist.GradBucket, span: Span, number: int, *, last: bool) -> None:
        self._buffer = bucket.buffer()[span.start : span.stop]
        self._last = last
        # Stateful hooks keep error feedback by index: a span must not share it with a whole bucket.
        self._index = -(1 + bucket.index() * 1024 + number)
        self._parameters: list[torch.Tensor] = []
        offset = 0
        for parameter in bucket.parameters():
            if span.start <= offset < span.stop:
                self._parameters.append(parameter)
            offset += parameter.numel()

    def index(self) -> int:
        return self._index

    def is_last(self) -> bool:
        return self._last

    def buffer(self) -> torch.Tensor:
        return self._buffer

    def set_buffer(self, tensor: torch.Tensor) -> None:
        self._buffer = tensor

    def parameters(self) -> list[torch.Tensor]:
        return self._parameters

    def gradients(self) -> list[torch.Tensor]:
        parts = self._buffer.split([p.numel() for p in self._parameters])
        return [part.view(p.shape) for part, p in zip(parts, self._parameters, strict=True)]
