"""About 150 decisions a job, also where its length is learned on the way or never."""

from __future__ import annotations

import pytest

from kgt_ddp.cadence import affordable, coarser, interval_for


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


def slow(interval: int, *, passed_s: float = 0.0, cpu_s: float = 0.0, step: int = 50, total: int | None = 4_680) -> int:
    costs = {"passed_s": passed_s, "cpu_s": cpu_s, "num_cores": 2.0}
    return affordable(interval, step_s=0.5, step=step, total_steps=total, **costs)


def test_a_reference_that_is_fast_and_cheap_changes_nothing():
    assert slow(31, passed_s=1.0, cpu_s=0.1) == 31


def test_one_that_could_not_follow_is_asked_less_often():
    """31 steps of half a second are 15.5 s; an answer may take two thirds of an interval."""
    assert slow(31, passed_s=10.3) == 31
    assert slow(31, passed_s=15.0) == 62
    assert slow(31, passed_s=25.0, total=7_000) == 93


def test_one_that_would_cost_more_than_its_budget_too():
    """A hundredth of two cores over 31 steps of half a second is 0.31 s."""
    assert slow(31, cpu_s=0.31) == 31
    assert slow(31, cpu_s=0.36) == 31, "a fifth over it is borne"
    assert slow(31, cpu_s=0.5) == 62


def test_a_job_keeps_75_decisions_and_late_in_it_the_interval():
    assert slow(31, passed_s=1e3) == 62
    assert slow(3, passed_s=1e3, total=450) == 6
    assert slow(31, passed_s=25.0, step=2_000) == 31
    assert slow(10, passed_s=25.0, step=100, total=None) == 10
    assert slow(10, passed_s=25.0, step=1_000, total=None) == 20
