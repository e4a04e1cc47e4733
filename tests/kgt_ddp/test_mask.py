from __future__ import annotations

import pytest

from kgt_ddp.mask import Mask


def test_a_mask_survives_encoding():
    mask = Mask(2, 5, generation=7)
    assert mask.encode() == [1, 1, 0, 0, 0]
    assert Mask.decode(mask.encode(), 7) == mask


def test_how_a_mask_freezes_is_no_part_of_what_is_frozen():
    assert Mask(1, 4).moved_to(2, at_mean=True).at_mean and not Mask(1, 4).moved_to(2).at_mean
    assert Mask(1, 4).moved_to(2, at_mean=True) == Mask(1, 4).moved_to(2)


def test_only_prefixes_are_masks():
    with pytest.raises(ValueError, match="not a prefix"):
        Mask.decode([1, 0, 1, 0], 1)


@pytest.mark.parametrize("frontier", [-1, 5, 6])
def test_the_last_block_always_trains(frontier):
    with pytest.raises(ValueError, match="0 to 4 of 5 blocks"):
        Mask(frontier, 5)


def test_a_moved_mask_is_one_generation_on():
    assert Mask(1, 4, 3).moved_to(0) == Mask(0, 4, 4)
