from __future__ import annotations

import logging

import pytest
import torch

from kgt_ddp import optimizer_hooks
from kgt_ddp.optimizer_guard import OptimizerGuard

OF_TORCH = [
    kind
    for kind in vars(torch.optim).values()
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
]


class IndexesParameters(torch.optim.Optimizer):
    """As Muon and SAM do in the wild."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})

    def step(self, closure=None):
        return [group["params"][-1].shape for group in self.param_groups]


def parameters(count):
    return [torch.nn.Parameter(torch.full((3,), float(i + 1))) for i in range(count)]


@pytest.mark.parametrize(("kind", "meanwhile"), [(torch.optim.SGD, [0, 1]), (IndexesParameters, [1])])
def test_groups_are_as_before_after_a_step_and_meanwhile_a_frozen_one_is_empty_or_away(kind, meanwhile):
    a, b, c = parameters(3)
    optimizer = kind([{"params": [a]}, {"params": [b, c], "lr": 0.5}])
    groups = [(id(g), [id(p) for p in g["params"]]) for g in optimizer.param_groups]
    guard = OptimizerGuard()
    guard.set_frozen([a, b], [optimizer])
    guard.before_step(optimizer)
    assert [len(g["params"]) for g in optimizer.param_groups] == meanwhile
    assert all(p is c for g in optimizer.param_groups for p in g["params"])
    optimizer.step()
    guard.after_step(optimizer)
    assert [(id(g), [id(p) for p in g["params"]]) for g in optimizer.param_groups] == groups


@pytest.mark.parametrize("kind", OF_TORCH, ids=lambda kind: kind.__name__)
def test_each_optimizer_of_torch_steps_with_a_frozen_group(kind):
    """Those need no group to be away."""
    a, b = (torch.nn.Parameter(torch.ones(2, 2)) for _ in range(2))
    optimizer = kind([a] if kind is torch.optim.LBFGS else [{"params": [a]}, {"params": [b]}])
    b.grad = torch.ones(2, 2).to_sparse() if kind is torch.optim.SparseAdam else torch.ones(2, 2)
    guard = OptimizerGuard()
    guard.set_frozen([a], [optimizer])
    guard.before_step(optimizer)
    assert optimizer.param_groups[0]["params"] == []
    optimizer.step(lambda: torch.zeros(()))
    guard.after_step(optimizer)
    assert torch.equal(a.detach(), torch.ones(2, 2))
    assert kind is torch.optim.LBFGS or not torch.equal(b.detach(), torch.ones(2, 2))


def saved_in_mid_step(optimizer, guard):
    guard.before_step(optimizer)
    return optimizer.state_dict()


def test_a_state_saved_in_the_middle_of_a_step_has_all_parameters_and_the_step_goes_on_without_the_frozen():
    a, b = parameters(2)
    optimizer = torch.optim.SGD([{"params": [a]}, {"params": [b]}], lr=0.1)
    guard = OptimizerGuard()
    guard.set_frozen([a], [optimizer])
    state = saved_in_mid_step(optimizer, guard)
    assert [len(g["params"]) for g in state["param_groups"]] == [1, 1]
    assert [len(g["params"]) for g in optimizer.param_groups] == [0, 1]
    guard.after_step(optimizer)
    assert [len(g["params"]) for g in optimizer.param_groups] == [1, 1]
    torch.optim.SGD([{"params": [a]}, {"params": [b]}], lr=0.1).load_state_dict(state)


def test_a_state_saved_in_the_step_of_an_optimizer_around_it_has_all_parameters():
    """SAM and others hold the groups of the optimizer inside, list and all."""
    a, b = parameters(2)
    inner = torch.optim.SGD([a, b], lr=0.1)
    outer = IndexesParameters([a, b])
    outer.param_groups = inner.param_groups
    guard = OptimizerGuard()
    guard.set_frozen([a], [outer, inner])
    guard.before_step(outer)
    state = saved_in_mid_step(inner, guard)
    assert len(state["param_groups"][0]["params"]) == 2
    assert inner.param_groups[0]["params"] == [b]


def test_after_a_step_that_raised_a_state_is_saved_whole_and_loaded():
    a, b = parameters(2)
    optimizer = torch.optim.SGD([a, b], lr=0.1)
    guard = OptimizerGuard()
    guard.set_frozen([a], [optimizer])
    state = saved_in_mid_step(optimizer, guard)
    optimizer.load_state_dict(state)
    assert len(optimizer.param_groups[0]["params"]) == 2


def test_a_step_that_raised_is_repaired():
    a, b = parameters(2)
    optimizer = torch.optim.SGD([a, b], lr=0.1)
    guard = OptimizerGuard()
    guard.set_frozen([a], [optimizer])
    guard.before_step(optimizer)
    guard.restore()
    assert len(optimizer.param_groups[0]["params"]) == 2


def test_nested_optimizers_are_restored_each():
    a, b = parameters(2)
    outer, inner = torch.optim.SGD([a, b], lr=0.1), torch.optim.SGD([a, b], lr=0.1)
    guard = OptimizerGuard()
    guard.set_frozen([a], [outer, inner])
    guard.before_step(outer)
    guard.before_step(inner)
    guard.after_step(inner)
    assert len(inner.param_groups[0]["params"]) == 2
    assert len(outer.param_groups[0]["params"]) == 1
    guard.after_step(outer)
    assert len(outer.param_groups[0]["params"]) == 2


def test_an_optimizer_that_moves_what_it_does_not_list_is_named_once_and_undone(caplog):
    (a,) = parameters(1)
    other = torch.optim.SGD(parameters(1), lr=0.1)
    guard = OptimizerGuard()
    guard.set_frozen([a], [])
    with caplog.at_level(logging.WARNING):
        for _ in range(12):
            guard.before_step(other)
            a.data.mul_(2)
            guard.after_step(other)
            guard.step_ended()
    assert torch.equal(a.detach(), torch.ones(3))
    assert caplog.text.count("moves parameters that it does not list") == 1


def slow_sync(guard, a, optimizer, steps, every):
    """Steps of an optimizer around which something, which is none itself, now and then moves all its parameters."""
    for step in range(1, steps + 1):
        guard.before_forward()
        yield a.detach().clone()
        guard.before_step(optimizer)
        guard.after_step(optimizer)
        guard.step_ended()
        if step % every == 0:
            a.data.mul_(2)


@pytest.mark.parametrize("frozen_again_after", [None, 7])
def test_what_moves_a_frozen_weight_every_few_steps_is_found_out_when_the_copies_go(caplog, frozen_again_after):
    (a,) = parameters(1)
    optimizer = torch.optim.SGD([a], lr=0.1)
    guard = OptimizerGuard()
    guard.set_frozen([a], [optimizer])
    with caplog.at_level(logging.WARNING):
        for step, seen in enumerate(slow_sync(guard, a, optimizer, 40, every=5)):
            if step == frozen_again_after:
                guard.set_frozen([a], [optimizer])
            if step > (frozen_again_after or 16):
                assert torch.equal(seen, torch.ones(3)), "a forward met a weight that had moved"
    assert caplog.text.count("are written back") == 1
    assert "SGD" in caplog.text


def test_weights_that_are_loaded_between_steps_stay_beside_an_optimizer_that_moves_frozen_ones():
    (a,) = parameters(1)
    optimizer = torch.optim.SGD([a], lr=0.1)
    guard = OptimizerGuard()
    guard.set_frozen([a], [optimizer])
    for loaded in (None, torch.full((3,), 7.0)):
        if loaded is not None:
            with torch.no_grad():
                a.copy_(loaded)
        guard.before_forward()
        assert torch.equal(a.detach(), torch.ones(3) if loaded is None else loaded)
        guard.before_step(optimizer)
        with torch.no_grad():
            a.mul_(2)
        guard.after_step(optimizer)
    assert torch.equal(a.detach(), torch.full((3,), 7.0))


class Wrapper:
    """What `Freezing` does around the steps of optimizers, for one of two models that share one."""

    def __init__(self, parameter, optimizer):
        self.guard = OptimizerGuard()
        self.guard.set_frozen([parameter], [optimizer])
        optimizer_hooks.listen(self)

    def before_optimizer_step(self, optimizer):
        self.guard.before_step(optimizer)

    def before_closure(self, optimizer):
        self.guard.restore(optimizer)

    def after_closure(self, optimizer):
        self.guard.before_step(optimizer)

    def after_optimizer_step(self, optimizer):
        self.guard.after_step(optimizer)


@pytest.mark.parametrize("closure", [None, lambda: torch.zeros(())])
def test_two_models_that_share_an_optimizer_lose_no_parameter(closure):
    a, b, c = parameters(3)
    optimizer = torch.optim.SGD([a, b, c], lr=0.1, weight_decay=0.1)
    wrappers = [Wrapper(a, optimizer), Wrapper(b, optimizer)]
    before = [p.detach().clone() for p in (a, b, c)]
    for p in (a, b, c):
        p.grad = torch.ones(3)
    optimizer.step(closure)
    assert len(optimizer.param_groups[0]["params"]) == 3 and len(wrappers) == 2
    assert [torch.equal(p, was) for p, was in zip((a, b, c), before, strict=True)] == [True, True, False]


def test_weights_that_the_user_loads_soon_after_a_freeze_stay(caplog):
    (a,) = parameters(1)
    optimizer = torch.optim.SGD([a], lr=0.1)
    guard = OptimizerGuard()
    guard.set_frozen([a], [optimizer])
    for step in range(20):
        guard.before_forward()
        guard.before_step(optimizer)
        guard.after_step(optimizer)
        guard.step_ended()
        if step == 3:
            with torch.no_grad():
                a.copy_(torch.full((3,), 7.0))  # as load_state_dict does
    assert torch.equal(a.detach(), torch.full((3,), 7.0)) and not caplog.text


def test_the_copies_are_given_up_when_nobody_moves_anything():
    (a,) = parameters(1)
    optimizer = torch.optim.SGD([a], lr=0.1)
    guard = OptimizerGuard()
    guard.set_frozen([a], [optimizer])
    for _ in range(16):
        guard.before_step(optimizer)
        guard.after_step(optimizer)
        guard.step_ended()
    assert guard._copies == []


def test_an_optimizer_without_any_gradient_is_fed_zeros_that_no_step_uses():
    a, b = parameters(2)
    starved, fed = torch.optim.SGD([a], lr=0.1), torch.optim.SGD([b], lr=0.1)
    guard = OptimizerGuard()
    guard.set_frozen([a], [starved, fed])
    guard.feed_starved()
    assert not a.grad.any()
    assert b.grad is None
    guard.before_step(starved)
    starved.step()
    guard.after_step(starved)
    assert torch.equal(a.detach(), torch.ones(3))


def test_nan_weights_are_not_taken_for_moved():
    a = torch.nn.Parameter(torch.full((2,), float("nan")))
    optimizer = torch.optim.SGD([a], lr=0.1)
    guard = OptimizerGuard()
    guard.set_frozen([a], [optimizer])
    guard.before_step(optimizer)
    guard.after_step(optimizer)
    assert not guard._movers
