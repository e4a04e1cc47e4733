from __future__ import annotations

import json
import math

import pytest

from kgt_ddp.policies.gradnorm import GradNorm, first_at_or_above_median, relative_changes
from tests.kgt_ddp.policies.drive import drive, frontiers

# Two decisions an interval: 5 intervals of 20 steps, a decision every 10.
BY_HAND = [
    [5.0, 10.0, 10.0, 20.0],  # step 0: the job begins; its norms count for the first interval
    [5.0, 10.0, 10.0, 20.0],
    [0.0, 0.0, 0.0, 0.0],  # step 20, interval 1: 10, 20, 20, 40. Nothing to compare with yet
    [4.5, 7.0, 9.0, 30.0],
    [4.5, 7.0, 9.0, 30.0],  # step 40, interval 2: 9, 14, 18, 60. Changes .1, .3, .1, .5; median .2: block 1 is first
    [None, 6.0, 8.0, 30.0],
    [None, 6.0, 8.0, 30.0],  # step 60, interval 3: 12, 16, 60. Changes 1/7, 1/9, 0; median 1/9: block 1 is first again
    [None, 6.1, 4.0, 10.0],
    [None, 6.1, 4.0, 10.0],  # step 80, interval 4: 12.2, 8, 20. Changes 1/60, 1/2, 2/3; median 1/2: block 2 is first
]


def run(rows, **options):
    return drive(GradNorm(intervals=5), {"grad_norm": rows}, total_steps=100, **options)


def test_it_decides_as_reckoned_by_hand():
    decisions = run(BY_HAND)
    assert frontiers(decisions) == [0, 0, 0, 0, 1, 1, 1, 1, 2]
    assert decisions[4].numbers == {"changes": [0.1, 0.3, 0.1, 0.5]}
    assert decisions[8].numbers == {"changes": [None, 0.0167, 0.5, 0.6667]}


def test_the_change_is_relative_to_the_interval_before():
    assert relative_changes([2.0, 4.0, 0.0, None], [1.0, 5.0, 1.0, 1.0]) == [0.5, 0.25, None, None]


@pytest.mark.parametrize(
    ("changes", "frontier", "expected"),
    [
        ([0.5, 0.1, 0.1, 0.1], 0, 0),  # the first block changes most: nothing
        ([0.1, 0.2, 0.9, 0.3], 0, 2),  # median .25
        ([0.2, 0.2, 0.2, 0.2], 0, 0),  # at the median is not below it
        ([None, 0.1, 0.9, 0.3], 0, 0),  # an unknown block stops it
        ([None, 0.1, 0.9, 0.3], 1, 2),  # frozen blocks have no gradient, and no say in the median
        ([None, None, None, 0.3], 3, 3),  # a single block left
    ],
)
def test_blocks_in_front_of_the_first_at_or_above_the_median_are_frozen(changes, frontier, expected):
    assert first_at_or_above_median(changes, frontier) == expected


@pytest.mark.parametrize("bad", [None, math.nan, math.inf])
def test_a_norm_that_is_not_known_stops_at_its_block(bad):
    rows = [list(row) for row in BY_HAND]
    rows[3][0] = bad
    assert frontiers(run(rows))[4] == 0


def test_without_the_jobs_length_intervals_have_a_fixed_one():
    rows = [[1.0 + i % 20 / 100, 2.0 + i, 3.0] for i in range(45)]
    changes = [d for d in drive(GradNorm(), {"grad_norm": rows}) if d.numbers]
    assert len(changes) == 1  # the first comparison is at step 400


def test_it_goes_on_from_its_state():
    first, second = GradNorm(intervals=5), GradNorm(intervals=5)
    drive(first, {"grad_norm": BY_HAND[:4]}, total_steps=100)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert drive(second, {"grad_norm": BY_HAND[4:]}, total_steps=100, start=40) == run(BY_HAND)[4:]
