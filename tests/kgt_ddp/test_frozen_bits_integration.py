"""Frozen weights and buffers do not change by a bit, on any rank, under any optimizer; lifted blocks go on as before."""

from __future__ import annotations

import hashlib

import pytest
import torch
import torch.distributed as dist
from torch.distributed.optim import ZeroRedundancyOptimizer

from kgt_ddp import FreezeAwareDDP
from kgt_ddp.policies.schedules import Replay
from tests.kgt_ddp.networks import SmallResNet
from tests.kgt_ddp.training import OPTIMIZERS, image_batch, snapshot, told, train

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


class SwingsOn(torch.optim.Optimizer):
    """Its momentum swings on where `grad is None`, and it takes a closure as torch's own do."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.01})

    @torch.no_grad()
    def step(self, closure=None):
        with torch.enable_grad():
            loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                swing = self.state[p].setdefault("swing", torch.zeros_like(p))
                swing.mul_(0.9).add_(0.0 if p.grad is None else p.grad)
                p.sub_(swing, alpha=group["lr"])
        return loss


BY_CLOSURE = {"swings_on": SwingsOn, "lbfgs": lambda ps: torch.optim.LBFGS(ps, lr=0.1, max_iter=3)}


def step_by_closure(ddp, optimizer, rank, step, *, by_name):
    def closure():
        optimizer.zero_grad()
        x, y = image_batch(step, rank)
        loss = torch.nn.functional.cross_entropy(ddp(x), y)
        loss.backward()
        return loss

    optimizer.step(closure=closure) if by_name else optimizer.step(closure)


def by_closure(rank, world, kind, by_name):
    torch.manual_seed(3)
    messages = told()
    ddp = FreezeAwareDDP(SmallResNet(), policy=Replay([(3, 3), (15, 0)]), interval=3)
    optimizer = BY_CLOSURE[kind](ddp.parameters())
    frozen, live, swings, frontiers = set(), [], set(), []
    early = ddp.module.blocks[0].conv.weight
    for step in range(18):
        step_by_closure(ddp, optimizer, rank, step, by_name=by_name)
        frontiers.append(ddp.freezing.frontier)
        live.append(digest({"head": ddp.module.head.weight.detach()}))
        if ddp.freezing.frontier:
            frozen.add(digest(frozen_part(ddp)))
            swings.add(digest({k: v for k, v in optimizer.state[early].items() if k == "swing"}))
    return frontiers, len(frozen), len(set(live)), len(swings), [m for m in messages if "moves parameters" in m]


@pytest.mark.parametrize(("kind", "by_name"), [("swings_on", False), ("swings_on", True), ("lbfgs", False)])
def test_nothing_frozen_moves_in_a_step_whose_closure_runs_the_forward(run_ranks, kind, by_name):
    ((frontiers, frozen, live, swings, movers),) = run_ranks(1, by_closure, kind, by_name)
    assert set(frontiers) == {0, 3}
    assert (frozen, live, swings) == (1, 18, 1)
    if kind != "lbfgs":  # that one keeps a list of its own
        assert movers == [], "the step went on with all parameters"


def by_depth(net):
    front = [*net.stem.parameters(), *net.blocks[:2].parameters()]
    return [{"params": front}, {"params": [*net.blocks[2:].parameters(), *net.head.parameters()]}]


def zero_by_depth(rank, world, views):
    torch.manual_seed(3)
    ddp = FreezeAwareDDP(SmallResNet(), policy=Replay([(3, 2), (9, 0)]), interval=3)
    optimizer = ZeroRedundancyOptimizer(
        by_depth(ddp.module), torch.optim.AdamW, lr=1e-2, weight_decay=0.1, parameters_as_bucket_view=views
    )
    frontiers, frozen = [], set()
    for step in range(14):
        train(ddp, optimizer, rank=rank, steps=range(step, step + 1))
        frontiers.append(ddp.freezing.frontier)
        if ddp.freezing.frontier:
            frozen.add(digest(frozen_part(ddp)))
            before_lift = ddp.module.blocks[0].conv.weight.detach().clone()
    lifted = not torch.equal(before_lift, ddp.module.blocks[0].conv.weight)
    return frontiers, frozen, lifted, digest({n: p.detach() for n, p in ddp.module.named_parameters()})


@pytest.mark.parametrize("views", [False, True])
def test_a_sharded_optimizer_whose_groups_go_by_depth_steps_on_when_one_is_frozen(run_ranks, views):
    ours, theirs = run_ranks(2, zero_by_depth, views)
    assert ours == theirs
    frontiers, frozen, lifted, _ = ours
    assert set(frontiers) == {0, 2}
    assert len(frozen) == 1
    assert lifted


def scheduler_in_a_hook(rank, world):
    torch.manual_seed(3)
    ddp = FreezeAwareDDP(SmallResNet(), policy=Replay([(3, 2)]), interval=3)
    optimizer = torch.optim.SGD(by_depth(ddp.module), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    optimizer.register_step_post_hook(lambda *_: scheduler.step())
    train(ddp, optimizer, rank=rank, steps=range(9))
    return ddp.freezing.frontier, [group["lr"] for group in optimizer.param_groups]


def test_a_scheduler_that_a_hook_of_the_step_calls_sees_all_groups(run_ranks):
    assert run_ranks(1, scheduler_in_a_hook) == [(2, [pytest.approx(0.1 / 10)] * 2)]
