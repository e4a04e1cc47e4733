from __future__ import annotations

import pytest

from kgt_ddp.policies.cost import job_steps, pays, saving_s, steps_to_come
from kgt_ddp.policies.policy import Observation


def seen(**facts):
    given = {"step": 398, "apply_step": 400, "total_steps": 1000, "num_blocks": 4, "frontier": 1}
    return Observation(**{**given, **facts})


def test_of_a_job_of_unknown_length_as_much_is_to_come_as_was_done():
    assert steps_to_come(seen()) == 600 and job_steps(seen()) == 1000
    assert steps_to_come(seen(total_steps=None)) == 400 and job_steps(seen(total_steps=None)) == 800
    assert steps_to_come(seen(total_steps=300)) == 0


def test_what_is_saved_counts_the_blocks_between_the_frontiers():
    assert saving_s(seen(block_seconds=(9.0, 0.1, 0.2, 9.0)), 3) == pytest.approx(0.3 * 600)
    assert saving_s(seen(), 3) is None


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({}, True),  # nothing measured: nothing stands in the way
        ({"block_seconds": (0.1,) * 4}, True),
        ({"block_seconds": (0.1,) * 4, "apply_seconds": 10.0}, True),
        ({"block_seconds": (0.1,) * 4, "apply_seconds": 90.0}, False),  # 120 s saved for 90 s spent is no safe bet
        ({"block_seconds": (0.0,) * 4}, False),  # front blocks that cost nothing, an embedding that was frozen by hand
        ({"total_steps": 400}, False),  # at the end
    ],
)
def test_a_change_must_pay_twice_its_cost(facts, expected):
    assert pays(seen(**facts), 3) is expected
