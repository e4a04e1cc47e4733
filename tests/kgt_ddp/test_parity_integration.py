"""With freezing off, FreezeAwareDDP is plain DDP bit for bit; with a forced frontier, it is DDP over a model whose blocks
were frozen by hand before wrapping."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from kgt_ddp import FreezeAwareDDP
from tests.kgt_ddp.networks import SmallResNet
from tests.kgt_ddp.training import OPTIMIZERS, differing, snapshot, train

pytestmark = pytest.mark.integration

VARIANTS = {
    "plain": {},
    "accumulate": {"accumulate": 3},
    "no_sync": {"accumulate": 3, "no_sync": True},
    "autocast": {"autocast": True},
}


def model():
    torch.manual_seed(3)
    return SmallResNet()


def off_against_plain(rank, world, steps):
    results = {}
    for name, variant in VARIANTS.items():
        for kind, optimizer in OPTIMIZERS.items():
            sides = []
            for wrap in (DistributedDataParallel, lambda m: FreezeAwareDDP(m, policy="none", interval=3)):
                ddp = wrap(model())
                losses = train(ddp, optimizer(ddp.parameters()), rank=rank, steps=range(30), **variant)
                sides.append((losses, snapshot(ddp), ddp))
            (plain_losses, plain, _), (our_losses, ours, ddp) = sides
            hook = ddp.freezing.hook
            results[f"{name}/{kind}"] = (
                plain_losses == our_losses,
                differing(plain, ours),
                hook.num_calls,
                sum(hook.reduced_bytes),
                ddp.freezing.clock.step,
            )
    return results


@pytest.mark.parametrize("world", [1, 2])
def test_freezing_off_equals_plain_ddp_bit_for_bit(run_ranks, world):
    for result in run_ranks(world, off_against_plain, 30, timeout_s=150):
        for name, (same_losses, different, calls, num_bytes, steps) in result.items():
            assert same_losses, f"losses differ: {name}"
            assert different == [], name
            assert calls > 0, "the hook did not run"
            assert num_bytes > 0
            assert steps == 30, name


def three_ranks(rank, world):
    """Buckets of both sides have one layout (a single bucket), so that 3 ranks sum in one order."""
    sides = []
    for wrap in (DistributedDataParallel, lambda m, **kw: FreezeAwareDDP(m, policy="none", interval=3, **kw)):
        ddp = wrap(model())
        losses = train(ddp, OPTIMIZERS["sgd"](ddp.parameters()), rank=rank, steps=range(30))
        sides.append((losses, snapshot(ddp)))
    return sides[0][0] == sides[1][0], differing(sides[0][1], sides[1][1])


def test_three_ranks_with_one_bucket_layout_are_bit_equal_too(run_ranks):
    for same_losses, different in run_ranks(3, three_ranks):
        assert same_losses
        assert different == []


def freeze_by_hand(net, k):
    """What a user would write: the stem and the first k blocks, eval mode, no gradients. Imports nothing of ours."""
    for part in [net.stem, *net.blocks[:k]] if k else []:
        part.eval()
        for p in part.parameters():
            p.requires_grad_(False)


def frontier_against_hand(rank, world, k):
    ours = FreezeAwareDDP(model(), policy=f"static:blocks={k}", interval=3)
    optimizer = OPTIMIZERS["sgd"](ours.parameters())
    train(ours, optimizer, rank=rank, steps=range(4))
    assert ours.freezing.frontier == k
    hand_model = model()
    hand_model.load_state_dict(ours.module.state_dict())
    freeze_by_hand(hand_model, k)
    hand = DistributedDataParallel(hand_model)
    hand_optimizer = OPTIMIZERS["sgd"](hand.parameters())
    hand_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    gradients = []
    for ddp, opt in ((ours, optimizer), (hand, hand_optimizer)):
        kept = []
        ddp_losses = train(
            ddp,
            opt,
            rank=rank,
            steps=range(4, 10),
            before_step=lambda _, ddp=ddp, kept=kept: kept.append(
                {n: None if p.grad is None else p.grad.clone() for n, p in ddp.module.named_parameters()}
            ),
        )
        gradients.append((ddp_losses, kept))
    (our_losses, ours_g), (hand_losses, hand_g) = gradients
    different = [
        (step, n)
        for step, (a, b) in enumerate(zip(ours_g, hand_g, strict=True))
        for n in a
        if (a[n] is None) != (b[n] is None) or (a[n] is not None and not torch.equal(a[n], b[n]))
    ]
    frozen = [n for n, g in ours_g[-1].items() if g is None]
    return our_losses == hand_losses, different, frozen, differing(snapshot(ours.module), snapshot(hand.module))


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("k", [1, 3])
def test_active_gradients_equal_those_of_a_model_frozen_by_hand(run_ranks, world, k):
    for same_losses, different, frozen, weights in run_ranks(world, frontier_against_hand, k):
        assert different == []
        assert same_losses
        assert weights == []
        assert len(frozen) == 3 + 3 * k
