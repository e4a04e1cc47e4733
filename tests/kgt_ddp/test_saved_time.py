from __future__ import annotations

import pytest

from kgt_ddp.saved_time import SavedTime


def run(saved, durations, *, frozen, start=0.0):
    now = start
    for duration in durations:
        now += duration
        saved.step_ended(now, frozen=frozen)
    return now


def test_shorter_steps_behind_a_frontier_are_time_saved():
    saved = SavedTime()
    now = run(saved, [1.0] * 10, frozen=False)
    assert saved.seconds == 0
    run(saved, [0.6] * 5, frozen=True, start=now)
    assert saved.seconds == pytest.approx(5 * 0.4)


def test_a_pause_between_steps_counts_on_neither_side():
    saved = SavedTime()
    now = run(saved, [1.0, 1.0, 60.0, 1.0, 1.0, 1.0, 1.0], frozen=False)
    run(saved, [0.5, 30.0, 0.5], frozen=True, start=now)
    assert saved.seconds == pytest.approx(1.0)


def test_steps_that_became_longer_are_not_hidden():
    saved = SavedTime()
    now = run(saved, [1.0] * 8, frozen=False)
    run(saved, [1.5] * 4, frozen=True, start=now)
    assert saved.seconds == pytest.approx(-2.0)


def test_nothing_is_claimed_without_a_measure_of_the_unfrozen_step():
    saved = SavedTime()
    run(saved, [0.5] * 5, frozen=True)
    assert saved.seconds == 0
    assert saved.unfrozen_step_s is None
