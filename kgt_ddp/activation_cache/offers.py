"""Letting a loader's workers leave out what has a record, which saves them decoding it.

That is offered to a data set once its samples are known to be the same every time (`sample_ids`) and the model is known
not to read them from behind the frontier, which is tried here, once a data set.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from kgt_ddp.activation_cache.arrival import Arrival
from kgt_ddp.activation_cache.counters import Counters
from kgt_ddp.activation_cache.key import Batch
from kgt_ddp.activation_cache.outputs import map_tensors, poisoned
from kgt_ddp.activation_cache.sample_ids import SampleIds
from kgt_ddp.activation_cache.short_circuit import Replacement, replaced
from kgt_ddp.activation_cache.side_run import Outcome, on_the_side, outcome

logger = logging.getLogger(__name__)

Instead = Callable[[Any, Batch], Mapping[nn.Module, Replacement]]
"""What to replace in the model so that the frontier unit returns a value for a batch."""


class Offers:
    """What one frontier's records spare the data sets whose batches come by.

    Args:
        digest: names the table of the records; workers look there.
    """

    def __init__(self, model: nn.Module, digest: str, counters: Counters) -> None:
        self._model = model
        self._digest, self._counters = digest, counters
        self._ignored: dict[tuple[SampleIds, bytes], bool] = {}
        """By data set and form of the call."""

    def make(self, arrival: Arrival, batch: Batch, value: Any, instead: Instead) -> None:
        """Offer to the data set of a batch, whose output of the frontier unit is `value`, if it may be offered."""
        ids = arrival.ids
        if ids.dropped or not ids.proven or arrival.waiting or not arrival.entered:
            return
        asked = (ids, batch.form)
        if asked not in self._ignored:
            self._ignored[asked] = self._ignores(arrival.leaves, batch, value, instead)
            if not self._ignored[asked]:
                logger.warning(
                    "activation cache: all samples are decoded: the model reads them from behind the frontier"
                )
        if self._ignored[asked]:
            ids.publish(self._digest)

    def may_cover(self, arrival: Arrival, batch: Batch) -> bool:
        """Whether samples of this data set need not be decoded, from the time on when its ids are proven."""
        return arrival.may_be_left_out and self._ignored.get((arrival.ids, batch.form), True)

    def withdraw(self) -> None:
        for ids, _ in self._ignored:
            ids.withdraw()

    def _ignores(self, leaves: Sequence[torch.Tensor], batch: Batch, value: Any, instead: Instead) -> bool:
        """Whether the model's outcome is the same with NaN in the input, if the frontier unit returns `value`."""
        device = next(self._model.parameters()).device
        parameters = [p for p in self._model.parameters() if p.requires_grad]

        def run(change: Callable[[torch.Tensor], torch.Tensor]) -> Outcome:
            arguments = batch.arguments(lambda _, t: change(t) if any(t is leaf for leaf in leaves) else t)
            args, kwargs = batch.own(arguments, device)
            with replaced(instead(map_tensors(torch.Tensor.clone, value), batch)):
                return outcome(lambda: self._model(*args, **kwargs), parameters)

        started = time.perf_counter()
        try:
            with on_the_side(self._model):
                return run(lambda t: t).same(run(poisoned))
        except (RuntimeError, TypeError, ValueError, LookupError):
            return False
        finally:
            self._counters.check_s += time.perf_counter() - started
