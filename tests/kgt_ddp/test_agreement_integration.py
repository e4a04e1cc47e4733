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
from tests.kgt_ddp.training import OPTIMIZERS, differing, image_batch, snapshot, told, train
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

        def corrupt(self, *now):
            self._mask[1].wait()
            self._mask[0][4] = 0  # interval, generation, whether at the mean, blocks 0 and 1, …
            return finish(self, *now)

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


def one_forward_more(rank, world):
    """Now and then rank 0 makes a forward whose backward never comes, and rank 1 leaves out that of a bad micro-batch."""
    torch.manual_seed(3)
    ddp = FreezeAwareDDP(SmallResNet(), policy=Replay([(6, 2)]), interval=3, broadcast_buffers=False)
    optimizer = OPTIMIZERS["sgd"](ddp.parameters())
    frontiers, kept = [], []
    for step in range(14):
        with ddp.no_sync():
            if rank == 0 and step in (0, 2, 4, 7):
                kept = [ddp(image_batch(100, 0)[0])]
            loss = ddp(image_batch(2 * step, rank)[0]).square().mean()
            if rank == 1 and step in (3, 5, 8):
                kept = [loss]
            else:
                loss.backward()
        optimizer.zero_grad()
        ddp(image_batch(2 * step + 1, rank)[0]).square().mean().backward()
        optimizer.step()
        frontiers.append(ddp.freezing.frontier)
    return frontiers, snapshot(ddp.module), len(kept)


def test_a_graph_that_waits_on_one_rank_holds_the_mask_back_on_all(run_ranks):
    (a, weights_a, _), (b, weights_b, _) = run_ranks(2, one_forward_more)
    assert a == b and a[-1] == 2 and 0 < a.count(2) < 8
    assert (
        differing(
            {n: w for n, w in weights_a.items() if "running" not in n and "tracked" not in n},
            {n: w for n, w in weights_b.items() if "running" not in n and "tracked" not in n},
        )
        == []
    )


def always_a_graph(rank, world):
    messages = told()
    torch.manual_seed(3)
    ddp = FreezeAwareDDP(SmallResNet(), policy=Replay([(6, 2)]), interval=3, broadcast_buffers=False)
    optimizer = OPTIMIZERS["sgd"](ddp.parameters())
    kept = []
    for step in range(30):
        x, _ = image_batch(step, rank)
        optimizer.zero_grad()
        ddp(x).square().mean().backward()
        if rank == 1:
            kept.append(ddp(x))
        optimizer.step()
    return ddp.freezing.frontier, ddp.freezing.clock.step, messages


def test_where_a_graph_waits_at_each_step_the_mask_is_given_up_and_that_is_said_once(run_ranks):
    for rank, (frontier, steps, messages) in enumerate(run_ranks(2, always_a_graph)):
        assert (frontier, steps) == (0, 30)
        assert sum("no mask can be applied" in text for text in messages) == (rank == 0)


class Dropping(torch.nn.Module):
    """Leaves out a layer in its first forward, another one on each rank."""

    def __init__(self, left_out):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU()) for _ in range(4))
        self.left_out = left_out

    def forward(self, x):
        for index, layer in enumerate(self.layers):
            if index != self.left_out:
                x = x + layer(x)
        self.left_out = None
        return x


def other_layers_each(rank, world):
    messages = told()
    torch.manual_seed(3)
    ddp = FreezeAwareDDP(
        Dropping(rank), policy="static:blocks=2,step=4,weight_mean=0.5", interval=3, find_unused_parameters=True
    )
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    for step in range(10):
        torch.manual_seed(step)
        optimizer.zero_grad()
        ddp(torch.randn(3, 4)).square().sum().backward()
        optimizer.step()
    (shared,) = ddp.freezing.state_dict()["shared"]
    assert shared["weight_mean"] is None, "nothing will freeze, and nothing is kept for it"
    return ddp.freezing.frontier, ddp.freezing.clock.step, snapshot(ddp.module), messages


def test_ranks_that_run_other_layers_at_first_train_on_with_nothing_frozen(run_ranks):
    a, b = run_ranks(2, other_layers_each)
    assert a[:2] == b[:2] == (0, 10) and differing(a[2], b[2]) == []
    assert any("nothing is frozen in this job: the ranks ran different parts" in text for text in a[3])


def shards(rank, world):
    """Each rank has a table of its own, which DDP is told to leave alone."""
    torch.manual_seed(3)
    model = SmallResNet()
    model.stem.register_buffer("shard", torch.full((3 + rank,), float(rank)))
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["stem.shard"])
    ddp = FreezeAwareDDP(model, policy=Replay([(6, 2)], weight_mean=0.5), interval=3)
    train(ddp, OPTIMIZERS["sgd"](ddp.parameters()), rank=rank, steps=range(12))
    return ddp.freezing.frontier, model.stem.shard.tolist()


def test_what_the_user_has_ddp_ignore_is_not_made_equal_as_its_block_freezes(run_ranks):
    assert run_ranks(2, shards) == [(2, [0.0] * 3), (2, [1.0] * 4)]


def turned_off_for_a_while(rank, world):
    """The user turns layers off after wrapping and on again later; meanwhile masks come and go."""
    torch.manual_seed(3)
    model = SmallResNet()
    ddp = FreezeAwareDDP(model, policy=Replay([(6, 2), (15, 0)]), interval=3, find_unused_parameters=True)
    optimizer = OPTIMIZERS["sgd"](ddp.parameters())
    mine = [*model.blocks[0].parameters(), *model.blocks[3].parameters()]
    seen = {}
    for step in range(22):
        if step in (2, 9):
            for p in mine:
                p.requires_grad_(step == 9)
        train(ddp, optimizer, rank=rank, steps=range(step, step + 1))
        if step in (8, 14, 21):
            seen[step] = {n: p.detach().clone() for n, p in model.named_parameters()}
    return seen, ddp.freezing.frontier


def test_layers_that_the_user_turns_off_for_a_while_leave_the_ranks_equal(run_ranks):
    (a, frontier), (b, _) = run_ranks(2, turned_off_for_a_while)
    assert frontier == 0
    for step, weights in a.items():
        assert differing(weights, b[step]) == [], f"after step {step}"
    moved = differing(a[14], a[21])
    assert any(n.startswith("blocks.3") for n in moved) and any(n.startswith("blocks.0") for n in moved)


def discriminator(rank, world):
    """Turned off in its generator's step, where its boundary falls, and on again for its own."""
    torch.manual_seed(3)
    ddp = FreezeAwareDDP(SmallResNet(), policy=Replay([(6, 2)]), interval=3)
    optimizer = OPTIMIZERS["sgd"](ddp.parameters())
    made = torch.zeros(6, 1, 8, 8, requires_grad=True)
    for step in range(12):
        ddp.requires_grad_(False)
        ddp(made).square().mean().backward()
        ddp.requires_grad_(True)
        train(ddp, optimizer, rank=rank, steps=range(step, step + 1))
        if step == 7:
            frozen = {n: p.detach().clone() for n, p in ddp.module.named_parameters() if n.startswith("stem")}
    weights = {n: p.detach().clone() for n, p in ddp.module.named_parameters()}
    return ddp.freezing.frontier, made.grad is not None, weights, frozen


def test_a_model_that_is_turned_off_where_its_boundary_falls_freezes_at_the_next(run_ranks):
    (frontier, reached, a, frozen), (*_, b, _) = run_ranks(2, discriminator)
    assert (frontier, reached) == (2, True) and differing(a, b) == []
    assert all(torch.equal(weight, a[name]) for name, weight in frozen.items())


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
