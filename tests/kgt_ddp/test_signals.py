"""Waiting for a reference, in repeatable runs and in others."""

from __future__ import annotations

import time

import pytest

from kgt_ddp.blocks import Blocks
from kgt_ddp.signals import Signals
from kgtrun.contract.events import EventWriter, read_events
from tests.kgt_ddp.networks import SmallResNet


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
