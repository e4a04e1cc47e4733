"""Ranks agree, prove it before they use it, and never hang."""

from __future__ import annotations

import random
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from kgt_ddp import FreezeAwareDDP
from kgt_ddp.agreement import Agreement, control_group
from kgt_ddp.errors import AgreementError, MaskMismatchError
from kgt_ddp.mask import Mask
from kgt_ddp.policies.policy import Decision, Schedule
from kgt_ddp.policies.schedules import Replay
from tests.kgt_ddp.networks import SmallResNet
from tests.kgt_ddp.training import OPTIMIZERS, differing, snapshot, train
from tests.ranks import RanksFailed

pytestmark = pytest.mark.integration


def signals_up(rank, world):
    """Rank 2 has nothing to say about block 1; nobody knows block 2."""
    heard = []

    def decide(present, signals):
        heard.append(signals)
        return present if present.frontier == 1 else present.moved_to(1, at_mean=True)

    group = control_group(dist.group.WORLD)
    agreement = Agreement(group, num_blocks=3, signals=("score",), interval=3, decide=decide)
    mask = Mask(0, 3)
    mine = {"score": [float(rank), None if rank == 2 else 10.0 * rank, None]}
    applied = []
    for step in range(12):
        wanted = agreement.wants_signals(step)
        new = agreement.advance(step, mask, mine if wanted else None)
        if new is not None:
            mask = new
            applied.append((step, new.frontier, new.generation, new.at_mean))
    return heard, applied


def test_means_are_over_the_ranks_that_had_a_value_and_the_lag_is_fixed(run_ranks):
    results = run_ranks(3, signals_up)
    assert results[0][0][0] == {"score": (1.0, 5.0, None)}
    assert all(heard == [] for heard, _ in results[1:]), "only rank 0 decides"
    assert all(applied == [(2, 1, 1, True)] for _, applied in results)


def tampered(rank, world):
    torch.manual_seed(3)
    ddp = FreezeAwareDDP(SmallResNet(), policy=Replay([(6, 2)]), interval=3)
    optimizer = OPTIMIZERS["sgd"](ddp.parameters())
    if rank == 1:
        finish = Agreement._finish

        def corrupt(self, step, current):
            self._mask[1].wait()
            self._mask[0][4] = 0  # interval, generation, whether at the mean, blocks 0 and 1, …
            return finish(self, step, current)

        Agreement._finish = corrupt
    backwards = []
    handle = ddp.module.head.weight.register_hook(lambda g: backwards.append(ddp.freezing.clock.step))
    try:
        train(ddp, optimizer, rank=rank, steps=range(12))
    except MaskMismatchError as error:
        return str(error), backwards[-1], ddp.freezing.clock.step, ddp.freezing.frontier
    finally:
        handle.remove()
    return None


def test_a_rank_with_another_mask_is_named_on_every_rank_before_the_first_affected_backward(run_ranks):
    results = run_ranks(3, tampered)
    for message, last_backward, step, frontier in results:
        assert "rank 1 differs" in message
        assert "blocks [0, 1] frozen" in message
        assert last_backward == step - 1, "a backward ran after the mismatch"
        assert frontier == 0


def built_differently(rank, world):
    ddp = FreezeAwareDDP(SmallResNet(), policy="linear", total_steps=100 + rank, interval=3)
    train(ddp, OPTIMIZERS["sgd"](ddp.parameters()), rank=rank, steps=range(4))


def test_ranks_built_differently_are_told_apart_with_a_table(run_ranks):
    with pytest.raises(RanksFailed) as failed:
        run_ranks(2, built_differently)
    assert set(failed.value.failures) == {0, 1}
    for text in failed.value.failures.values():
        assert "must agree on total_steps" in text
        assert "rank 1: total_steps=101" in text


class RandomMasks(Schedule):
    def __init__(self):
        self.random = random.Random(5)

    def decide(self, observation):
        return Decision(frontier=self.random.randint(0, observation.max_frontier), reason="random")


def random_masks(rank, world, kind):
    torch.manual_seed(3)
    ddp = FreezeAwareDDP(SmallResNet(), policy=RandomMasks(), interval=3)
    optimizer = OPTIMIZERS[kind](ddp.parameters())
    steps = 0
    while len(ddp.freezing.summary()["freezes"]) < 20 and steps < 120:
        train(ddp, optimizer, rank=rank, steps=range(steps, steps + 1), accumulate=2, no_sync=steps % 2 == 0)
        steps += 1
    return {n: p.detach().clone() for n, p in ddp.module.named_parameters()}, ddp.freezing.summary()


@pytest.mark.parametrize("kind", list(OPTIMIZERS))
def test_twenty_random_masks_on_three_ranks_leave_the_ranks_identical(run_ranks, kind):
    results = run_ranks(3, random_masks, kind)
    weights = [w for w, _ in results]
    assert differing(weights[0], weights[1]) == differing(weights[0], weights[2]) == []
    assert all(len(s["freezes"]) == 20 for _, s in results)
    assert len({str(s["freezes"]) for _, s in results}) == 1


def two_wrappers(rank, world):
    """Two wrapped models with their own optimizers, stepped in turn, as in a GAN."""
    models = []
    for seed, frontier in ((1, 2), (2, 3)):
        torch.manual_seed(seed)
        ddp = FreezeAwareDDP(SmallResNet(), policy=Replay([(3, frontier)]), interval=3)
        models.append((ddp, OPTIMIZERS["sgd"](ddp.parameters())))
    for step in range(8):
        for ddp, optimizer in models:
            train(ddp, optimizer, rank=rank, steps=range(step, step + 1))
    return (
        [d.freezing.frontier for d, _ in models],
        [d.freezing.clock.step for d, _ in models],
        [{n: p.detach().clone() for n, p in d.named_parameters()} for d, _ in models],
    )


def test_two_wrappers_in_one_process_have_clocks_and_masks_of_their_own(run_ranks):
    results = run_ranks(2, two_wrappers)
    for frontiers, steps, _ in results:
        assert frontiers == [2, 3]
        assert steps == [8, 8]
    for a, b in zip(results[0][2], results[1][2], strict=True):
        assert differing(a, b) == []


def subgroup(rank, world):
    """Ranks 1 and 2 train together, rank 0 does something else."""
    group = dist.new_group([1, 2])
    if rank == 0:
        return None
    torch.manual_seed(3)
    ddp = FreezeAwareDDP(SmallResNet(), process_group=group, policy=Replay([(3, 2)]), interval=3)
    train(ddp, OPTIMIZERS["sgd"](ddp.parameters()), rank=rank, steps=range(8))
    return ddp.freezing.frontier, {n: p.detach().clone() for n, p in ddp.named_parameters()}


def test_a_wrapper_on_a_subgroup_agrees_within_it(run_ranks):
    nothing, one, two = run_ranks(3, subgroup)
    assert nothing is None
    assert one[0] == two[0] == 2
    assert differing(one[1], two[1]) == []


def lonely(rank, world):
    """Rank 1 stops training without a word; rank 0 must not wait for ever."""
    group = dist.new_group([0, 1], timeout=timedelta(seconds=4))
    torch.manual_seed(3)
    ddp = FreezeAwareDDP(SmallResNet(), process_group=group, policy=Replay([(3, 2)]), interval=3)
    optimizer = OPTIMIZERS["sgd"](ddp.parameters())
    train(ddp, optimizer, rank=rank, steps=range(5 if rank == 0 else 1))


def test_a_rank_that_stops_ends_the_wait_within_the_timeout_of_the_users_group(run_ranks):
    started = time.monotonic()
    with pytest.raises(RanksFailed) as failed:
        run_ranks(2, lonely, timeout_s=40)
    assert time.monotonic() - started < 30
    assert 0 in failed.value.failures


def stalled_control_group(rank, world):
    group = control_group(dist.new_group([0, 1], timeout=timedelta(seconds=3)))
    agreement = Agreement(group, num_blocks=3, signals=(), interval=3, decide=lambda mask, _: mask.moved_to(1))
    if rank == 1:
        time.sleep(8)
        return "slept"
    try:
        for step in range(3):
            agreement.advance(step, Mask(0, 3))
    except AgreementError as error:
        return str(error)
    return "no error"


def test_a_control_wait_has_a_bound_and_says_what_it_waited_for(run_ranks):
    assert "rank 0 waited for the mask" in run_ranks(2, stalled_control_group)[0]


def rank_zero_validates(rank, world):
    torch.manual_seed(3)
    ddp = FreezeAwareDDP(SmallResNet(), policy=Replay([(3, 2)]), interval=3, broadcast_buffers=False)
    optimizer = OPTIMIZERS["sgd"](ddp.parameters())
    for step in range(9):
        train(ddp, optimizer, rank=rank, steps=range(step, step + 1))
        if rank == 0:
            ddp.eval()
            with torch.no_grad():
                ddp(torch.randn(2, 1, 8, 8))
            ddp(torch.randn(2, 1, 8, 8))  # and once where the user forgot no_grad
            ddp.train()
    return ddp.freezing.frontier, ddp.freezing.clock.step, {n: p.detach().clone() for n, p in ddp.named_parameters()}


def test_validation_on_rank_zero_through_the_wrapper_adds_no_collective(run_ranks):
    a, b = run_ranks(2, rank_zero_validates)
    assert a[:2] == b[:2] == (2, 9)
    assert differing(a[2], b[2]) == []


def uneven(rank, world):
    """Rank 1 has twice the data; inside join() masks are held and the clock stands."""
    torch.manual_seed(3)
    ddp = FreezeAwareDDP(SmallResNet(), policy=Replay([(3, 2), (20, 3)]), interval=3)
    # Without momentum: join() makes weights equal at its end, not optimizer state, with stock DDP too.
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.05)
    train(ddp, optimizer, rank=rank, steps=range(6))
    with ddp.join():
        train(ddp, optimizer, rank=rank, steps=range(6, 10 + 4 * rank))
    inside = (ddp.freezing.frontier, ddp.freezing.clock.step)
    train(ddp, optimizer, rank=rank, steps=range(20, 40))
    return inside, ddp.freezing.frontier, {n: p.detach().clone() for n, p in ddp.named_parameters()}


def test_uneven_inputs_under_join_hold_masks_and_leave_ranks_identical(run_ranks):
    a, b = run_ranks(2, uneven)
    assert a[0] == b[0] == (2, 6)
    assert a[1] == b[1] == 3
    assert differing(a[2], b[2]) == []


def plain_stays_plain(rank, world):
    ddp = FreezeAwareDDP(SmallResNet())
    train(ddp, OPTIMIZERS["sgd"](ddp.parameters()), rank=rank, steps=range(2))
    return (
        ddp.freezing.summary(),
        ddp.freezing.describe(),
        len(ddp._comm_hooks),
        isinstance(ddp, DistributedDataParallel),
    )


def test_without_kgtrun_the_wrapper_is_a_plain_ddp_and_says_so(run_ranks):
    for env in ({}, {"KGTRUN_OFF": "1", "KGTRUN_POLICY": "static:blocks=2"}):
        summary, text, hooks, is_ddp = run_ranks(1, plain_stays_plain, env=env)[0]
        assert not summary["active"]
        assert ("KGTRUN_OFF" if env else "without kgtrun") in text
        assert hooks == 0
        assert is_ddp


def policy_from_environment(rank, world):
    ddp = FreezeAwareDDP(SmallResNet(), interval=3)
    train(ddp, OPTIMIZERS["sgd"](ddp.parameters()), rank=rank, steps=range(6))
    return ddp.freezing.frontier, snapshot(ddp.module).keys()


def test_the_policy_comes_from_the_environment_under_kgtrun(run_ranks):
    ((frontier, keys),) = run_ranks(1, policy_from_environment, env={"KGTRUN_POLICY": "static:blocks=2"})
    assert frontier == 2
    assert keys == SmallResNet().state_dict().keys()
