"""Whether samples come again is seen before anything is frozen, from a few of them, and the gate heeds it."""

from __future__ import annotations

import pytest
import torch

from kgt_ddp.activation_cache.repeats import ONE_IN, RepeatWatch
from tests.kgt_ddp.activation_cache.jobs import job
from tests.kgt_ddp.networks import SmallResNet


def data(samples=2_000, *, seed=0):
    return torch.randn(samples, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def epochs(watch, samples, count, *, change=lambda x, epoch: x, batch=50):
    for epoch in range(count):
        order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(epoch))
        for start in range(0, len(order), batch):
            watch.note((change(samples[order[start : start + batch]], epoch),), {})


def test_a_shuffled_data_set_repeats_after_an_epoch():
    watch = RepeatWatch()
    epochs(watch, data(), 1)
    assert watch.period is None and watch.share == 0.0 and watch.in_vain(1_000)
    epochs(watch, data(), 2)
    assert watch.share > 0.6 and not watch.in_vain(1_000)
    assert 1_800 < watch.period < 2_200
    assert 1_950 < watch.epoch < 2_100


def test_augmented_samples_do_not_repeat():
    watch = RepeatWatch()
    g = torch.Generator().manual_seed(5)
    epochs(watch, data(), 4, change=lambda x, epoch: x + 1e-3 * torch.randn(x.shape, generator=g))
    assert watch.num_samples == 8_000 and watch.in_vain(8_000) and not watch.in_vain(9_000)


def test_one_rank_of_four_sees_a_quarter_of_its_samples_again():
    watch, samples = RepeatWatch(world_size=4), data(8_000)
    for epoch in range(3):
        order = torch.randperm(8_000, generator=torch.Generator().manual_seed(epoch))[:2_000]
        for start in range(0, 2_000, 50):
            watch.note((samples[order[start : start + 50]],), {})
    assert 0.1 < watch.share < 0.6 and not watch.in_vain(1_000)
    assert 1_900 < watch.epoch < 2_600, "the rank's own part, however rarely it sees a sample again"


def test_a_few_twins_are_no_new_epoch():
    watch, samples = RepeatWatch(), data(8_000)
    samples[::100] = samples[1::100]
    epochs(watch, samples, 1)
    assert watch.share > 0 and watch.epoch is None
    epochs(watch, samples, 1)
    assert 7_400 < watch.epoch < 8_200


def test_texts_are_told_apart_whatever_they_are_padded_to():
    watch = RepeatWatch()
    ids = torch.randint(1, 30_000, (1_000, 24), generator=torch.Generator().manual_seed(3))
    watch.note((), {"input_ids": ids})
    watch.note((), {"input_ids": torch.nn.functional.pad(ids, (0, 9))})
    assert watch.share == 0.5 and watch.period == 1_000


def test_it_remembers_a_few_and_no_more_than_it_may():
    watch = RepeatWatch(most=20)
    epochs(watch, data(), 1)
    assert len(watch._last) == 20
    watch = RepeatWatch()
    epochs(watch, data(), 1)
    assert 0.5 < len(watch._last) / (2_000 / ONE_IN) < 1.5


def test_what_has_no_rows_or_lies_on_a_device_is_not_watched():
    watch = RepeatWatch()
    watch.note((torch.randn(()), "text"), {"flag": True})
    watch.note((torch.randn(4, 3, device="meta"),), {})
    assert watch.num_samples == 0 and not watch.in_vain(0)


def test_augmented_data_never_opens_a_file_once_something_freezes(tmp_path):
    g = torch.Generator().manual_seed(4)
    batches = [((torch.randn(16, 1, 8, 8, generator=g),), {}) for _ in range(40)]
    with job(SmallResNet, batches[0], 0, tmp_path, mode="auto", patience=400) as made:
        made.epochs(batches[:30], 1)
        made.blocks.move_to(2)
        made.epochs(batches[30:], 1)
        assert made.cache.state == "closed"
        assert made.cache.counters.batches == 0 and made.cache.summary()["bytes_written"] == 0
        assert "had come before" in made.cache._session.gate.reason


def test_data_that_is_known_to_repeat_is_given_an_epoch_and_a_half(tmp_path):
    g = torch.Generator().manual_seed(4)
    batches = [((torch.randn(16, 1, 8, 8, generator=g),), {}) for _ in range(40)]
    with job(SmallResNet, batches[0], 0, tmp_path, mode="auto", patience=100) as made:
        made.epochs(batches, 2)
        made.blocks.move_to(2)
        made.step(batches[0])
        assert made.cache.state == "trying" and 960 <= made.cache._session.gate._patience < 1_000


@pytest.mark.parametrize("known_in_vain", [False, True])
def test_a_gate_that_was_closed_in_a_long_first_epoch_begins_again_once_samples_come_again(known_in_vain, tmp_path):
    """Closed by its patience, or from the start, as the first half of an epoch holds nothing twice."""
    samples = data(640).split(16)
    with job(SmallResNet, ((samples[0],), {}), 0 if known_in_vain else 2, tmp_path, mode="auto", patience=200) as made:
        states = []
        for epoch in range(5):
            for step, i in enumerate(torch.randperm(40, generator=torch.Generator().manual_seed(epoch)).tolist()):
                if (epoch, step) == (0, 20):
                    made.blocks.move_to(2)
                made.step(((samples[i],), {}))
                if made.cache._session is not None:
                    made.cache._session.gate.computed(16, 10.0)  # a prefix that it would pay to skip
            made.cache.drain()
            states.append(made.cache.state)
        assert states[0] == "closed" and states[1] == "trying" and states[3:] == ["open"] * 2
        assert made.cache.counters.full_batches > 40


def test_a_gate_begins_again_once_and_not_over_augmented_data(tmp_path):
    g = torch.Generator().manual_seed(4)
    new = [((torch.randn(16, 1, 8, 8, generator=g),), {}) for _ in range(200)]
    with job(SmallResNet, new[0], 2, tmp_path, mode="auto", patience=200) as made:
        made.cache._session_now().gate.computed(16, 10.0)
        made.epochs(new[:80], 1)
        assert made.cache.state == "closed" and not made.cache._began_again
        made.epochs(new[40:80], 1)
        assert made.cache._began_again
        made.epochs(new[80:], 1)
        made.epochs(new[190:], 2)
        assert made.cache.state == "closed", "it stays closed but for short tries"
