"""The mean that a block is put to as it freezes: what it is the mean of, when it begins anew, what it leaves alone."""

from __future__ import annotations

import copy
import logging

import pytest
import torch

from kgt_ddp import weight_mean
from kgt_ddp.blocks import Blocks
from kgt_ddp.weight_mean import WeightMean
from tests.kgt_ddp.networks import SmallResNet

RATE = 0.1


def followed(share=0.1, **kinds):
    torch.manual_seed(0)
    model = SmallResNet().to(**kinds) if kinds else SmallResNet()
    blocks = Blocks(model)
    return model, blocks, WeightMean(blocks, share)


def fill(model, value):
    """Every parameter and every floating buffer."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.fill_(value)


def run(model, mean, values, *, rate=lambda step: RATE):
    """`values[step]` is what all weights are after that step."""
    for step in values:
        fill(model, values[step])
        mean.note(step, lambda step=step: rate(step))


def put(blocks, mean, frontier):
    """Freeze; what stands still then, by name."""
    old = blocks.frontier
    blocks.move_to(frontier)
    mean.moved_from(old)
    return {name: tensor.detach() for name, tensor in blocks.tensors_at(frontier).items()}


def test_what_is_not_put_to_its_mean_stays_and_its_mean_is_given_up():
    model, blocks, mean = followed()
    run(model, mean, {10: 1.0, 20: 2.0})
    blocks.move_to(1)
    assert mean.moved_from(0, put=False) == []
    blocks.move_to(2)
    assert only_value(model.blocks[0].conv.weight) == 2.0
    mean.moved_from(1)
    assert only_value(model.blocks[0].conv.weight) == 2.0 > only_value(model.blocks[1].conv.weight)


def only_value(tensor):
    assert bool((tensor == tensor.flatten()[0]).all())
    return tensor.flatten()[0].item()


def test_a_sample_counts_by_the_stretch_of_training_that_it_stands_for():
    model, blocks, mean = followed(share=0.25)
    run(model, mean, {10: 1.0, 20: 5.0, 30: 2.0})
    # The integral of s³ over (0, 10], (10, 20] and (20, 30], over that of (0, 30].
    expected = (1.0 * 10**4 + 5.0 * (20**4 - 10**4) + 2.0 * (30**4 - 20**4)) / 30**4
    assert only_value(put(blocks, mean, 1)["blocks.0.conv.weight"]) == pytest.approx(expected)


@pytest.mark.parametrize("steps", [500, 5000])
def test_its_age_is_the_share_of_the_steps_so_far_however_long_the_job(steps):
    model, blocks, mean = followed(share=0.1)
    run(model, mean, {step: float(step) for step in range(1, steps + 1)})
    age = steps - only_value(put(blocks, mean, 1)["blocks.0.conv.weight"])
    assert 0.07 < age / steps < 0.1  # 1/11, and samples stand for the steps before them


def test_a_long_job_is_sampled_less_often():
    asked = []
    model, _, mean = followed(share=0.1)
    for step in range(1, 20_001):
        mean.note(step, lambda step=step: asked.append(step) or RATE)
    assert asked[:3] == [10, 20, 30]
    assert asked[-1] - asked[-2] == pytest.approx(0.1 * 20_000 / 20, rel=0.1)


def test_statistics_of_a_norm_belong_to_its_weights_and_other_buffers_stay():
    model, blocks, mean = followed()
    model.blocks[0].register_buffer("direction", torch.zeros(3))
    blocks = Blocks(model)
    mean = WeightMean(blocks, 0.1)
    run(model, mean, {10: 1.0, 20: 3.0})
    model.blocks[0].norm.num_batches_tracked.fill_(7)
    found = put(blocks, mean, 2)
    weight = only_value(found["blocks.0.conv.weight"])
    assert 1.0 < weight < 3.0
    assert only_value(found["blocks.0.norm.running_var"]) == pytest.approx(weight)
    assert only_value(found["blocks.0.direction"]) == 3.0
    assert int(found["blocks.0.norm.num_batches_tracked"]) == 7


def test_only_what_freezes_is_written():
    model, blocks, mean = followed()
    run(model, mean, {10: 1.0, 20: 3.0})
    put(blocks, mean, 2)
    assert only_value(model.blocks[2].conv.weight) == 3.0
    assert only_value(model.head.weight) == 3.0
    run(model, mean, {30: 9.0})  # the frozen ones too are overwritten here, and must be left so
    put(blocks, mean, 3)
    assert only_value(model.blocks[0].conv.weight) == 9.0
    assert 3.0 < only_value(model.blocks[2].conv.weight) < 9.0


def test_what_the_user_froze_and_what_an_active_block_shares_are_left_alone():
    torch.manual_seed(0)
    model = SmallResNet()
    model.blocks[0].conv.weight.requires_grad_(False)
    blocks = Blocks(model)
    blocks.blocks[0].shared["blocks.0.norm.weight"] = len(blocks) - 1
    mean = WeightMean(blocks, 0.1)
    run(model, mean, {10: 1.0, 20: 3.0})
    put(blocks, mean, blocks.max_frontier - 1)
    assert only_value(model.blocks[0].conv.weight) == 3.0
    assert only_value(model.blocks[0].norm.weight) == 3.0
    assert only_value(model.blocks[0].norm.bias) < 3.0


def jitter(steps, low, high):
    """Weights after every tenth step: one, then the other."""
    return {step: high if step // 10 % 2 else low for step in range(10, steps + 1, 10)}


def test_small_steps_of_half_precision_weights_are_not_lost():
    model, blocks, mean = followed(dtype=torch.bfloat16)
    run(model, mean, jitter(2000, 1.0, 1.0 + 1 / 64))
    # In bf16 a weight of 1 does not move by less than 1/128 at a time, and a sample moves the mean by much less.
    assert only_value(put(blocks, mean, 1)["blocks.0.conv.weight"]) == pytest.approx(1.0 + 1 / 128, abs=1 / 256)


@pytest.mark.parametrize("later", [RATE / 10, RATE * 4])
def test_it_begins_anew_where_the_rate_drops_abruptly_or_rises(later):
    model, blocks, mean = followed()
    values = dict.fromkeys(range(10, 1001, 10), 1.0) | dict.fromkeys(range(1010, 1041, 10), 2.0)
    run(model, mean, values, rate=lambda step: RATE if step <= 1000 else later)
    assert only_value(put(blocks, mean, 1)["blocks.0.conv.weight"]) == pytest.approx(2.0)


def test_it_goes_on_where_the_rate_falls_smoothly():
    model, blocks, mean = followed()
    run(model, mean, jitter(900, 1.0, 2.0), rate=lambda step: RATE * (1 - step / 1000))
    assert only_value(put(blocks, mean, 1)["blocks.0.conv.weight"]) == pytest.approx(1.5, abs=0.1)


def test_weights_that_were_not_finite_are_no_place_to_be(caplog):
    model, blocks, mean = followed()
    run(model, mean, {10: 1.0, 20: float("nan"), 30: 3.0})
    with caplog.at_level(logging.INFO):
        found = put(blocks, mean, 2)
    assert only_value(found["blocks.0.conv.weight"]) == 3.0
    assert "blocks.0 freezes as it is" in caplog.text


@pytest.mark.parametrize("since", [1, 10, 30, 60])
def test_a_block_that_was_written_to_freezes_as_it_is_and_the_others_at_their_mean(since, caplog):
    """Also by way of `.data`, which torch's count of writes does not tell of."""
    model, blocks, mean = followed()
    values = jitter(1500, 1.0, 1.2)
    for step, value in values.items():
        fill(model, value)
        if step > 1500 - 10 * since:
            for parameter in model.blocks[1].parameters():
                parameter.data.add_(5.0)
        mean.note(step, lambda: RATE)
    with caplog.at_level(logging.INFO):
        found = put(blocks, mean, 3)
    last = values[1500]
    assert only_value(found["blocks.1.conv.weight"]) == pytest.approx(last + 5.0)
    assert only_value(found["blocks.1.norm.running_var"]) == pytest.approx(last)
    for block in (0, 2):
        assert only_value(found[f"blocks.{block}.conv.weight"]) == pytest.approx(1.1, abs=0.03)
    assert caplog.text.count("freezes as it is") == 1


def test_what_was_written_long_ago_is_forgotten():
    model, blocks, mean = followed()
    run(model, mean, {step: value + 5.0 * (step > 600) for step, value in jitter(1900, 1.0, 1.2).items()})
    assert only_value(put(blocks, mean, 1)["blocks.0.conv.weight"]) == pytest.approx(6.1, abs=0.03)


def test_before_the_first_sample_blocks_stay_as_they_are():
    model, blocks, mean = followed()
    run(model, mean, {1: 2.0, 2: 3.0})
    assert only_value(put(blocks, mean, 1)["blocks.0.conv.weight"]) == 3.0


def test_a_weight_that_changed_its_shape_is_followed_from_then_on():
    model, blocks, mean = followed()
    run(model, mean, {10: 1.0})
    model.blocks[0].conv.weight.data = torch.zeros(4, 8, 3, 3)
    run(model, mean, {20: 2.0})
    found = put(blocks, mean, 2)
    assert only_value(found["blocks.0.conv.weight"]) == 2.0
    assert 1.0 < only_value(found["blocks.0.norm.weight"]) < 2.0


def test_it_is_the_same_whether_blocks_are_sampled_together_or_one_by_one(monkeypatch):
    ends = []
    for num_bytes in (weight_mean.AT_ONCE, 3000, 0):
        monkeypatch.setattr(weight_mean, "AT_ONCE", num_bytes)
        model, blocks, mean = followed()
        torch.manual_seed(1)
        for step in range(10, 60, 10):
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(torch.randn_like(p))
            mean.note(step, lambda: RATE)
        ends.append((mean.state_dict()["distances"], put(blocks, mean, 3)))
    (distances, weights), *others = ends
    assert all(len(some) == 4 and min(some) > 0 for some in distances.values())
    for other_distances, other_weights in others:
        assert other_distances == distances
        assert all(torch.equal(other_weights[name], weights[name]) for name in weights)


def test_a_buffer_that_was_replaced_is_followed():
    model, blocks, mean = followed()
    run(model, mean, {10: 1.0})
    model.blocks[0].norm.running_var = torch.zeros_like(model.blocks[0].norm.running_var)
    run(model, mean, {20: 3.0})
    assert 1.0 < only_value(put(blocks, mean, 2)["blocks.0.norm.running_var"]) < 3.0


def test_a_norm_that_gives_up_its_statistics_keeps_the_mean_of_its_weights():
    model, blocks, mean = followed()
    run(model, mean, {10: 1.0})
    norm = model.blocks[0].norm
    norm.track_running_stats, norm.running_mean, norm.running_var = False, None, None
    run(model, mean, {20: 3.0})
    assert 1.0 < only_value(put(blocks, mean, 2)["blocks.0.norm.weight"]) < 3.0


def test_a_saved_mean_goes_on_with_the_same_bits_and_is_not_written_to_any_more():
    model, blocks, mean = followed()
    run(model, mean, {10: 1.0, 20: 2.0, 30: 3.1})
    state = mean.state_dict()
    kept = copy.deepcopy(state)
    run(model, mean, {40: 4.7, 50: 0.3})
    other_model, other_blocks, other = followed()
    other.load_state_dict(state)
    run(other_model, other, {40: 4.7, 50: 0.3})
    ours, theirs = put(blocks, mean, 3), put(other_blocks, other, 3)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert state["distances"] == kept["distances"]
    assert state["means"].keys() == kept["means"].keys()
    assert all(torch.equal(state["means"][name], kept["means"][name]) for name in kept["means"])
