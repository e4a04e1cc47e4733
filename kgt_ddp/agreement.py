"""How ranks agree on a mask: signals up, decision down, proof before use.

Owns every collective of this package that is not a gradient (the second of two files), on a gloo control group of its own
that spans exactly the ranks of the wrapped DDP. All ranks call `advance` at the same boundaries (`step_clock`), so they
issue the same collectives in the same order:

    boundary s      (every `interval` steps) signals: one asynchronous sum of values and counts, a pair a block
    next boundary   wait for the sums; rank 0's policy decides; one asynchronous broadcast of the mask and the interval
    the one after   wait for the mask; a blocking exchange of (present mask, coming mask) that raises
                    `MaskMismatchError` on every rank when they are not all equal; then it is applied

The exchange takes place whether or not the mask changes: a rank that holds the wrong mask may be one that sees no change. It
also tells whether a graph waits for its backward on any rank (`step_clock`). Then the mask waits, and the exchange is repeated
at the next boundary; after `LONGEST_HOLD` of them the mask is given up.

A rank with nothing to say contributes counts of zero: a dead reference means fewer scores, never a hang. Waits end at the
control group's timeout (that of the user's own group) with an `AgreementError` that says what was waited for.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from kgt_ddp import gloo_exit, torch_private
from kgt_ddp.errors import AgreementError, MaskMismatchError
from kgt_ddp.mask import Mask

logger = logging.getLogger(__name__)

LAG = 2
"""Boundaries from the collection of signals to the application of the mask."""

LONGEST_HOLD = 8
"""Boundaries that a mask waits for graphs."""

Signals = Mapping[str, Sequence[float | None]]
Decide = Callable[[Mask, dict[str, tuple[float | None, ...]]], Mask]


def control_group(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """A gloo group over the same ranks as `group`; only these ranks take part in making it.

    Raises:
        AgreementError: it cannot be made.
    """
    try:
        return dist.new_group(
            ranks=dist.get_process_group_ranks(group),
            backend="gloo",
            timeout=torch_private.group_timeout(group),
            use_local_synchronization=True,
            group_desc="kgtrun_control",
        )
    except (RuntimeError, ValueError) as error:
        raise AgreementError(f"no gloo control group over the ranks of this DDP: {error}") from error


class Agreement:
    """One rank's part in the protocol; see the module docstring.

    Args:
        group: the control group.
        signals: names of the per-block signals the policy reads, the same on all ranks.
        interval: boundaries from one collection to the next, at least `LAG + 1`.
        decide: rank 0's decision, from the present mask and mean signals to the coming mask. Called on rank 0 only.
        pace: rank 0's choice of the interval from now on, called with the present one after each decision.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        *,
        num_blocks: int,
        signals: Sequence[str],
        interval: int,
        decide: Decide,
        pace: Callable[[int], int] = lambda interval: interval,
    ) -> None:
        if interval <= LAG:
            raise ValueError(f"interval {interval} is too short: at least {LAG + 1} steps")
        self._group = group
        self._rank = dist.get_rank(group)
        self._num_blocks = num_blocks
        self._signals = tuple(signals)
        self._interval = interval
        self._decide = decide
        self._pace = pace
        self._next_step = 0
        self._kept: list[Any] = []
        """Finished Works, kept for the reason given in `comm_hook`."""
        self._sums: tuple[torch.Tensor, dist.Work | None] | None = None
        self._mask: tuple[torch.Tensor, dist.Work | None] | None = None
        self._num_held = 0
        """Boundaries at which this mask has waited."""
        self._told = False
        gloo_exit.expect(self)

    @property
    def interval(self) -> int:
        """Steps from one collection to the next, the same on all ranks at any step."""
        return self._interval

    def wants_signals(self, step: int) -> bool:
        """Whether `advance(step)` will collect signals."""
        idle = self._sums is None and self._mask is None
        return bool(self._signals) and idle and step >= self._next_step

    def under_way(self) -> list[dist.Work]:
        """Collectives that nobody has waited for."""
        return [pending[1] for pending in (self._sums, self._mask) if pending is not None and pending[1] is not None]

    def state_dict(self) -> dict[str, Any]:
        """Where the protocol stands. What is under way is waited for: every rank has issued it already."""
        for work in self.under_way():
            self._bounded("an exchange under way", work.wait)
        return {
            "next_step": self._next_step,
            "interval": self._interval,
            "sums": self._sums[0].tolist() if self._sums else None,
            "mask": self._mask[0].tolist() if self._mask else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`; the same on all ranks."""
        self._next_step, self._interval = state["next_step"], state["interval"]
        sums, mask = state["sums"], state["mask"]
        self._sums = None if sums is None else (torch.tensor(sums, dtype=torch.float64), None)
        self._mask = None if mask is None else (torch.tensor(mask, dtype=torch.int64), None)

    def prove_equal(self, facts: Mapping[str, Any], *, tolerated: Collection[str] = ()) -> list[str]:
        """Compare facts that must be equal on all ranks (the interval, …).

        Returns:
            Names of those that differ, among the `tolerated` ones: the same on all ranks.

        Raises:
            AgreementError: on every rank, with the table of who has what.
        """
        everyone: list[Any] = [None] * dist.get_world_size(self._group)
        self._bounded(
            "the facts of all ranks", lambda: dist.all_gather_object(everyone, dict(facts), group=self._group)
        )
        keys = [k for k in facts if len({str(other.get(k)) for other in everyone}) > 1]
        if not set(keys) <= set(tolerated):
            table = "\n".join(
                f"  rank {r}: " + ", ".join(f"{k}={o.get(k)}" for k in keys) for r, o in enumerate(everyone)
            )
            raise AgreementError(f"the ranks were built differently; they must agree on {', '.join(keys)}:\n{table}")
        return keys

    def advance(
        self, step: int, current: Mask, signals: Signals | None = None, *, graph_waits: bool = False
    ) -> Mask | None:
        """Take part in this boundary's collectives; returns a mask to apply now, proven equal on all ranks.

        Args:
            graph_waits: whether one does on this rank: then no rank gets a mask to apply.

        Raises:
            MaskMismatchError, AgreementError: see the module docstring.
        """
        if self._mask is not None:
            return self._finish(step, current, graph_waits)
        if self._sums is not None:
            self._answer(current)
        elif step >= self._next_step:
            self._next_step = self._step_after(step)
            self._collect(signals or {})
        return None

    def _step_after(self, step: int) -> int:
        """The next multiple of the interval."""
        return (step // self._interval + 1) * self._interval

    def _collect(self, signals: Signals) -> None:
        sums = torch.zeros(len(self._signals), self._num_blocks, 2, dtype=torch.float64)
        for row, name in enumerate(self._signals):
            for block, value in enumerate(signals.get(name, ())):
                if value is not None:
                    sums[row, block, 0] = value
                    sums[row, block, 1] = 1.0
        work = dist.all_reduce(sums, group=self._group, async_op=True) if self._signals else None
        self._sums = (sums, work)

    def _answer(self, current: Mask) -> None:
        assert self._sums is not None
        sums, work = self._sums
        if work is not None:
            self._bounded("the signals of all ranks", work.wait)
            self._kept = [work]
        self._sums = None
        message = torch.zeros(self._num_blocks + 3, dtype=torch.int64)
        if self._rank == 0:
            mask = self._decide(current, self._means(sums))
            numbers = [self._pace(self._interval), mask.generation, int(mask.at_mean), *mask.encode()]
            message = torch.tensor(numbers, dtype=torch.int64)
        self._mask = (message, dist.broadcast(message, group_src=0, group=self._group, async_op=True))

    def _means(self, sums: torch.Tensor) -> dict[str, tuple[float | None, ...]]:
        return {
            name: tuple(total / count if count else None for total, count in sums[row].tolist())
            for row, name in enumerate(self._signals)
        }

    def _finish(self, step: int, current: Mask, graph_waits: bool) -> Mask | None:
        assert self._mask is not None
        message, work = self._mask
        if work is not None:
            self._bounded("the mask to travel from rank 0", work.wait)
        self._mask = None
        self._kept = [work]
        interval, generation, at_mean, *flags = message.tolist()
        if interval != self._interval:
            self._interval = interval
            self._next_step = self._step_after(step)
        mask = Mask.decode(flags, generation, at_mean=bool(at_mean))
        held = self._prove_equal_masks(current, mask, graph_waits)
        if mask == current:
            return None
        if held:
            self._hold(message)
            return None
        self._num_held = 0
        return mask

    def _hold(self, message: torch.Tensor) -> None:
        """Keep the mask for the next boundary, if it has not waited for too long."""
        self._num_held += 1
        if self._num_held < LONGEST_HOLD:
            self._mask = (message, None)
            return
        self._num_held = 0
        if not self._told and self._rank == 0:
            logger.warning(
                "no mask can be applied: at each step the graph of an earlier forward still waits for its backward on some "
                "rank; forwards that are not trained on belong under torch.no_grad()"
            )
        self._told = True

    def _prove_equal_masks(self, current: Mask, coming: Mask, graph_waits: bool) -> bool:
        """Raise `MaskMismatchError` on every rank unless all hold `current` and are about to apply `coming`. Returns whether a
        graph waits on any of them."""
        mine = torch.tensor(
            [
                int(graph_waits),
                current.generation,
                current.frontier,
                coming.generation,
                int(coming.at_mean),
                *coming.encode(),
            ]
        )
        everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(self._group))]
        work = dist.all_gather(everyone, mine, group=self._group, async_op=True)
        self._bounded("the masks of all ranks", work.wait)
        self._kept.append(work)
        any_waits = any(bool(other[0]) for other in everyone)
        rows = [other[1:].tolist() for other in everyone]
        odd = [rank for rank, row in enumerate(rows) if row != rows[0]]
        if odd:
            table = "\n".join(
                f"  rank {rank}: holds generation {row[0]} with {row[1]} blocks frozen, "
                f"is to apply generation {row[2]} with blocks {[i for i, f in enumerate(row[4:]) if f]} frozen"
                f"{' at their mean' if row[3] else ''}"
                for rank, row in enumerate(rows)
            )
            ranks = ", ".join(map(str, odd))
            raise MaskMismatchError(f"the freeze mask of rank {ranks} differs from rank 0's:\n{table}")
        return any_waits

    def _bounded(self, what: str, wait: Callable[[], Any]) -> None:
        try:
            wait()
        except RuntimeError as error:
            raise AgreementError(f"rank {self._rank} waited for {what} in vain: {error}") from error


def equalise(group: dist.ProcessGroup, buffers: Sequence[torch.Tensor], buffer_bytes: int) -> None:
    """Copy rank 0's buffers to all ranks, once, as they stop being broadcast in every forward.

    Without it BatchNorm statistics would differ between ranks for ever: DDP's last broadcast came before the last update.
    """
    if buffers:
        with torch.no_grad():
            torch_private.broadcast(group, buffers, buffer_bytes)
