"""The rule on made-up scores, one circumstance at a time; test_kgt_traces.py has recorded ones.

Made-up blocks lose a decade of S every `scale` steps, the front ones sooner; S doubles with the distance (wandering).
"""

from __future__ import annotations

import json
import math
import random

import pytest

from kgt_ddp.policies import kgt
from kgt_ddp.policies.kgt import Kgt
from tests.kgt_ddp.policies.drive import drive, frontiers

TOTAL, EVERY, LAG = 1500, 10, 20
SCALES = (250, 400, 600, 900)
FLOOR = 1e-12


def settling(count=150, scales=SCALES, start=1e-3):
    """S(L) per decision and block."""
    return [[start * 10 ** (-i * EVERY / scale) for scale in scales] for i in range(count)]


def signals(near, *, growth=2.0, floor=FLOOR):
    """The four signals for rows of S(L); S(2L) and S(4L) come later, as the first versions must be that old."""
    known = {1: 2, 2: 4, 4: 8}

    def at(times, factor):
        return [[None if v is None or i < known[times] else v * factor for v in row] for i, row in enumerate(near)]

    return {
        "plasticity": at(1, 1.0),
        "plasticity_2": at(2, growth),
        "plasticity_4": at(4, growth**2),
        "floor": [[floor] * len(row) for row in near],
    }


def creeping(count=150):
    """A learning rate that falls, but so slowly that it shortens nothing."""
    return [0.1 * 0.9999**i for i in range(count)]


def run(near, *, policy=None, growth=2.0, floor=FLOOR, total_steps=TOTAL, every=EVERY, lag_steps=LAG, **facts):
    facts.setdefault("learning_rate", creeping(len(near)))
    return drive(
        policy or Kgt(),
        signals(near, growth=growth, floor=floor),
        every=every,
        total_steps=total_steps,
        lag_steps=lag_steps,
        **facts,
    )


def first(decisions, frontier):
    """Index of the first decision with that many blocks frozen; a large number if none."""
    return next((i for i, d in enumerate(decisions) if d.frontier >= frontier), 10_000)


def test_blocks_are_frozen_from_the_front_as_they_settle():
    found = run(settling())
    assert 20 < first(found, 1) < first(found, 2) < first(found, 3) < 145
    assert frontiers(found) == sorted(frontiers(found)) and found[-1].frontier == 3  # the last block always trains


def test_a_job_that_is_asked_half_as_often_is_judged_alike():
    """`cadence` leaves 75 decisions to one whose reference is slow, with distances twice as long."""
    often = run(plunging(), growth=1.0, learning_rate=cosine())
    seldom = run(plunging()[::2], growth=1.0, learning_rate=cosine()[::2], every=2 * EVERY, lag_steps=2 * LAG)
    for frontier in (1, 2, 3):
        assert abs(first(often, frontier) / 150 - first(seldom, frontier) / 75) < 0.1


def test_every_decision_carries_its_numbers():
    found = run(settling())
    numbers = found[first(found, 1)].numbers
    assert set(numbers) == {"horizon_steps", "ahead", "share", "own", "level", "exponent", "still"}
    assert numbers["share"][0] < 0.01 < numbers["share"][3] and numbers["exponent"] == [1.0] * 4
    json.dumps([d.numbers for d in found], allow_nan=False)


@pytest.mark.parametrize(("growth", "at_mean"), [(1.0, True), (1.3, True), (1.6, False), (2.0, False), (4.0, False)])
def test_a_cut_that_jitters_freezes_at_its_mean_and_one_that_wanders_as_it_is(growth, at_mean):
    """The mean of a way is a place that was left; that of a jitter is what it jitters about."""
    found = run(settling(), growth=growth)
    froze = [d for before, d in zip(found, found[1:], strict=False) if d.frontier > before.frontier]
    assert froze and {d.at_mean for d in froze} == {at_mean}


def plunging(count=150, levels=(5e-6, 1e-5, 2e-5, 4e-4)):
    """From random weights down in a few decisions; from there on blocks jitter about a point."""
    return [[level * max(1.0, 300 * 10 ** (-i / 10)) for level in levels] for i in range(count)]


def cosine(count=150):
    return [0.1 * 0.5 * (1 + math.cos(math.pi * i / count)) for i in range(count)]


@pytest.mark.parametrize("total_steps", [TOTAL, None])
def test_blocks_that_jitter_are_not_frozen_while_most_of_the_training_is_to_come(total_steps):
    """At rest for the present rate, and a hundred times quieter than at the start: they still move when it falls. Of four
    blocks the first is late earlier: three quarters of the network are behind it."""
    found = run(plunging(), growth=1.0, learning_rate=cosine(), total_steps=total_steps)
    assert 0.53 * 150 < first(found, 3) < 0.66 * 150
    at = first(found, 1)
    assert 0.43 * 150 < at < first(found, 3) and found[at].numbers["ahead"] < 0.6 * 3 / 4
    assert all(share < 0.01 for share in found[at - 20].numbers["share"][:3]), "by their scores they were still before"


def test_jitter_that_shrinks_with_the_rate_is_no_later_for_the_want_of_a_plunge():
    """Its highest level is the one it always had, and is halved where the rate is down to 1/√2 of its start."""
    plain = [[level * (rate / 0.1) ** 2 for level in plunging()[-1]] for rate in cosine()]
    found = run(plain, growth=1.0, learning_rate=cosine())
    assert first(found, 1) > 0.43 * 150 and first(found, 3) < 0.6 * 150
    creeps = run(plain, growth=1.0, learning_rate=creeping())
    assert first(creeps, 1) > first(found, 3) + 0.05 * 150  # the rate did not fall, so it is not late


def test_blocks_that_calm_down_under_a_steady_rate_do_not_wait_for_its_end():
    near = plunging(60) + [[level * 10 ** (-i / 20) for level in plunging(60)[-1]] for i in range(90)]
    assert first(run(near, growth=1.0), 3) < 0.8 * 150
    assert first(run(plunging(), growth=1.0), 1) > 0.8 * 150


def test_several_blocks_go_at_once_when_a_deeper_cut_is_still():
    found = run(settling(scales=(400, 250, 250, 900)))
    assert 0 not in {first(found, 2)} and found[first(found, 1)].frontier == 3
    # block 0 by itself is not still yet, but what is behind it is, and that carries every change of block 0


def test_a_restless_front_block_holds_back_what_is_behind_it():
    near = settling(scales=(250, 250, 250, 900))
    for row in near:
        row[0] = 1e-3
    assert set(frontiers(run(near))) == {0}


def test_a_front_block_near_the_floor_does_not():
    near = settling(scales=(250, 400, 600, 900))
    for row in near[30:]:
        row[0] = FLOOR / 2
    found = run(near)
    assert found[first(found, 1)].frontier >= 2


def test_a_front_block_that_stands_still_does_not_even_where_the_reference_has_no_floor():
    """Frozen by the user, or trained at a rate of zero: fp32 scores it zero, and its own floor is zero too."""
    near = settling(scales=(250, 400, 600, 900))
    for row in near:
        row[0] = 0.0
    assert frontiers(run(near, floor=0.0))[-1] == 3


def test_a_front_block_that_was_never_above_the_floor_freezes_when_it_is_late_whatever_is_behind_it():
    """Three floors are a hundred-thousandth of what the network moves. The floor of all others hides nothing."""
    near = [[1e-9, 1e-3, 1e-3, 1e-3] for _ in range(150)]
    found = run(near, floor=1e-8, learning_rate=cosine())
    assert 0.4 * 150 < first(found, 1) < 0.7 * 150 and found[-1].frontier == 1
    assert set(frontiers(run([[1e-9] * 4] * 150, floor=1e-8, learning_rate=cosine()))) == {0}


def fine_tuning(front=1e-6, count=150):
    """The front block goes a thousandth of the others' way, at a pace that falls with the rate."""
    rates = [rate / 0.1 for rate in cosine(count)]
    return [[front * rate**2, 1e-3, 1e-3, 1e-3] for rate in rates]


def test_a_wandering_front_block_must_have_come_most_of_its_own_way_however_little_that_is(monkeypatch):
    """It owes a third of its own way, which is little beside the network's: that was enough once."""
    waits = run(fine_tuning(4e-6), learning_rate=cosine())
    monkeypatch.setattr(kgt, "OWN", math.inf)
    before = run(fine_tuning(4e-6), learning_rate=cosine())
    assert first(before, 1) + 10 < first(waits, 1) < 130
    monkeypatch.undo()
    negligible = run(fine_tuning(1e-8), learning_rate=cosine())
    assert first(negligible, 1) < first(waits, 1)


@pytest.mark.parametrize("bad", [None, math.nan, math.inf, 0.0, FLOOR / 2])
def test_nothing_is_frozen_on_what_is_not_known(bad):
    near = [[bad] * 4 for _ in range(150)]
    assert set(frontiers(run(near))) == {0}
    near = settling()
    for row in near[first(run(near), 1) - 1 :]:
        row[:] = [bad] * 4
    assert set(frontiers(run(near))) == {0}


def test_a_block_whose_scores_make_no_sense_holds_back_what_is_behind_it():
    near = settling()
    for row in near:
        row[1] = math.nan
    assert run(near)[-1].frontier == 1


def test_a_block_whose_scores_went_missing_does_too():
    near = settling()
    for row in near[30:]:
        row[1] = None
    assert run(near)[-1].frontier == 1


def test_a_block_that_is_never_scored_does_not():
    near = settling()
    for row in near:
        row[0] = None
    assert run(near)[-1].frontier == 3  # the cuts behind it carry its changes


def test_the_last_fifth_always_trains():
    near = settling(scales=(300,) * 10)
    assert run(near)[-1].frontier == 8


def test_a_floor_that_was_not_measured_freezes_nothing():
    assert set(frontiers(run(settling(), floor=None))) == {0}


@pytest.mark.parametrize("sigma", [0.1, 0.3, 1.0, 2.0])
@pytest.mark.parametrize("total_steps", [TOTAL, None])
def test_noise_freezes_nothing(sigma, total_steps):
    for seed in range(3):
        noise = random.Random(seed)
        rows = {
            name: [[noise.lognormvariate(-9, sigma) for _ in range(6)] for _ in range(150)]
            for name in ("plasticity", "plasticity_2", "plasticity_4")
        }
        rows["floor"] = [[1e-9] * 6] * 150
        found = drive(Kgt(), rows, every=EVERY, total_steps=total_steps, lag_steps=LAG, learning_rate=creeping())
        assert set(frontiers(found)) == {0}, f"seed {seed}"


@pytest.mark.parametrize("growth", [1.0, 2.0, 4.0])
@pytest.mark.parametrize(("count", "total_steps"), [(150, TOTAL), (150, None), (800, None)])
def test_constant_scores_freeze_nothing_however_long(growth, count, total_steps):
    found = run([[1e-5, 1e-4, 1e-3, 1e-2]] * count, growth=growth, total_steps=total_steps)
    assert set(frontiers(found)) == {0}


def test_a_job_of_unknown_length_freezes_too_though_later():
    known, unknown = run(settling()), run(settling(), total_steps=None)
    assert first(known, 1) <= first(unknown, 1) < 140


def test_of_200_steps_nothing_is_frozen():
    near = [[1e-3 * 10 ** (-i / 8) for _ in range(4)] for i in range(67)]
    assert set(frontiers(run(near, total_steps=200, every=3, lag_steps=6))) == {0}


def test_steady_movement_is_frozen_later_than_jitter_of_the_same_size():
    jitter, steady = run(settling(), growth=1.0), run(settling(), growth=3.9)
    assert first(jitter, 1) < first(steady, 1)


@pytest.mark.parametrize("rate", [0.1, None])
def test_where_the_rate_does_not_fall_it_takes_longer(rate):
    assert first(run(settling(), learning_rate=rate), 1) >= first(run(settling()), 1) + 15


def test_a_smaller_tolerance_freezes_later():
    assert first(run(settling()), 1) < first(run(settling(), policy=Kgt(tolerance=0.001)), 1)


def test_scores_that_come_every_other_time_do_too():
    near = settling()
    for row in near[1::2]:
        row[:] = [None] * 4
    assert abs(first(run(near), 1) - first(run(settling()), 1)) < 15


def test_a_job_whose_scores_stay_high_after_the_transient_is_left_alone():
    """A constant high learning rate: the scores fall by two decades at first, and then stay."""
    assert set(frontiers(run(transient(), learning_rate=[0.1] * 150))) == {0}


def test_where_the_rate_only_creeps_such_a_job_is_frozen_when_little_of_it_is_left():
    found = run(transient(), growth=1.2)
    at = first(found, 1)
    assert at > 0.8 * 150
    assert found[at].numbers["ahead"] < 0.25 and found[at].numbers["share"][0] < 0.02
    assert set(frontiers(run(transient(), growth=1.2, policy=Kgt(late_tolerance=0.004)))) == {0}
    assert set(frontiers(run(transient(), growth=2.0))) == {0}, "what wanders is not late before it is settled"


def transient():
    """Down by two decades, then level to the end."""
    return [[max(1e-3 * 10 ** (-i / 15), 1e-5) * (1 + b) for b in range(4)] for i in range(150)]


def test_what_does_not_pay_is_not_frozen():
    near = settling()
    free = run(near, block_seconds=(0.0,) * 4, apply_seconds=0.1)
    assert set(frontiers(free)) == {0} and any("not pay" in d.reason for d in free)
    dear = run(near, block_seconds=(0.01,) * 4, apply_seconds=1e4)
    assert set(frontiers(dear)) == {0}
    assert run(near, block_seconds=(0.01,) * 4, apply_seconds=0.1)[-1].frontier == 3


def test_an_abrupt_drop_of_the_learning_rate_thaws_and_judges_afresh():
    rates = creeping(100) + [0.01] * 50
    found = run(settling(), learning_rate=rates)
    assert found[99].frontier > 0 and found[100].frontier == 0 and "dropped" in found[100].reason
    again = first(found[100:], 1)
    assert 8 < again < 25  # 4L steps until no score compares across the drop, then a few evaluations


def test_a_smooth_decay_does_not_thaw():
    rates = [0.05 * (1 + math.cos(math.pi * i / 150)) for i in range(150)]
    found = frontiers(run(settling(), learning_rate=rates))
    assert found == sorted(found) and found[-1] == 3


def test_a_warm_restart_thaws_and_a_low_rate_is_not_trusted_again():
    rates = [0.05 * (1 + math.cos(math.pi * (i % 75) / 75)) + 1e-4 for i in range(150)]
    near = [[1e-3 * (rate / 0.1) ** 2 * s for s in (1, 2, 3, 4)] for rate in rates]
    found = run(near, learning_rate=rates)
    assert found[74].frontier > 0 and found[75].frontier == 0 and "rose" in found[75].reason
    assert {d.frontier for d in found[75:]} == {0}


def test_during_a_warm_up_nothing_is_judged():
    rates = [0.1 * min((i + 1) / 60, 1.0) for i in range(150)]
    found = run(settling(scales=(100, 100, 100, 100)), learning_rate=rates)
    assert first(found, 1) > 40


def test_fresh_weights_in_mid_run_delay_the_block_and_what_is_behind_it():
    plain = run(settling())
    at = first(plain, 1) - 5
    near = settling()
    for index, row in enumerate(near[at:]):
        for block in (1, 2, 3):
            row[block] = max(row[block], 1e-3 * 10 ** (-index * EVERY / 300))
    found = run(near)
    assert first(found, 1) <= first(plain, 1) + 8  # in front of it: little later, as the deepest block's past is gone
    assert first(found, 2) > first(plain, 2) + 10 and first(found, 3) > first(plain, 3)


def test_permuted_scores_change_the_decisions():
    assert frontiers(run([row[::-1] for row in settling()])) != frontiers(run(settling()))


def test_a_frozen_block_that_moves_is_thawed():
    near = settling()
    at = first(run(near), 1) + 1
    for index, row in enumerate(near[at:]):
        row[0] = 0.0 if index < 30 else 1e-4  # 300 steps after the freeze somebody writes to it
    found = run(near, silence=False)
    thaw = next(d for d in found[at + 30 :] if d.frontier == 0)
    assert found[at + 29].frontier > 0 and "block 0 has moved" in thaw.reason


def test_behind_an_embedding_that_trains_on_outputs_move_and_nothing_is_thawed():
    """It is tied to the output layer: the frozen blocks put out something else at each step, and nobody wrote to them."""
    near = settling()
    for row in near[110:]:
        row[0] = 1e-5
    found = frontiers(run(near, silence=False, num_fixed=0))
    assert found[-1] == 3 and 0 not in found[found.index(1) :]
    assert any(d.frontier == 0 and "block 0 has moved" in d.reason for d in run(near, silence=False))


def test_a_network_that_moves_much_more_than_at_the_freeze_is_thawed():
    near = settling()
    at = first(run(near), 1)
    for row in near[at + 15 :]:
        row[:] = [5e-3] * 4
    found = run(near)
    assert any("more than at the freeze" in d.reason and d.frontier == 0 for d in found)


def test_it_goes_on_from_its_state_exactly():
    rates = [0.05 * (1 + math.cos(math.pi * i / 150)) for i in range(150)]
    near = settling()
    whole = run(near, learning_rate=rates)
    given = signals(near)
    for cut in (5, 40, 70, 100):
        before, after = Kgt(), Kgt()
        head = drive(
            before,
            {k: v[:cut] for k, v in given.items()},
            every=EVERY,
            total_steps=TOTAL,
            lag_steps=LAG,
            learning_rate=rates[:cut],
        )
        after.load_state_dict(json.loads(json.dumps(before.state_dict(), allow_nan=False)))
        tail = drive(
            after,
            {k: v[cut:] for k, v in given.items()},
            every=EVERY,
            start=cut * EVERY,
            frontier=head[-1].frontier,
            total_steps=TOTAL,
            lag_steps=LAG,
            learning_rate=rates[cut:],
        )
        assert head + tail == whole


LONG, FACTOR, CHANGE = 5 * TOTAL, 5, 90
"""A job five times as long, whose length is learned at decision 90 of the short interval: a fifth of it is over."""


def lengthened(rows, growth):
    """Rows at the short interval and distance; (step, frontier) of every decision, at the long ones from `CHANGE` on."""
    policy, found = Kgt(), []
    rates = creeping(len(rows))
    for first_row, stride in ((0, 1), (CHANGE, FACTOR)):
        chosen = slice(first_row, CHANGE if stride == 1 else None, stride)
        scale = stride ** math.log2(growth)
        decisions = run(
            [[value * scale for value in row] for row in rows[chosen]],
            policy=policy,
            growth=growth,
            every=EVERY * stride,
            lag_steps=LAG * stride,
            total_steps=None if stride == 1 else LONG,
            start=first_row * EVERY,
            learning_rate=rates[chosen],
        )
        found += [((first_row + i * stride) * EVERY, d.frontier) for i, d in enumerate(decisions)]
    return found


def test_a_distance_that_becomes_longer_on_the_way_delays_little():
    rows = settling(FACTOR * 150, scales=[5 * s for s in SCALES])
    found = lengthened(rows, 2.0)
    always = run(
        [[5 * value for value in row] for row in rows[::FACTOR]],
        every=FACTOR * EVERY,
        lag_steps=FACTOR * LAG,
        total_steps=LONG,
        learning_rate=creeping(len(rows))[::FACTOR],
    )
    at, otherwise = next(step for step, frontier in found if frontier), first(always, 1) * FACTOR * EVERY
    assert otherwise <= at <= otherwise + 0.1 * LONG


@pytest.mark.parametrize("growth", [1.0, 2.0, 4.0])
def test_nor_are_constant_scores_taken_for_a_decline_by_it(growth):
    found = lengthened([[1e-5, 1e-4, 1e-3, 1e-2]] * (FACTOR * 150), growth)
    assert {frontier for _, frontier in found} == {0}


def test_without_a_lag_nothing_can_be_judged():
    assert set(frontiers(run(settling(), lag_steps=None))) == {0}
