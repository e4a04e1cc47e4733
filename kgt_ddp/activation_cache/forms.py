"""In which forms of the model's call (`key`) may this cut be cached? What is proved of a model is proved of one of them.

A flag may lead the model another way, past what was looked at: it may communicate, read inside the prefix from behind, return
something else, or let labels reach the prefix. So one forward of each form is watched for collectives, and the next one is
checked (`first_use`).

The form that is proved first decides what keys leave out and what records hold; an objection to it is one to the cut, and is
raised. Another form that does not pass computes as ever, with one line that says why. So do forms that are ever new.
"""

from __future__ import annotations

import logging

import torch
from torch import nn

from kgt_ddp.activation_cache.first_use import (
    NotYetError,
    ObjectionError,
    PaddingObjectionError,
    Route,
    first_use,
)
from kgt_ddp.activation_cache.key import Batch, Keys
from kgt_ddp.activation_cache.prefix import Prefix

logger = logging.getLogger(__name__)

MOST_LOOKS = 16
"""Forwards that are watched or checked for forms beside the first: a number that is another one at each step is not to cost
several forwards each time."""


class Forms:
    """See the module docstring.

    Args:
        keys: what they leave out is set by the first form.
        compact: keep 32-bit floats as bfloat16.
    """

    def __init__(self, model: nn.Module, prefix: Prefix, keys: Keys, *, compact: bool) -> None:
        self._model, self._prefix, self._keys, self._compact = model, prefix, keys, compact
        self._routes: dict[bytes, Route | None] = {}
        """The first form in front of others that passed; None: it was looked at and did not pass."""
        self._watched: set[bytes] = set()
        self._num_looks = 0

    def route(self, batch: Batch) -> Route | None:
        """How to go round the prefix in a call like this one; None where it was not proved, or not with padding."""
        route = self._routes.get(batch.form)
        if route is None or (batch.padded and not route.padding_seen and route.codec.by_token):
            return None
        return route

    def is_first(self, batch: Batch) -> bool:
        """Whether what is found of this batch holds for the cut."""
        return self._first in (None, batch.form) and self._routes.get(batch.form, True) is not None

    def hopeless(self, form: bytes) -> bool:
        """Whether calls of this form go uncached for good."""
        if form in self._routes:
            return self._routes[form] is None
        return self._first is not None and self._num_looks > MOST_LOOKS

    def to_be_watched(self, batch: Batch) -> bool:
        """Whether the forward of this batch is to be watched for collectives. Call `watched`, or `leave_out`, after it."""
        return batch.form not in self._watched and batch.form not in self._routes and self._may_look()

    def watched(self, batch: Batch) -> None:
        """A forward of this form does not communicate."""
        self._watched.add(batch.form)

    def prove(self, batch: Batch) -> Route | None:
        """Check a batch for which there is no route; the route, if it is of the first form.

        Raises:
            ObjectionError, NotYetError: as `first_use`, and only for the first form.
            PaddingObjectionError: for any form. Keys then have to hold the padding, and all is proved anew.
        """
        if self.is_first(batch):
            self.forget()
            if batch.form not in self._watched:
                raise NotYetError
            route = first_use(self._model, self._prefix, self._keys, batch, compact=self._compact)
            self._routes[batch.form] = route
            self._keys.excluded = set(route.excluded)  # what another form did not depend on, this one may
            return route
        if batch.form in self._watched and self._routes.get(batch.form, True) is not None and self._may_look():
            try:
                route = first_use(self._model, self._prefix, self._keys, batch, compact=self._compact)
                self._compare(batch, route)
                self._routes[batch.form] = route
            except PaddingObjectionError:
                raise
            except ObjectionError as error:
                self.leave_out(batch, str(error))
            except NotYetError:
                pass
        return None

    def leave_out(self, batch: Batch, reason: str) -> None:
        """Calls of this form are to compute as ever; not for the first one."""
        self._routes[batch.form] = None
        logger.warning("activation cache: another form of the model's call goes uncached: %s", reason)

    def forget(self) -> None:
        """Weights have changed, or what keys hold. What did not pass stays out."""
        self._routes = {form: None for form, route in self._routes.items() if route is None}

    @property
    def _first(self) -> bytes | None:
        return next((form for form, route in self._routes.items() if route is not None), None)

    def _compare(self, batch: Batch, route: Route) -> None:
        first = next(found for found in self._routes.values() if found is not None)
        by_sample = {n: leaf for n, leaf, row in zip(batch.names, batch.leaves, batch.rows, strict=True) if row}
        in_no_key = by_sample.keys() & self._keys.excluded - route.excluded
        if any(torch.equal(by_sample[name], by_sample[name].roll(1, 0)) for name in in_no_key):
            raise NotYetError  # all labels alike: nothing was tried
        if in_no_key:
            raise ObjectionError(f"the frozen blocks may depend on {', '.join(sorted(in_no_key))}")
        if route.codec.layout != first.codec.layout:
            raise ObjectionError(f"block {self._prefix.blocks[-1].name} returns something else")

    def _may_look(self) -> bool:
        if self._num_looks == MOST_LOOKS and self._first is not None:
            logger.warning("activation cache: the model is called in ever new forms: no more of them are cached")
        self._num_looks += 1
        return self._num_looks <= MOST_LOOKS
