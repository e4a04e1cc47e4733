"""About 150 decisions a job, also where its length is learned on the way or never."""

from __future__ import annotations

import pytest

from kgt_ddp.cadence import coarser, interval_for


@pytest.mark.parametrize(("total", "interval"), [(None, 10), (60, 3), (450, 3), (1_500, 10), (4_680, 31), (10**6, 50)])
def test_a_known_length_gives_the_interval(total, interval):
    assert interval_for(total) == interval


def test_a_length_that_is_learned_makes_it_a_multiple():
    assert coarser(10, 30, 4_680) == 30
    assert coarser(10, 30, 100_000) == 50
    assert coarser(10, 30, 1_500) == 10
    assert coarser(10, 30, 300) == 10, "never shorter: the reference would have nothing to compare"


def test_late_in_the_job_it_stays():
    assert coarser(10, 1_200, 4_680) == 10


def test_of_a_job_of_unknown_length_as_much_is_to_come_as_there_was():
    assert [coarser(10, step, None) for step in (0, 100, 1_499, 1_500)] == [10, 10, 10, 20]
    assert coarser(20, 2_999, None) == 20
    assert coarser(20, 3_000, None) == 40
    assert coarser(40, 10**6, None) == 40
