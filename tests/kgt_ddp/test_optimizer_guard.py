from __future__ import annotations

import logging

import torch

from kgt_ddp.optimizer_guard import OptimizerGuard


def parameters(count):
    return [torch.nn.Parameter(torch.full((3,), float(i + 1))) for i in range(count)]


def test_groups_are_as_before_after_a_step_and_an_empty_group_is_away_meanwhile():
    a, b, c = parameters(3)
    optimizer = torch.optim.SGD([{"params": [a]}, {"params": [b, c], "lr": 0.5}], lr=0.1)
    groups = [(id(g), [id(p) for p in g["params"]]) for g in optimizer.param_groups]
    guard = OptimizerGuard()
    guard.set_frozen([a, b], [optimizer])
    guard.before_step(optimizer)
    assert [[id(p) for p in g["params"]] for g in optimizer.param_groups] == [[id(c)]]
    guard.after_step(optimizer)
    assert [(id(g), [id(p) for p in g["params"]]) for g in optimizer.param_groups] == groups


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


def test_the_copies_are_given_up_when_nobody_moves_anything():
    (a,) = parameters(1)
    optimizer = torch.optim.SGD([a], lr=0.1)
    guard = OptimizerGuard()
    guard.set_frozen([a], [optimizer])
    for _ in range(8):
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
