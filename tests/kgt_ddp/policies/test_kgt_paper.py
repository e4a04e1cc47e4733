from __future__ import annotations

import json
import math

from kgt_ddp.policies.kgt_paper import KgtPaper
from tests.kgt_ddp.policies.drive import drive, frontiers


def decaying(*scales, count=120, floor=1e-6):
    """One column a block: it falls to a tenth in `scale` evaluations."""
    return [[10 ** (-i / scale) + floor for scale in scales] for i in range(count)]


def test_blocks_are_frozen_one_at_a_time_from_the_front_as_their_slopes_flatten():
    found = frontiers(drive(KgtPaper(window=5), {"plasticity": decaying(10, 20, 30)}))
    assert found[0] == 0 and found[-1] == 2  # the last block always trains
    assert all(now - before in (0, 1) for before, now in zip(found, found[1:], strict=False))
    assert 10 < found.index(1) < found.index(2)


def test_nothing_is_judged_while_the_loss_still_falls():
    rows = decaying(5, 5, count=60)
    falling = [0.9**i for i in range(60)]
    assert set(frontiers(drive(KgtPaper(window=5), {"plasticity": rows}, loss=falling))) == {0}
    flat = [0.9 ** min(i, 20) for i in range(60)]
    assert frontiers(drive(KgtPaper(window=5), {"plasticity": rows}, loss=flat))[-1] == 1


def test_a_loss_that_is_reported_now_and_then_is_one_that_is_reported():
    rows = decaying(5, 5, count=60)
    falling = [None if i % 10 else 0.9**i for i in range(60)]
    assert set(frontiers(drive(KgtPaper(window=5), {"plasticity": rows}, loss=falling))) == {0}


def test_constant_scores_freeze_nothing():
    assert set(frontiers(drive(KgtPaper(window=5), {"plasticity": [[1.0, 2.0, 3.0]] * 100}))) == {0}


def test_an_unknown_score_begins_the_wait_anew():
    rows = decaying(10, 20)
    plain = frontiers(drive(KgtPaper(window=5), {"plasticity": rows})).index(1)
    for bad in (None, math.nan, math.inf):
        rows[plain - 1][0] = bad
        assert frontiers(drive(KgtPaper(window=5), {"plasticity": rows})).index(1) > plain


def test_at_a_tenth_of_the_learning_rate_everything_thaws_and_freezes_again_in_half_the_time():
    rows = decaying(10, 20)
    rates = [1.0] * 60 + [0.1] * 60
    found = frontiers(drive(KgtPaper(window=6), {"plasticity": rows}, learning_rate=rates))
    assert found[59] == 1 and found[60] == 0
    assert found[61:].index(1) + 1 == 3


def test_it_goes_on_from_its_state():
    rows = decaying(10, 20, 30)
    first, second = KgtPaper(window=5), KgtPaper(window=5)
    drive(first, {"plasticity": rows[:15]})
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    expected = drive(KgtPaper(window=5), {"plasticity": rows})[15:]
    assert drive(second, {"plasticity": rows[15:]}, start=150) == expected
