"""Frozen weights and buffers do not change by a bit, on any rank, under any optimizer; lifted blocks go on as before."""

from __future__ import annotations

import hashlib

import pytest
import torch
import torch.distributed as dist

from kgt_ddp import FreezeAwareDDP
from kgt_ddp.policies.schedules import Replay
from tests.kgt_ddp.networks import SmallResNet
from tests.kgt_ddp.training import OPTIMIZERS, image_batch, snapshot, train

pytestmark = pytest.mark.integration


class DecaysWithoutGradient(torch.optim.Optimizer):
    """As some optimizers in the wild: weight decay also where `grad is None`, and it indexes a group's last parameter."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.05})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            assert group["params"][-1] is not None
            for p in group["params"]:
                p.mul_(0.99)
                if p.grad is not None:
                    p.add_(p.grad, alpha=-group["lr"])


class KeepsItsOwnList(torch.optim.Optimizer):
    """Moves parameters that it holds outside its groups, through `.data`."""

    def __init__(self, params):
        self.own = list(params)
        super().__init__(self.own, {"lr": 0.05})

    def step(self, closure=None):
        for p in self.own:
            p.data.mul_(0.99)


MAKERS = {
    **OPTIMIZERS,
    "decays_without_gradient": DecaysWithoutGradient,
    "keeps_its_own_list": KeepsItsOwnList,
}


def digest(tensors):
    sha = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        sha.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return sha.hexdigest()


def frozen_part(ddp):
    names = {n for b in ddp.freezing.blocks.blocks[: ddp.freezing.frontier] for n, _ in b.parameters}
    names |= set(ddp.freezing.blocks.frozen_buffers())
    return {n: t for n, t in snapshot(ddp.module).items() if n in names}


def fifty_steps(rank, world, kind):
    torch.manual_seed(3)
    ddp = FreezeAwareDDP(SmallResNet(dropout=0.2), policy=Replay([(3, 3), (60, 1)]), interval=3)
    optimizer = MAKERS[kind](ddp.parameters())
    train(ddp, optimizer, rank=rank, steps=range(4))
    assert ddp.freezing.frontier == 3
    first = frozen_part(ddp)
    digests = set()
    for step in range(4, 54):
        ddp.train()  # as training loops do: undoes eval() of everything below
        train(ddp, optimizer, rank=rank, steps=range(step, step + 1))
        digests.add(digest(frozen_part(ddp)))
    shape = {i: sorted(s) for i, s in optimizer.state_dict()["state"].items()}
    groups = [len(g["params"]) for g in optimizer.param_groups]
    momentum = {
        n: optimizer.state[p]["momentum_buffer"].clone()
        for n, p in ddp.module.named_parameters()
        if "momentum_buffer" in optimizer.state.get(p, {})
    }
    before_lift = snapshot(ddp.module)
    steps = 54
    while ddp.freezing.frontier == 3:
        train(ddp, optimizer, rank=rank, steps=range(steps, steps + 1))
        steps += 1
    lifted = [n for n, p in ddp.freezing.blocks[1].parameters if p.any()]
    kept = {
        n: torch.equal(before_lift[n], t)
        for n, t in snapshot(ddp.module).items()
        if n in dict(ddp.module.named_parameters())
    }
    modes = [m.training for m in ddp.freezing.blocks[1].modules]
    return {
        "first": digest(first),
        "digests": digests,
        "shape": shape,
        "groups": groups,
        "momentum": sorted(momentum),
        "moved_after_lift": {n: not kept[n] for n in lifted},
        "modes": modes,
        # Statistics of active BatchNorm layers differ between ranks until DDP's next broadcast; weights never do.
        "weights": digest({n: p.detach() for n, p in ddp.module.named_parameters()}),
    }


@pytest.mark.parametrize("kind", list(MAKERS))
def test_frozen_weights_and_buffers_stay_bit_identical_for_fifty_steps(run_ranks, kind):
    results = run_ranks(2, fifty_steps, kind)
    for result in results:
        assert result["digests"] == {result["first"]}
        assert result["groups"] == [17]
        assert all(result["moved_after_lift"].values()), "a lifted block must train again"
        assert all(result["modes"]), "a lifted block must be back in training mode"
        if kind == "sgd":
            assert len(result["momentum"]) == 17, "the state of frozen parameters was dropped"
            assert len(result["shape"]) == 17
    assert results[0]["first"] == results[1]["first"], "frozen parts differ between ranks"
    assert results[0]["weights"] == results[1]["weights"]


def lift_uses_old_momentum(rank, world):
    torch.manual_seed(3)
    ddp = FreezeAwareDDP(SmallResNet(), policy=Replay([(3, 2), (9, 0)]), interval=3)
    optimizer = OPTIMIZERS["sgd"](ddp.parameters())
    train(ddp, optimizer, rank=rank, steps=range(3))
    weight = ddp.module.blocks[0].conv.weight
    momentum = optimizer.state[weight]["momentum_buffer"].clone()
    train(ddp, optimizer, rank=rank, steps=range(3, 9))
    untouched = torch.equal(momentum, optimizer.state[weight]["momentum_buffer"])
    old = weight.detach().clone()
    train(ddp, optimizer, rank=rank, steps=range(9, 10))
    gradient = weight.grad + 5e-4 * old
    expected = 0.9 * momentum + gradient
    return (
        ddp.freezing.frontier,
        untouched,
        torch.allclose(optimizer.state[weight]["momentum_buffer"], expected, atol=1e-7),
    )


def test_a_lifted_block_goes_on_with_its_old_momentum(run_ranks):
    for frontier, untouched, continues in run_ranks(2, lift_uses_old_momentum):
        assert frontier == 0
        assert untouched
        assert continues


def user_froze(rank, world):
    torch.manual_seed(3)
    model = SmallResNet()
    model.stem[0].weight.requires_grad_(False)
    model.blocks[1].conv.weight.requires_grad_(False)
    ddp = FreezeAwareDDP(model, policy=Replay([(3, 3), (9, 0)]), interval=3)
    optimizer = OPTIMIZERS["sgd"](ddp.parameters())
    frozen = (model.stem[0].weight.clone(), model.blocks[1].conv.weight.clone())
    train(ddp, optimizer, rank=rank, steps=range(12))
    still = [
        torch.equal(a, b) for a, b in zip(frozen, (model.stem[0].weight, model.blocks[1].conv.weight), strict=True)
    ]
    return ddp.freezing.frontier, [n for n, p in model.named_parameters() if not p.requires_grad], still


def test_what_the_user_had_frozen_stays_frozen_when_we_lift(run_ranks):
    for frontier, frozen, still in run_ranks(2, user_froze):
        assert frontier == 0
        assert frozen == ["stem.0.weight", "blocks.1.conv.weight"]
        assert still == [True, True]


def buffers_of_ranks(rank, world):
    """BatchNorm statistics of a frozen block, right after the mask: equal on all ranks."""
    torch.manual_seed(3)
    ddp = FreezeAwareDDP(SmallResNet(), policy=Replay([(3, 2)]), interval=3)
    optimizer = OPTIMIZERS["sgd"](ddp.parameters())
    train(ddp, optimizer, rank=rank, steps=range(5))
    assert ddp.freezing.frontier == 2
    means = [torch.empty_like(ddp.module.blocks[0].norm.running_mean) for _ in range(world)]
    dist.all_gather(means, ddp.module.blocks[0].norm.running_mean)
    return all(torch.equal(m, means[0]) for m in means), sorted(ddp.named_module_buffers)


def test_frozen_buffers_are_made_equal_once_and_leave_the_broadcast(run_ranks):
    for equal, broadcast in run_ranks(3, buffers_of_ranks):
        assert equal
        assert not any(n.startswith(("stem", "blocks.0", "blocks.1")) for n in broadcast)
        assert any(n.startswith("blocks.2") for n in broadcast)


def amp_backbone(rank, world):
    """Two optimizers under one GradScaler; the backbone's has no gradient left once everything in it is frozen."""
    torch.manual_seed(3)
    ddp = FreezeAwareDDP(SmallResNet(), policy=Replay([(3, 4)]), interval=3)
    head = set(ddp.module.head.parameters())
    backbone = torch.optim.SGD([p for p in ddp.parameters() if p not in head], lr=0.05, momentum=0.9, weight_decay=1e-3)
    top = torch.optim.SGD(head, lr=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    seen = []
    for step in range(10):
        x, y = image_batch(step, rank)
        backbone.zero_grad()
        top.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(ddp(x), y)
        scaler.scale(loss).backward()
        scaler.unscale_(backbone)
        scaler.unscale_(top)
        torch.nn.utils.clip_grad_norm_(ddp.parameters(), 1.0)
        scaler.step(backbone)
        scaler.step(top)
        scaler.update()
        seen.append((ddp.freezing.frontier, digest(frozen_part(ddp)) if step >= 3 else ""))
    return seen, ddp.freezing.clock.step


def test_amp_goes_on_when_an_optimizer_has_no_gradient_left(run_ranks):
    for seen, steps in run_ranks(2, amp_backbone):
        assert steps == 10
        assert seen[-1][0] == 4
        assert len({d for f, d in seen if f == 4}) == 1
