"""`kgt` on recorded training: what it freezes and thaws when, and why that is right.

`to_end` in a trace is how far a block still was from what it became in the end: what a policy has to guess.
"""

from __future__ import annotations

import math
import random
import statistics

import pytest

from kgt_ddp.policies import kgt
from kgt_ddp.policies.kgt import Kgt
from kgt_ddp.policy_spec import parse_policy
from tests.kgt_ddp.policies.drive import DISTANCES
from tests.kgt_ddp.policies.traces import load, replay

RUNS = ["vision-run-seed0", "vision-run-seed2"]


def still_to_come(name, block, share):
    """What a block's output still had to move at this share of the job, over what it moved in all; squared distances."""
    trace = load(name)
    at = [r for r in trace["records"] if abs(r["step"] / trace["total_steps"] - share) < 0.02]
    return statistics.median(r["to_end"][block] for r in at) / trace["records"][0]["to_end"][block]


# ---- cosine: the rate falls smoothly to zero ------------------------------------------------------------------------


@pytest.mark.parametrize("name", RUNS)
def test_cosine_saves_more_than_a_third_of_the_backward_work(name):
    """As much as a timetable that begins at a third of the job (docs/policy.md, What freezing early costs)."""
    found, linear = replay(name, Kgt()), replay(name, parse_policy("linear"))
    assert 0.35 < found.frozen < 0.42
    assert found.frozen > 0.95 * linear.frozen and found.first(1) > linear.first(1) + 0.1
    assert found.first(8) < 0.75 and found.decisions[-1][1].frontier == 8  # all but the last fifth


@pytest.mark.parametrize("name", RUNS)
def test_a_block_that_still_owes_more_than_settled_ones_goes_when_little_of_the_training_is_left(name):
    lenient, strict = replay(name, Kgt()), replay(name, Kgt(late_tolerance=0.004))
    assert 0.43 < lenient.first(1) <= strict.first(1)
    assert lenient.first(7) < strict.first(7) - 0.1 and lenient.first(8) < strict.first(8) - 0.1


def test_blocks_that_wander_late_owe_less_than_settled_ones():
    """4,000 images, seen 24 times: from .55 on most blocks wander, and are still learning their samples."""
    found = replay("resnet-cosine", Kgt())
    assert found.first(5) < 0.55 and 0.65 < found.first(6) < found.first(7) < 0.8 < found.first(8)
    assert 0.30 < found.frozen < 0.35 and found.decisions[-1][1].frontier == 8
    assert 0.75 < replay("minilm-warmup-linear", Kgt()).first(4) < 0.85


@pytest.mark.parametrize("name", [*RUNS, "resnet-cosine"])
def test_cosine_freezes_nothing_before_most_of_the_training_is_done_and_never_thaws(name):
    """The sum of the rates to come is a quarter of that of the steps so far at .53, and about half of it at .43."""
    found = replay(name, Kgt())
    assert 0.43 < found.first(1) <= found.first(3) < 0.53 < found.first(6)
    frontiers = [frontier for _, frontier in found.moves]
    assert frontiers == sorted(frontiers)


@pytest.mark.parametrize("name", RUNS)
def test_what_jitters_goes_to_its_mean(name):
    assert {decision.at_mean for decision in replay(name, Kgt()).freezes} == {True}


def test_what_wanders_freezes_as_it_is():
    """The output of a fine-tuned network's blocks moves steadily on to the end."""
    assert {decision.at_mean for decision in replay("minilm-warmup-linear", Kgt()).freezes} == {False}


def test_what_is_frozen_under_cosine_had_little_left_to_do():
    """Squared distances: a fortieth is a sixth of the way, against the whole way from random weights."""
    found = replay("resnet-cosine", Kgt())
    before = 0
    for share, frontier in found.moves:
        assert all(still_to_come("resnet-cosine", block, share) < 0.025 for block in range(before, frontier))
        before = frontier


@pytest.mark.parametrize("name", RUNS)
def test_runs_of_the_full_job_are_frozen_alike_whatever_their_seed(name):
    """All of Fashion-MNIST, ten epochs. With seed 2 the front blocks had no plunge to come down from."""
    found = replay(name, Kgt())
    assert 0.35 < found.frozen < 0.40
    assert found.first(1) > 0.43 and found.first(3) < 0.52 and 0.53 < found.first(7) < 0.6 and found.first(8) < 0.7


def test_a_job_of_unknown_length_is_judged_alike():
    known, unknown = replay("resnet-cosine", Kgt()), replay("resnet-cosine", Kgt(), length_known=False)
    assert abs(known.frozen - unknown.frozen) < 0.08


def test_cosine_without_the_learning_rate_freezes_later():
    """Its decay is what says that less is to come than was."""
    blind = replay("resnet-cosine", Kgt(), rate_seen=False)
    assert 0.08 < blind.frozen < replay("resnet-cosine", Kgt()).frozen


# ---- it listens -----------------------------------------------------------------------------------------------------


def test_fresh_weights_in_mid_run_delay_the_block_and_all_behind_it():
    """Block 3 (stage2.0) got random weights at half of the job. Five lags and a window later, at .7, the delay is over: those
    that would have gone later do so here."""
    plain, fresh = replay("resnet-cosine", Kgt()), replay("resnet-cosine-reinit", Kgt())
    assert plain.first(5) < 0.55 and fresh.first(4) > plain.first(5) + 0.1
    assert fresh.first(4) == fresh.first(8) > 0.7 and plain.first(6) > 0.7
    assert 0.05 < fresh.frozen < plain.frozen


@pytest.mark.parametrize("seed", range(6))
def test_permuted_blocks_change_the_decisions(seed):
    order = list(range(9))
    while order == sorted(order):
        random.Random(seed).shuffle(order)

    def permute(step, key, row):
        return tuple(row[b] for b in (*order, 9))

    assert replay("resnet-cosine", Kgt(), change=permute).moves != replay("resnet-cosine", Kgt()).moves


@pytest.mark.parametrize("name", ["resnet-cosine", "small-warmup-linear"])
@pytest.mark.parametrize("seed", range(6))
def test_the_same_scores_in_another_order_of_time_freeze_nothing(name, seed):
    """All that is left of them is their size; they neither decline nor hang together."""
    records = load(name)["records"]
    others = list(range(8, len(records)))
    random.Random(seed).shuffle(others)
    table = {records[i]["step"]: records[j] for i, j in zip(range(8, len(records)), others, strict=True)}

    def shuffled(step, key, row):
        return table[step][key] if step in table and key in DISTANCES else row

    assert replay(name, Kgt(), change=shuffled).moves == []


@pytest.mark.parametrize("bad", [None, math.nan, math.inf, -math.inf, 0.0])
def test_bad_scores_freeze_nothing(bad):
    def spoil(step, key, row):
        return (bad,) * len(row) if key in DISTANCES else row

    assert replay("resnet-cosine", Kgt(), change=spoil).moves == []


@pytest.mark.parametrize("name", DISTANCES)
def test_one_bad_signal_of_three_freezes_nothing(name):
    def spoil(step, key, row):
        return (math.nan,) * len(row) if key == name else row

    assert replay("resnet-cosine", Kgt(), change=spoil).moves == []


def test_a_block_of_nan_holds_back_all_behind_it():
    def spoil(step, key, row):
        return tuple(math.nan if b == 3 else v for b, v in enumerate(row)) if key in DISTANCES else row

    assert max(frontier for _, frontier in replay("resnet-cosine", Kgt(), change=spoil).moves) == 3


def test_scores_that_end_freeze_nothing_more():
    """The reference died for good at 45 %: what was frozen stays, what was not is never frozen."""

    def dies(step, key, row):
        return (None,) * len(row) if key in (*DISTANCES, "floor") and step > 0.45 * 750 else row

    found = replay("resnet-cosine", Kgt(), change=dies)
    assert all(share <= 0.47 for share, _ in found.moves)


def test_scores_near_their_floor_freeze_nothing():
    def high(step, key, row):
        table = {r["step"]: r for r in load("resnet-cosine")["records"]}
        return tuple(v and v / 2 for v in table[step]["plasticity_4"]) if key == "floor" else row

    assert replay("resnet-cosine", Kgt(), change=high).moves == []


@pytest.mark.parametrize("share", [0.3, 0.5])
def test_evaluations_that_are_dropped_now_and_then_do_little_harm(share):
    noise = random.Random(0)
    dropped = {r["step"] for r in load("resnet-cosine")["records"] if noise.random() < share}

    def lossy(step, key, row):
        return (None,) * len(row) if step in dropped and key != "grad_norm" else row

    assert 0.2 < replay("resnet-cosine", Kgt(), change=lossy).frozen < 0.42


def test_what_does_not_pay_is_not_frozen():
    dear = {"step_seconds": 0.1, "block_seconds": (0.01,) * 9 + (0.0,), "apply_seconds": 100.0}
    assert replay("resnet-cosine", Kgt(), **dear).moves == []
    assert (
        replay("resnet-cosine", Kgt(), **{**dear, "apply_seconds": 0.05}).moves == replay("resnet-cosine", Kgt()).moves
    )


# ---- the other schedules --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length_known", [True, False])
def test_a_constant_high_rate_freezes_nothing(length_known):
    """Every block wanders to the end: in mid-run the front ones had still a twentieth of their way to go, or more."""
    assert replay("small-constant", Kgt(), length_known=length_known).moves == []
    assert still_to_come("small-constant", 0, 0.5) > 0.03 and still_to_come("small-constant", 5, 0.5) > 0.06


def test_a_step_schedule_freezes_after_the_first_drop_and_thaws_at_the_second():
    """Drops at 50 % and 75 %. Before the first the rate is constant, and nothing is still. After it blocks move a tenth as
    far; 5L steps later (.07 of the job) no score compares across the drop, and a window is soon full. At the second drop
    all are lifted, since front blocks may settle once more, and are soon found still again."""
    found = replay("small-step", Kgt())
    moves = found.moves
    assert [frontier for _, frontier in moves if frontier == 0] == [0]
    second = next(m for m in moves if m[1] == 0)
    assert 0.57 < moves[0][0] <= found.first(4) < 0.67
    assert 0.75 <= second[0] < 0.77
    assert moves[-1][0] < 0.88 and moves[-1][1] == 8


def test_what_a_step_schedule_froze_had_little_left_to_do():
    found = replay("small-step", Kgt())
    share, frontier = found.moves[0]
    assert all(still_to_come("small-step", block, share) < 0.03 for block in range(frontier))


def test_warm_up_and_linear_decay_freeze_late():
    """Half-way through a linear decay the rate is higher than under a cosine, and later still more so: at 60 % a front
    block had 2 % of its way to go, where under the cosine it had half of that. Only the first three, whose way is a small
    part of the network's, go sooner."""
    found = replay("small-warmup-linear", Kgt())
    assert found.first(1) > 0.5 and 0.6 < found.first(4) < 0.9 and found.frozen > 0.08
    frontiers = [frontier for _, frontier in found.moves]
    assert frontiers == sorted(frontiers)  # the rise is over before anything is frozen
    assert still_to_come("small-warmup-linear", 3, 0.6) > still_to_come("resnet-cosine", 3, 0.6)


def test_fine_tuning_freezes_the_front_that_hardly_moves_late_and_not_the_deep_end():
    """MiniLM on 20 Newsgroups, 300 steps: from the embeddings to the last layer's output movement grows a hundred
    thousandfold. They and the first layer go two thirds into the job; the last two layers move to the end."""
    found = replay("minilm-warmup-linear", Kgt())
    assert 0.6 < found.first(1) < 0.8 and 0.1 < found.frozen < 0.3
    assert max(frontier for _, frontier in found.moves) <= 5
    before = 0
    for share, frontier in found.moves:
        assert all(still_to_come("minilm-warmup-linear", b, share) < 0.03 for b in range(before, frontier))
        before = frontier


@pytest.mark.parametrize("name", ["text-run-seed1", "text-run-seed2"])
def test_fine_tuning_freezes_embeddings_at_half_and_its_layers_later(name, monkeypatch):
    """MiniLM on 4,000 texts, 750 steps. The embeddings owe a hundred-thousandth of the network's movement; of the layers
    the first owes a third of its own way then, though that is a thousandth of the network's."""
    found = replay(name, Kgt())
    assert 0.5 < found.first(1) < 0.55 and 0.6 < found.first(2) <= found.first(3) < 0.76
    assert found.first(4) > 0.75 and found.first(5) > 0.82
    monkeypatch.setattr(kgt, "OWN", math.inf)
    assert replay(name, Kgt()).frozen > found.frozen + 0.01


def test_the_embeddings_are_seen_though_their_nearest_scores_drown_in_the_floor():
    """S(L) is under three floors at many evaluations at which S(4L) is not. Steady movement is assumed then."""
    records = load("text-run-seed2")["records"]
    first = [[r[name][0] or 0.0 for name in ("plasticity", "plasticity_4", "floor")] for r in records]
    assert sum(near < 3 * floor <= far for near, far, floor in first) > 10
    decisions = replay("text-run-seed2", Kgt()).decisions
    assert {d.numbers["exponent"][0] for step, d in decisions if 0.45 < step / 750 < 0.55} == {2.0}


def test_what_wanders_at_the_end_of_a_cosine_that_restarts_may_owe_a_quarter(monkeypatch):
    """With the whole of the tolerance four blocks would have been frozen at the end of the first cosine."""
    most = max(frontier for _, frontier in replay("small-cyclic", Kgt()).moves)
    monkeypatch.setattr(kgt, "WANDERING", 1.0)
    assert most == 1 and max(frontier for _, frontier in replay("small-cyclic", Kgt()).moves) == 4


def test_warm_restarts_thaw_and_end_the_trust_in_low_rates():
    """Three cosines. The end of the first looks like the end of training; the restart shows that it was not, and lifts
    everything before the rate does harm. The end of the second is no longer taken for one."""
    moves = replay("small-cyclic", Kgt()).moves
    assert moves[0][0] > 0.25 and any(0.32 < share < 0.36 and frontier == 0 for share, frontier in moves)
    assert not any(0.36 < share < 0.8 for share, _ in moves)  # where the second cosine ends


@pytest.mark.parametrize(
    "name", ["resnet-cosine", "small-constant", "small-step", "small-warmup-linear", "small-cyclic"]
)
def test_noise_in_place_of_scores_freezes_nothing_under_any_schedule(name):
    noise = random.Random(name)

    def replaced(step, key, row):
        return tuple(v and noise.lognormvariate(-9, 1.0) for v in row) if key in DISTANCES else row

    assert replay(name, Kgt(), change=replaced).moves == []


# ---- the peers on the same scores -----------------------------------------------------------------------------------


def test_the_papers_rule_thaws_late_under_a_cosine_where_kgt_does_not():
    """When the rate is down to a tenth of that at the first freeze, it lifts everything, just when freezing pays most."""
    moves = replay("resnet-cosine", parse_policy("kgt-paper")).moves
    assert any(frontier == 0 and share > 0.7 for share, frontier in moves)


def test_the_papers_rule_freezes_at_a_constant_rate_too():
    """The slope of what no longer falls is flat, however much it moves."""
    assert replay("small-constant", parse_policy("kgt-paper")).moves
    assert replay("small-constant", Kgt()).moves == []
