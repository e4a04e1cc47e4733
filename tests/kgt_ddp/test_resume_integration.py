"""Stopping and resuming, with the freezing in the checkpoint, equals never having stopped, bit for bit."""

from __future__ import annotations

import copy
import io

import pytest
import torch

from kgt_ddp import FreezeAwareDDP
from kgt_ddp.policies.gradnorm import GradNorm
from kgt_ddp.policies.schedules import Replay
from tests.kgt_ddp.networks import SmallResNet, SmallViT
from tests.kgt_ddp.training import OPTIMIZERS, differing, snapshot, told, train

pytestmark = pytest.mark.integration

MOVES = [(5, 1), (11, 3), (19, 2)]
STEPS = 26


def fresh(make=SmallResNet, optimizer="sgd"):
    torch.manual_seed(3)
    ddp = FreezeAwareDDP(make(), policy=Replay(MOVES, weight_mean=0.5), interval=3)
    return ddp, OPTIMIZERS[optimizer](ddp.parameters())


def saved(ddp, optimizer):
    """A checkpoint, as bytes. Buffers are this rank's: DDP makes them equal only at the next forward."""
    blob = io.BytesIO()
    parts = {"model": ddp.module, "optimizer": optimizer, "freezing": ddp.freezing}
    torch.save({name: part.state_dict() for name, part in parts.items()}, blob)
    return blob.getvalue()


def resumed(blob, *made):
    """A fresh job that goes on from a checkpoint."""
    state = torch.load(io.BytesIO(blob), weights_only=True)
    ddp, optimizer = fresh(*made)
    for name, part in {"model": ddp.module, "optimizer": optimizer, "freezing": ddp.freezing}.items():
        part.load_state_dict(state[name])
    return ddp, optimizer


def weights(ddp):
    return {n: p.detach().clone() for n, p in ddp.module.named_parameters()}


def stop_and_resume_everywhere(rank, world, stops):
    whole, optimizer = fresh()
    kept = {}
    for step in range(STEPS):
        if step in stops:
            kept[step] = saved(whole, optimizer)
        train(whole, optimizer, rank=rank, steps=range(step, step + 1), accumulate=2, no_sync=True)
    differences = {}
    for stop, blob in kept.items():
        again, optimizer = resumed(blob)
        train(again, optimizer, rank=rank, steps=range(stop, STEPS), accumulate=2, no_sync=True)
        ours, theirs = again.freezing.summary(), whole.freezing.summary()
        differences[stop] = (
            differing(weights(again), weights(whole)),
            ours["freezes"] == theirs["freezes"],
            ours["dropped_bytes"] - theirs["dropped_bytes"],
            again.freezing.mask == whole.freezing.mask,
        )
    return differences


@pytest.mark.parametrize("world", [1, 2])
def test_stopping_at_any_step_and_resuming_equals_never_stopping(run_ranks, world):
    stops = list(range(0, STEPS, 1 if world == 1 else 4))
    for differences in run_ranks(world, stop_and_resume_everywhere, stops, timeout_s=180):
        for stop, outcome in differences.items():
            assert outcome == ([], True, 0, True), f"stopped at {stop}"


def reentrant(rank, world):
    def make():
        return SmallViT(checkpointing="reentrant")

    whole, optimizer = fresh(make)
    train(whole, optimizer, rank=rank, steps=range(8))
    again, second = resumed(saved(whole, optimizer), make)
    for ddp, own in ((whole, optimizer), (again, second)):
        train(ddp, own, rank=rank, steps=range(8, 11))
    without = [n for n, p in again.module.named_parameters() if p.requires_grad and p.grad is None]
    return again.freezing.frontier, without, differing(weights(again), weights(whole))


def test_blocks_in_reentrant_checkpoints_train_on_in_a_resumed_job(run_ranks):
    for frontier, without, different in run_ranks(2, reentrant):
        assert (frontier, without, different) == (1, [], [])


def stop_in_mid_step(rank, world, stops):
    """Checkpoints between the two backwards of a step: the step is begun anew by the job that goes on."""

    def save(step):
        if step in stops:
            kept[step] = saved(whole, optimizer)

    kept, outcomes = {}, {}
    whole, optimizer = fresh(SmallViT, "adamw")
    train(whole, optimizer, rank=rank, steps=range(STEPS), accumulate=2, no_sync=True, between=save)
    for stop, blob in kept.items():
        again, second = resumed(blob, SmallViT, "adamw")
        train(again, second, rank=rank, steps=range(stop, STEPS), accumulate=2, no_sync=True)
        same_freezes = again.freezing.summary()["freezes"] == whole.freezing.summary()["freezes"]
        outcomes[stop] = (differing(weights(again), weights(whole)), same_freezes)
    return outcomes


def test_stopping_between_two_backwards_of_a_step_and_resuming_does_too(run_ranks):
    """At every step before, in and after a move of the mask. A network without statistics of the batch: a checkpoint holds
    what the first backward's forward did to those."""
    for outcomes in run_ranks(2, stop_in_mid_step, list(range(3, STEPS)), timeout_s=180):
        assert len(outcomes) == STEPS - 3
        for stop, outcome in outcomes.items():
            assert outcome == ([], True), f"stopped in step {stop}"


def other_world(rank, world, state):
    ddp, optimizer = fresh()
    ddp.freezing.load_state_dict(state)
    train(ddp, optimizer, rank=rank, steps=range(14, 18))
    return ddp.freezing.frontier, ddp.freezing.clock.step


def first_half(rank, world):
    ddp, optimizer = fresh()
    train(ddp, optimizer, rank=rank, steps=range(14))
    return ddp.freezing.state_dict()


def test_the_freezing_carries_over_to_another_number_of_ranks(run_ranks):
    (state,) = run_ranks(1, first_half)
    assert state["frontier"] == 3
    assert run_ranks(3, other_world, state) == [(3, 18)] * 3


def without_state(rank, world):
    messages = told()
    ddp, optimizer = fresh()
    ddp.freezing.load_state_dict(None)
    train(ddp, optimizer, rank=rank, steps=range(3))
    wrong = copy.deepcopy(first := ddp.freezing.state_dict())
    wrong["version"] = 99
    with pytest.raises(ValueError, match="version 99"):
        ddp.freezing.load_state_dict(wrong)
    assert first["step"] == 3
    return messages


def test_a_checkpoint_without_freezing_loads_unfrozen_and_says_so(run_ranks):
    (messages,) = run_ranks(1, without_state)
    assert any("nothing frozen" in m for m in messages)


def other_policy(rank, world, state):
    torch.manual_seed(3)
    ddp = FreezeAwareDDP(SmallResNet(), policy="none", interval=3)
    ddp.freezing.load_state_dict(state)
    first = snapshot(ddp.module)
    train(ddp, OPTIMIZERS["sgd"](ddp.parameters()), rank=rank, steps=range(14, 20))
    front = [n for b in ddp.freezing.blocks.blocks[:3] for n, _ in b.parameters]
    return ddp.freezing.frontier, [n for n in front if n in differing(first, snapshot(ddp.module))]


def test_under_another_policy_the_frozen_blocks_stay_and_the_new_policy_goes_on(run_ranks):
    (state,) = run_ranks(1, first_half)
    assert run_ranks(1, other_policy, state) == [(3, [])]


def listening(rank, world, stops):
    """A policy that adds up between two decisions goes on with what it had."""

    def made():
        torch.manual_seed(3)
        ddp = FreezeAwareDDP(SmallResNet(), policy=GradNorm(intervals=6), total_steps=STEPS, interval=4)
        return ddp, OPTIMIZERS["sgd"](ddp.parameters())

    def step_of(job, step):
        job[0].freezing.observe_loss(float(step))
        train(*job, rank=rank, steps=range(step, step + 1))

    whole, kept = made(), {}
    for step in range(STEPS):
        if step in stops:
            kept[step] = saved(*whole)
        step_of(whole, step)
    outcomes = {}
    for stop, blob in kept.items():
        again = made()
        state = torch.load(io.BytesIO(blob), weights_only=True)
        for name, part in {"model": again[0].module, "optimizer": again[1], "freezing": again[0].freezing}.items():
            part.load_state_dict(state[name])
        for step in range(stop, STEPS):
            step_of(again, step)
        ours, theirs = again[0].freezing.state_dict(), whole[0].freezing.state_dict()
        outcomes[stop] = (differing(weights(again[0]), weights(whole[0])), ours.get("rank_0") == theirs.get("rank_0"))
    return outcomes, whole[0].freezing.frontier


def test_gradient_norms_of_an_unfinished_interval_are_in_the_state(run_ranks):
    for outcomes, _ in run_ranks(2, listening, [5, 7, 10], timeout_s=120):
        assert outcomes == {stop: ([], True) for stop in (5, 7, 10)}
