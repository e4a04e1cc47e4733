"""The job's length as learned from the schedulers that people write."""

from __future__ import annotations

import functools
import gc
import json

import pytest
import torch
from torch.optim import lr_scheduler as lr

from kgt_ddp.job_length import JobLength, find_schedulers, moves_to_end
from kgtrun.contract.events import EventWriter, read_events

SILENT = EventWriter.for_process(None, role="trainer", index=0)


def sgd():
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)


def drive(optimizer, scheduler, *, steps, every=1, times=1, skipped=(), length=None, first=0):
    """A training loop: `scheduler` moves `times` after every `every` steps; skipped steps are those of a scaler."""
    length = length or JobLength(None, SILENT)
    done, told = first, []
    for turn in range(first, steps):
        if turn not in skipped:
            optimizer.step()
            done += 1
            length.step_ended(done)
            if done % 10 == 2:
                length.look([optimizer], done)
        if (turn + 1) % every == 0:
            for _ in range(times):
                scheduler.step()
        told.append(length.total_steps)
    return told


def named(step, *, num_warmup_steps, num_training_steps):
    return max(0.0, 1 - step / num_training_steps)


def closure(num_training_steps):
    return lambda step: max(0.0, 1 - step / num_training_steps)


SCHEDULERS = {
    "cosine": lambda o: lr.CosineAnnealingLR(o, T_max=300),
    "one cycle": lambda o: lr.OneCycleLR(o, max_lr=0.1, total_steps=300),
    "one cycle by epochs": lambda o: lr.OneCycleLR(o, max_lr=0.1, epochs=3, steps_per_epoch=100),
    "linear": lambda o: lr.LinearLR(o, 1.0, 0.01, total_iters=300),
    "polynomial": lambda o: lr.PolynomialLR(o, total_iters=300),
    "partial": lambda o: lr.LambdaLR(o, functools.partial(named, num_warmup_steps=5, num_training_steps=300)),
    "closure": lambda o: lr.LambdaLR(o, closure(300)),
    "sequence": lambda o: lr.SequentialLR(
        o, [lr.LinearLR(o, 0.1, total_iters=20), lr.CosineAnnealingLR(o, 280)], milestones=[20]
    ),
    "chain": lambda o: lr.ChainedScheduler([lr.LinearLR(o, 0.1, total_iters=20), lr.CosineAnnealingLR(o, 300)]),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.filterwarnings("ignore:The epoch parameter")
def test_a_schedule_that_moves_every_step_says_how_long_the_job_is(name):
    optimizer = sgd()
    scheduler = SCHEDULERS[name](optimizer)
    told = drive(optimizer, scheduler, steps=60)
    assert told[10] is None, "its unit is not known yet"
    assert told[30:] == [300] * 30


@pytest.mark.parametrize(
    "make",
    [
        lambda o: lr.StepLR(o, 30),
        lambda o: lr.MultiStepLR(o, [30, 60]),
        lambda o: lr.ExponentialLR(o, 0.99),
        lambda o: lr.LinearLR(o, 0.1, 1.0, total_iters=300),
        lambda o: lr.ConstantLR(o, 0.1, total_iters=300),
        lambda o: lr.CosineAnnealingWarmRestarts(o, T_0=300),
        lambda o: lr.CyclicLR(o, 0.01, 0.1),
        lambda o: lr.LambdaLR(o, lambda step: 0.99**step),
        lambda o: lr.SequentialLR(o, [lr.ConstantLR(o), lr.ExponentialLR(o, 0.9)], milestones=[10]),
        lambda o: lr.ChainedScheduler([lr.CosineAnnealingLR(o, 100), lr.PolynomialLR(o, 200)]),
    ],
)
def test_a_schedule_without_an_end_says_nothing(make):
    optimizer = sgd()
    assert moves_to_end(scheduler := make(optimizer)) is None
    if not isinstance(scheduler, lr.ChainedScheduler):
        assert drive(optimizer, scheduler, steps=40)[-1] is None


def test_transformers_schedules_are_read():
    transformers = pytest.importorskip("transformers")
    for name in ("get_linear_schedule_with_warmup", "get_cosine_schedule_with_warmup"):
        scheduler = getattr(transformers, name)(sgd(), num_warmup_steps=10, num_training_steps=300)
        assert moves_to_end(scheduler) == (300.0, "LambdaLR.num_training_steps=300")


@pytest.mark.parametrize(
    ("moves", "every", "times", "known_by"),
    [
        (5, 60, 1, 125),  # once an epoch: after two epochs
        (60, 5, 1, 40),
        (1200, 1, 4, 30),  # once a micro-batch, or once for every rank, as accelerate does
    ],
)
def test_the_unit_of_the_schedule_is_observed(moves, every, times, known_by):
    optimizer = sgd()
    told = drive(optimizer, lr.CosineAnnealingLR(optimizer, moves), steps=200, every=every, times=times)
    assert told[known_by:] == [300] * (200 - known_by)
    assert not any(told[: min(every, 20)])


def test_fractions_of_epochs_are_positions_too():
    optimizer, length = sgd(), JobLength(None, SILENT)
    scheduler = lr.CosineAnnealingLR(optimizer, 6)
    for step in range(1, 50):
        optimizer.step()
        length.step_ended(step)
        if step == 2:
            length.look([optimizer], step)
        with pytest.warns(UserWarning, match="epoch"):
            scheduler.step(step / 50)
    assert length.total_steps == 300


@pytest.mark.filterwarnings("ignore:Detected call of")
def test_steps_that_a_scaler_skips_do_not_change_the_unit():
    optimizer = sgd()
    told = drive(optimizer, lr.CosineAnnealingLR(optimizer, 300), steps=60, skipped=(0, 1, 7, 12))
    assert told[-1] == 300 - 4, "the schedule ends after 300 moves, that is after 296 steps"


def test_a_given_length_stands():
    optimizer = sgd()
    told = drive(optimizer, lr.CosineAnnealingLR(optimizer, 300), steps=60, length=JobLength(777, SILENT))
    assert set(told) == {777}


def test_a_schedule_of_another_optimizer_or_one_that_has_gone_is_not_listened_to():
    optimizer, other = sgd(), sgd()
    scheduler = lr.CosineAnnealingLR(other, 300)
    assert find_schedulers([optimizer]) == []
    assert find_schedulers([other]) == [scheduler]
    gone = lr.CosineAnnealingLR(optimizer, 500)
    length = JobLength(None, SILENT)
    length.look([optimizer], 1)
    del gone
    gc.collect()
    for step in range(2, 50):
        length.step_ended(step)
    assert length.total_steps is None


def test_parts_of_a_sequence_do_not_count_by_themselves():
    optimizer = sgd()
    scheduler = SCHEDULERS["sequence"](optimizer)
    assert find_schedulers([optimizer]) == [scheduler]


def test_a_schedule_made_late_is_found_at_four_times_the_steps(tmp_path):
    optimizer = sgd()
    events = EventWriter.for_process(tmp_path, role="trainer", index=0)
    length = JobLength(None, events)
    drive(optimizer, lr.ExponentialLR(optimizer, 0.99), steps=15, length=length)
    drive(optimizer, lr.CosineAnnealingLR(optimizer, 285), steps=90, length=length, first=15)
    events.close()
    assert length.total_steps == 300
    (event,) = [e for e in read_events(tmp_path) if e["kind"] == "job_length"]
    assert event["source"] == "CosineAnnealingLR.T_max=285"
    assert event["total_steps"] == 300
    assert event["steps_per_move"] == 1


def test_a_job_that_outlives_its_schedule_is_of_unknown_length_for_good():
    optimizer = sgd()
    told = drive(optimizer, lr.CosineAnnealingLR(optimizer, 50), steps=200)
    assert told[40] == 50
    assert told[50] == 50, "one move more is no surprise"
    assert set(told[52:]) == {None}


def test_schedules_that_contradict_each_other_are_not_believed():
    optimizer = sgd()
    first, second = lr.CosineAnnealingLR(optimizer, 300), lr.PolynomialLR(optimizer, total_iters=400)
    told = drive(optimizer, lr.ChainedScheduler([first, second]), steps=60)
    assert set(told) == {None}


def test_what_was_learned_survives_a_checkpoint():
    optimizer = sgd()
    length = JobLength(None, SILENT)
    drive(optimizer, lr.CosineAnnealingLR(optimizer, 300), steps=60, length=length)
    state = json.loads(json.dumps(length.state_dict()))
    resumed = JobLength(None, SILENT)
    resumed.load_state_dict(state)
    assert resumed.total_steps == 300
    given = JobLength(500, SILENT)
    given.load_state_dict(state)
    assert given.total_steps == 500
    assert given.state_dict() == {}
