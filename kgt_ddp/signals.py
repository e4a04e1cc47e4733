"""Where the numbers of a listening policy come from, on each rank: scores of the reference, gradient norms.

`Signals` owns this rank's connection to its reference process and what is accumulated between two decisions. It answers
with one value a block or None ("don't know") and never waits.

Except in repeatable runs. There a reference that is still starting is waited for, and from then on every decision waits for
the scores of the weights handed over at the decision before, so that a score is always one interval old. The first wait
that is in vain is the last one: it is said that the run cannot be repeated, and training goes on as any other.

Names:
    plasticity, plasticity_2, plasticity_4    S(L), S(2L), S(4L): newest score at 1, 2 and 4 times the lag
    floor                                     what the reference scores between a snapshot and itself
    grad_norm                                 L1 norm of a block's gradient, summed over the steps since the last decision
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from kgt_ddp.blocks import Block, Blocks
from kgt_ddp.partition import unwrapped_name
from kgt_ddp.reference.client import Cost, ReferenceClient
from kgt_ddp.reference.protocol import Score
from kgt_ddp.reference.samples import sub_batch
from kgtrun.contract import environment
from kgtrun.contract.events import EventWriter

logger = logging.getLogger(__name__)

PLASTICITY = ("plasticity", "plasticity_2", "plasticity_4")
FLOOR = "floor"
GRAD_NORM = "grad_norm"

PROBE_SAMPLES = 64
CONNECTING_PAUSE_S = 0.05

Values = list[float | None]


def score_lags(interval: int) -> tuple[int, int, int]:
    """Distances in steps for `PLASTICITY`. Snapshots are handed over every `interval` steps, so these are multiples.
    The longest is about a twentieth of a job of 150 decisions."""
    return _multiples(2 * interval)


def longer_lags(lags: tuple[int, int, int], interval: int) -> tuple[int, int, int]:
    """Those for a longer interval: the same distances while they are multiples of it, for what was seen so far is worth most
    beside scores of the same kind; else the next ones that are."""
    return _multiples(math.ceil(lags[0] / interval) * interval)


def _multiples(lag: int) -> tuple[int, int, int]:
    return (lag, 2 * lag, 4 * lag)


def _name(block: Block) -> str:
    """As the reference has it: it gets the model without `torch.compile`'s wrapper."""
    return unwrapped_name(block.name)


class Signals:
    """One rank's signals; see the module docstring.

    Args:
        names: the signals that the policy reads.
        blocks: the partition, in order of execution.
        model: what DDP wraps.
        interval: steps from one decision to the next.
        rank_on_node: chooses the reference of this node.
        longest_wait_s: repeatable runs: how long to wait for the reference, or for scores under way, before the run goes
            on without; the other ranks wait meanwhile, so it is less than what their collectives bear. 0: never wait.
    """

    def __init__(
        self,
        names: Sequence[str],
        blocks: Blocks,
        model: torch.nn.Module,
        *,
        interval: int,
        rank_on_node: int,
        longest_wait_s: float,
        events: EventWriter,
    ) -> None:
        self._names = tuple(names)
        self._blocks = blocks
        self._longest_wait_s = longest_wait_s
        self._waits = False
        self._devices: set[torch.device] = set()
        self._events = events
        self._lags = score_lags(interval)
        self._norms: dict[int, torch.Tensor] = {}
        self._latest: dict[int, Score] = {}
        self._client: ReferenceClient | None = None
        self.has_probe = False
        references = environment.integer(environment.NUM_REFERENCES) or 0
        if self.wants_reference and not references and rank_on_node == 0:
            logger.warning("no reference process on this node (--ref-per-node): no scores, no new freezes")
        # Ranks hold equal weights, so one of them per reference is enough; each has a probe of its own.
        if self.wants_reference and rank_on_node < references:
            self._client = ReferenceClient.from_environment(rank_on_node)
            if self._client is not None:
                watched = [_name(b) for b in blocks.blocks[: blocks.max_frontier] if b.unit is not None]
                offered = self._client.offer_model(model, watched, lags=self._lags)
                self._waits = longest_wait_s > 0 and offered
                self._devices = {p.device for p in model.parameters() if p.device.type != "cpu"}

    @property
    def wants_reference(self) -> bool:
        return any(name in (*PLASTICITY, FLOOR) for name in self._names)

    def set_interval(self, interval: int) -> None:
        """The interval has become longer, and maybe the distances. It is a multiple of the one before: then the reference has
        already what it needs."""
        self._lags = longer_lags(self._lags, interval)

    @property
    def lag_steps(self) -> int | None:
        """Distance of the signal "plasticity"."""
        return self._lags[0] if self.wants_reference else None

    @property
    def reference_cost(self) -> Cost | None:
        """What the reference takes for one decision's weights; None where it is not known, or there is none."""
        return self._client.cost if self._client is not None else None

    def retain_probe(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """The inputs of a training forward: its first samples become the probe of all scores to come."""
        self.has_probe = True
        if self._client is None:
            return
        try:
            self._client.retain_probe(sub_batch(args, kwargs, PROBE_SAMPLES))
        except Exception as error:  # a sparse tensor, a packed sequence, a type of the user's own: DDP takes them all
            logger.warning("no scores, no new freezes: inputs cannot be kept (%s: %s)", type(error).__name__, error)

    def before_optimizer_step(self) -> None:
        """Gradients are final: add up their norms."""
        if GRAD_NORM not in self._names:
            return
        for index, block in enumerate(self._blocks.blocks):
            gradients = [p.grad for _, p in block.parameters if p.grad is not None and index >= self._blocks.frontier]
            if gradients:
                dense = [g.coalesce().values() if g.is_sparse else g for g in gradients]
                norm = torch.stack(torch._foreach_norm(dense, 1)).sum()
                self._norms[index] = self._norms[index] + norm if index in self._norms else norm

    def step_ended(self) -> None:
        """An optimizer step is finished: weights that have left the device since are announced to the reference."""
        if self._client is not None:
            self._client.announce()

    def collect(self, step: int, generation: int) -> dict[str, Values]:
        """This rank's values for the decision at `step`; hands the present weights to the reference."""
        values: dict[str, Values] = {}
        if GRAD_NORM in self._names:
            values[GRAD_NORM] = [self._norms[i].item() if i in self._norms else None for i in range(len(self._blocks))]
            self._norms = {}
        if self._client is not None:
            self._receive()
            for name, lag in zip(PLASTICITY, self._lags, strict=True):
                values[name] = self._per_block(self._latest.get(lag), "values")
            values[FLOOR] = self._per_block(self._latest.get(self._lags[0]), "floors")
            self._latest = {}
            frozen = [_name(b) for b in self._blocks.blocks[: self._blocks.frontier]]
            self._client.submit(step, generation, unchanged=frozen, lags=self._lags)
        return values

    def _receive(self) -> None:
        assert self._client is not None
        self._waits = self._waits and self._client.offered
        scores = self._await_all(self._client) if self._waits else self._client.poll()
        for score in scores:
            self._latest[score.lag_steps] = score
            self._events.write(
                "score",
                step=score.step,
                generation=score.generation,
                lag_steps=score.lag_steps,
                values=list(score.values.values()),
                floors=list(score.floors.values()),
                cost_s=score.cost_s,
                cpu_s=score.cpu_s,
            )

    def _await_all(self, client: ReferenceClient) -> list[Score]:
        """All scores of what was handed over; before anything was, wait for the reference itself."""
        for device in self._devices:  # or the last weights may still be leaving it, which nobody could wait for
            torch.accelerator.synchronize(device)
        deadline = time.monotonic() + self._longest_wait_s
        scores = client.poll()
        while client.in_flight or not client.connected:
            if client.stats.submitted and not client.connected:
                break
            left = deadline - time.monotonic()
            if left <= 0:
                self._not_repeatable(f"the reference has not answered for {self._longest_wait_s:.0f} s")
                return scores
            if client.connected:
                scores += client.poll(left)
            else:
                time.sleep(CONNECTING_PAUSE_S)
                scores += client.poll()  # once connected, nothing is under way that a longer wait could bring
        if not client.connected or client.stats.connections > 1:
            self._not_repeatable("the connection to the reference broke")
        return scores

    def _not_repeatable(self, why: str) -> None:
        self._waits = False
        logger.warning("%s: training goes on, but cannot be repeated exactly", why)
        self._events.write("not_repeatable", why=why)

    def _per_block(self, score: Score | None, field: str) -> Values:
        per_name = getattr(score, field) if score is not None else {}
        return [per_name.get(_name(block)) for block in self._blocks.blocks]

    def state_dict(self) -> dict[str, Any]:
        """What was added up since the last decision, the same on all ranks; plain data. The reference's memory is in none."""
        return {"norms": {index: norm.item() for index, norm in self._norms.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self._norms = {int(index): torch.tensor(norm) for index, norm in state["norms"].items()}

    def stats(self) -> dict[str, Any]:
        """What the connection did, as plain data; empty without one."""
        return vars(self._client.stats).copy() if self._client is not None else {}

    def close(self) -> None:
        """Give the connection and its shared memory back."""
        if self._client is not None:
            self._client.close()
