from __future__ import annotations

import json
import math

import pytest

from kgt_ddp.policies.learning_rate import RateWatch

STEPS = range(0, 1501, 10)


def watch(rate_of, steps=STEPS, total=1500):
    """The events of a schedule given as share of the job to rate, and the watch at its end."""
    seen, events = RateWatch(), []
    for step in steps:
        event = seen.note(step, rate_of(step / total))
        if event:
            events.append((event, step))
    return events, seen


def cosine(done):
    return 0.1 * 0.5 * (1 + math.cos(math.pi * done))


@pytest.mark.parametrize(
    "rate_of",
    [
        cosine,
        lambda done: 0.1 * (1 - done),
        lambda done: 0.1 * math.exp(-9 * done),
        lambda done: 0.1 * 0.5 ** int(10 * done),  # halved now and then: steps too small to be another regime
        lambda done: 0.1,
        lambda done: 0.0,
        lambda done: None,
        lambda done: math.nan,
    ],
)
def test_nothing_happens_while_the_rate_is_flat_or_decays_smoothly(rate_of):
    assert watch(rate_of)[0] == []


def test_a_step_schedule_drops_at_its_steps():
    events, seen = watch(lambda done: 0.1 * 0.1 ** ((done >= 0.5) + (done >= 0.75)))
    assert events == [("drop", 750), ("drop", 1130)] and not seen.restarts


def test_a_drop_in_the_middle_of_a_smooth_decay_is_seen():
    assert watch(lambda done: cosine(done) * (0.1 if done >= 0.5 else 1))[0] == [("drop", 750)]


def test_a_warm_up_rises_and_is_no_restart():
    events, seen = watch(lambda done: min(done / 0.1, (1 - done) / 0.9))
    assert {kind for kind, _ in events} == {"rise"} and max(step for _, step in events) <= 150
    assert not seen.restarts


@pytest.mark.parametrize("rate_of", [lambda done: cosine(3 * done % 1), lambda done: 0.01 + abs(math.sin(9 * done))])
def test_cycles_restart(rate_of):
    events, seen = watch(rate_of)
    assert {kind for kind, _ in events} >= {"rise"} and seen.restarts


def test_the_horizon_of_a_flat_rate_is_all_that_is_to_come():
    assert watch(lambda done: 0.1)[1].horizon(400) == 400
    assert RateWatch().horizon(400) == 400
    assert watch(lambda done: None)[1].horizon(-3) == 0


@pytest.mark.parametrize("decay", [cosine, lambda done: 0.1 * (1 - done), lambda done: 0.1 * math.exp(-3 * done)])
@pytest.mark.parametrize("done", [0.3, 0.5, 0.7, 0.9])
def test_the_horizon_of_a_decaying_rate_is_shorter_but_never_too_short(decay, done):
    _, seen = watch(decay, steps=range(0, int(1500 * done) + 1, 10))
    rest = range(int(1500 * done), 1500)
    true = sum(decay(step / 1500) for step in rest) / decay(done)
    assert 0.95 * true <= seen.horizon(len(rest)) < min(2.5 * true, len(rest))


def test_after_a_restart_a_low_rate_is_not_taken_for_the_end():
    _, seen = watch(lambda done: cosine(3 * done % 1), steps=range(0, 960, 10))
    assert seen.restarts and seen.horizon(500) > 5 * 500  # the rate is near the bottom of its second cycle


@pytest.mark.parametrize("rate_of", [cosine, lambda done: 0.1 * (1 - done), lambda done: 0.1])
@pytest.mark.parametrize("done", [0.3, 0.6, 0.9])
def test_what_is_spent_is_the_sum_of_the_rates_in_steps_at_the_present_one(rate_of, done):
    past = range(0, int(1500 * done) + 1, 10)
    _, seen = watch(rate_of, steps=past)
    assert seen.spent(past[-1]) == pytest.approx(sum(10 * rate_of(s / 1500) for s in past[:-1]) / rate_of(done))


def test_of_an_unknown_rate_every_step_counts_alike_and_of_none_nothing_is_left():
    assert RateWatch().spent(300) == 300
    assert watch(lambda done: 0.1 if done < 0.5 else 0.0)[1].spent(1500) == math.inf


def test_it_goes_on_from_its_state():
    steps = list(STEPS)
    for rate_of in (cosine, lambda done: cosine(3 * done % 1), lambda done: 0.1 * 0.1 ** (done >= 0.5)):
        whole = watch(rate_of)[1]
        first, second = watch(rate_of, steps=steps[:70])[1], RateWatch()
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        for step in steps[70:]:
            second.note(step, rate_of(step / 1500))
        assert second == whole
    assert json.dumps(RateWatch().state_dict(), allow_nan=False)
