"""Waiting for a reference, in repeatable runs and in others; distances."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from kgt_ddp.blocks import Blocks
from kgt_ddp.partition import unwrap
from kgt_ddp.reference.client import ReferenceClient
from kgt_ddp.signals import Signals, longer_lags, score_lags
from kgtrun.contract.events import EventWriter, read_events
from tests.kgt_ddp.networks import SmallResNet


@pytest.mark.parametrize(
    ("before", "interval", "lag"), [(5, 10, 10), (10, 20, 20), (5, 15, 15), (10, 30, 30), (10, 50, 50), (20, 20, 40)]
)
def test_a_longer_interval_keeps_the_distances_while_they_are_multiples_of_it(before, interval, lag):
    assert longer_lags(score_lags(before), interval) == (lag, 2 * lag, 4 * lag)


@pytest.fixture
def collected(tmp_path, monkeypatch):
    """Collect twice with no reference there; values, seconds, and the events that say so."""
    monkeypatch.setenv("KGTRUN_REFERENCE_DIR", str(tmp_path))
    monkeypatch.setenv("KGTRUN_NUM_REFERENCES", "1")

    def collect(longest_wait_s):
        model = SmallResNet()
        events = EventWriter.for_process(tmp_path, role="trainer", index=0)
        signals = Signals(
            ("plasticity", "floor"),
            Blocks(model, None),
            model,
            interval=3,
            rank_on_node=0,
            longest_wait_s=longest_wait_s,
            events=events,
        )
        found = []
        for step in (1, 4):
            started = time.monotonic()
            values = signals.collect(step, 0)
            found.append((values["plasticity"], time.monotonic() - started))
        signals.close()
        events.close()
        return found, [e for e in read_events(tmp_path) if e["kind"] == "not_repeatable"]

    return collect


def test_a_repeatable_run_waits_once_for_a_reference_that_does_not_come_and_says_so(collected):
    ((first, first_s), (second, second_s)), told = collected(0.4)
    assert set(first) == set(second) == {None}
    assert first_s >= 0.4
    assert second_s < first_s
    (event,) = told
    assert "has not answered" in event["why"]


def test_any_other_run_never_waits(collected):
    ((first, _), _), told = collected(0.0)
    assert set(first) == {None}
    assert told == []


@pytest.fixture
def signals(tmp_path, monkeypatch):
    """Signals of a model whose reference is not there, and what it was offered."""
    monkeypatch.setenv("KGTRUN_REFERENCE_DIR", str(tmp_path))
    monkeypatch.setenv("KGTRUN_NUM_REFERENCES", "1")
    offered = []
    monkeypatch.setattr(
        ReferenceClient, "offer_model", lambda _, model, watched, **__: offered.append((model, watched))
    )
    made = []

    def make(model):
        events = EventWriter.for_process(None, role="trainer", index=0)
        options = {"interval": 3, "rank_on_node": 0, "longest_wait_s": 0.0, "events": events}
        made.append(Signals(("plasticity",), Blocks(model, None), model, **options))
        return made[-1], offered

    yield make
    for one in made:
        one.close()


def test_the_reference_gets_the_names_inside_a_compiled_model(signals):
    _, ((model, watched),) = signals(torch.compile(SmallResNet(), backend="eager"))
    inside = dict(unwrap(model).named_modules())
    assert watched and set(watched) <= set(inside)


@pytest.mark.parametrize(
    "batch",
    [
        torch.eye(4).to_sparse(),
        nn.utils.rnn.pack_sequence([torch.ones(3, 2), torch.ones(2, 2)]),
        torch.nested.nested_tensor([torch.ones(3, 2), torch.ones(2, 2)]),
    ],
    ids=["sparse", "packed", "nested"],
)
def test_inputs_that_cannot_be_kept_do_not_end_training(signals, batch):
    one, _ = signals(SmallResNet())
    one.retain_probe((batch,), {})
    assert one.has_probe, "it is not tried again at every step"
