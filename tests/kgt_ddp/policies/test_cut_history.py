from __future__ import annotations

import dataclasses
import json
import math

import pytest

from kgt_ddp.policies.cut_history import CutHistory, settling
from kgt_ddp.policies.scores import Scores, at_odds, near_floor, visible

SPAN, WINDOW = 40, 120


def scores(near, *, growth=2.0, floor=1e-9):
    """Of a block whose S doubles with the distance, unless told otherwise."""
    return Scores(near=near, middle=near * growth, far=near * growth**2, floor=floor)


def history(values, *, every=10, growth=2.0, start=40):
    cut = CutHistory()
    for index, value in enumerate(values):
        cut.note(start + index * every, scores(value, growth=growth), span=SPAN, window=WINDOW)
    return cut


@pytest.mark.parametrize(("growth", "exponent"), [(1.0, 0.0), (2.0, 1.0), (4.0, 2.0), (16.0, 2.0), (0.5, 0.0)])
def test_the_exponent_tells_jitter_from_wandering_from_steady_movement(growth, exponent):
    outlook = history([1e-5] * 20, growth=growth).outlook(400, SPAN)
    assert outlook.exponent == pytest.approx(exponent)
    assert outlook.to_come == pytest.approx(outlook.level * 10**exponent)


def test_past_has_one_term_every_four_lags():
    cut = history([1e-5] * 21)  # steps 40 to 240
    assert cut.past() == pytest.approx(6 * 4e-5)
    assert cut.outlook(0, SPAN).level == pytest.approx(4e-5)


def test_a_plunge_from_random_weights_is_not_what_all_else_is_measured_by():
    plain, plunged = history([1e-5] * 60).past(), history([1e-1] * 4 + [1e-5] * 56).past()
    assert plain < plunged < 6 * plain  # and not 1,000 times


def test_a_long_run_keeps_few_terms_and_loses_none():
    cut = history([1e-5] * 2000)
    assert len(cut.terms) < 64 and cut.past() == pytest.approx(500 * 4e-5, rel=0.05)


def test_the_level_is_of_the_window_and_one_gust_does_not_move_it():
    cut = history([1e-4] * 20 + [1e-6] * 6 + [5e-6] + [1e-6] * 6)
    assert cut.outlook(0, SPAN).level == pytest.approx(4e-6)
    assert cut.peak == pytest.approx(4e-4)


def test_a_decline_is_one_of_most_of_the_window():
    # 12 evaluations make a window: of 6 quiet ones among them, half are still at the old level
    assert not history([1e-4] * 20 + [1e-6] * 6).outlook(0, SPAN).declined
    assert history([1e-4] * 20 + [1e-6] * 11).outlook(0, SPAN).declined


def test_half_of_the_peak():
    assert history([1e-4] * 20 + [4e-5] * 12).outlook(0, SPAN).halved
    assert not history([1e-4] * 20 + [6e-5] * 12).outlook(0, SPAN).halved


def test_scores_that_jump_to_and_fro_do_not_hang_together_and_those_that_fall_fast_do():
    assert not history([1e-4] * 20 + [2e-5, 2e-6] * 6).outlook(0, SPAN).smooth
    assert history([1e-4] * 20 + [2e-5, 1.5e-5] * 6).outlook(0, SPAN).smooth
    assert history([1e-4 * 0.6**i for i in range(20)]).outlook(0, SPAN).smooth


def test_calm_is_judged_by_the_usual_level_and_a_plunge_at_the_start_is_not_usual():
    plunge = [1e-2] * 8 + [1e-3] * 8
    assert not history(plunge + [1e-5] * 60).outlook(0, SPAN).calmed
    assert history(plunge + [1e-5] * 60).outlook(0, SPAN).declined
    assert not history(plunge + [1e-5] * 60 + [6e-6] * 20).outlook(0, SPAN).calmed
    assert history(plunge + [1e-5] * 60 + [4e-6] * 20).outlook(0, SPAN).calmed


@pytest.mark.parametrize(
    "bad",
    [
        Scores(near=None, middle=2e-5, far=4e-5, floor=1e-9),
        Scores(near=1e-5, middle=math.nan, far=4e-5, floor=1e-9),
        Scores(near=1e-5, middle=2e-5, far=math.inf, floor=1e-9),
        Scores(near=1e-5, middle=2e-5, far=4e-5, floor=None),
        Scores(near=0.0, middle=0.0, far=0.0, floor=0.0),  # a block that does not move: frozen by hand
        Scores(near=1e-5, middle=1e-3, far=4e-5, floor=1e-9),  # S(2L) far above both its neighbours
        Scores(near=1e-3, middle=1e-7, far=1e-5, floor=1e-9),
    ],
)
def test_what_is_not_visible_changes_nothing(bad):
    assert visible(bad) is None
    cut = history([1e-5] * 20)
    before = cut.outlook(100, SPAN)
    assert not cut.note(240, bad, span=SPAN, window=WINDOW)
    assert cut.outlook(100, SPAN) == before


NEAR_FLOOR = Scores(near=1e-6, middle=2e-6, far=4e-6, floor=2e-6)


def test_near_the_floor_the_level_is_at_most_three_floors_and_nothing_is_past():
    cut = history([1e-5] * 20)
    before = (cut.past(), cut.peak, cut.fastest)
    for step in range(240, 360, 10):
        assert cut.note(step, NEAR_FLOOR, span=SPAN, window=WINDOW)
    outlook = cut.outlook(80, SPAN)
    assert outlook.level == pytest.approx(6e-6) and not outlook.measured
    assert outlook.to_come == pytest.approx(6e-6 * 2**2)  # steady movement, the most there is
    assert (cut.past(), cut.peak, cut.fastest) == before


def test_a_cut_that_was_never_seen_is_bounded_and_owes_more_than_its_past_and_is_halved():
    cut = CutHistory()
    for step in range(40, 160, 10):
        assert cut.outlook(80, SPAN) is None or step > 80
        cut.note(step, NEAR_FLOOR, span=SPAN, window=WINDOW)
    outlook = cut.outlook(80, SPAN)
    assert outlook.own == math.inf and outlook.halved and not outlook.declined


def test_a_floor_that_hides_the_whole_network_bounds_nothing():
    cut = history([1e-5] * 20)
    before = cut.outlook(100, SPAN)
    assert not cut.note(240, NEAR_FLOOR, span=SPAN, window=WINDOW, network_moves=False)
    assert cut.outlook(100, SPAN) == before


def test_what_is_to_come_as_a_share_of_its_own_past():
    cut = history([1e-5] * 21)
    assert cut.outlook(40, SPAN).own == pytest.approx(4e-5 / (6 * 4e-5))


def test_near_the_floor_and_at_odds_are_told_apart():
    low = Scores(near=1e-9, middle=2e-9, far=4e-9, floor=1.5e-9)
    odd = Scores(near=1e-5, middle=1e-3, far=4e-5, floor=1e-9)
    nan = Scores(near=1e-5, middle=math.nan, far=4e-5, floor=1e-9)
    assert [near_floor(s) for s in (low, odd, nan)] == [True, False, False]
    assert [at_odds(s) for s in (low, odd, nan)] == [False, True, False]


def test_where_only_the_shortest_distance_drowns_in_the_floor_a_steady_movement_is_assumed():
    assert visible(Scores(near=2e-9, middle=4e-9, far=8e-9, floor=1e-9)) == (5e-10, 8e-9)
    assert visible(Scores(near=4e-9, middle=5e-9, far=8e-9, floor=1e-9)) == (4e-9, 8e-9)
    noise = Scores(near=2e-9, middle=1e-7, far=8e-9, floor=1e-9)
    assert visible(noise) is None and at_odds(noise)
    cut = CutHistory()
    for step in range(100, 600, 10):
        cut.note(step, Scores(near=2e-9, middle=4e-9, far=8e-9, floor=1e-9), span=SPAN, window=WINDOW)
    assert (seen := cut.outlook(10 * SPAN, SPAN)) is not None
    assert seen.exponent == 2.0 and seen.to_come == pytest.approx(8e-9 * 100)


def test_an_exact_reference_has_no_floor():
    assert visible(scores(1e-12, floor=0.0)) == (1e-12, 4e-12)


def test_too_few_evaluations_say_nothing():
    assert history([1e-5] * 4).outlook(100, SPAN) is None
    cut = history([1e-5] * 20)
    cut.note(2000, Scores(near=None, middle=None, far=None, floor=None), span=SPAN, window=WINDOW)
    assert cut.outlook(100, SPAN) is None  # what it knew is too old


def test_fresh_weights_begin_a_new_history_when_no_score_compares_across_the_jump():
    calm = [1e-3] * 6 + [1e-5] * 20
    cut = history([*calm, 2e-3])
    jump = 40 + 10 * len(calm)
    assert cut.outlook(100, SPAN) is None and cut.past() == 0 and cut.blind_until == jump + settling(SPAN)
    for step in range(jump + 10, jump + 171, 10):
        cut.note(step, scores(2e-5), span=SPAN, window=WINDOW)
    assert cut.past() == pytest.approx(3 * 8e-5)
    assert cut.outlook(100, SPAN).level == pytest.approx(8e-5)


def test_a_gust_is_no_jump():
    assert history([*[1e-3] * 6, *[1e-5] * 20, 5e-4]).past() > 0  # the run has seen as much


def test_the_growth_of_a_warm_up_is_no_jump():
    assert history([1e-6] * 8 + [1e-5] * 8 + [1e-4] * 8).past() > 0  # it never calmed down


def test_evaluations_near_the_floor_are_counted_in_a_row():
    cut = history([1e-5] * 20)
    low = Scores(near=1e-9, middle=1e-9, far=2e-9, floor=1e-9)
    for step in (240, 250, 260):
        cut.note(step, low, span=SPAN, window=WINDOW)
    assert cut.num_near_floor == 3
    cut.note(270, Scores(near=None, middle=None, far=None, floor=None), span=SPAN, window=WINDOW)
    assert cut.num_near_floor == 0


def test_a_long_run_keeps_few_evaluations():
    cut = CutHistory()
    for step in range(0, 20_000, 10):
        cut.note(step, scores(1e-5), span=SPAN, window=5_000)
    assert len(cut.recent) <= 34


def test_it_is_restored_from_plain_data():
    cut = history([1e-5] * 20)
    state = json.loads(json.dumps(cut.state_dict(), allow_nan=False))
    assert dataclasses.asdict(CutHistory.from_state(state)) == dataclasses.asdict(cut)
