from __future__ import annotations

import torch

from kgt_ddp.step_clock import StepClock


def step(clock):
    boundary = clock.forward_begins()
    clock.gradients_reduced()
    clock.optimizer_stepped()
    return boundary


def test_a_step_is_a_synchronised_backward_followed_by_an_optimizer_step():
    clock = StepClock()
    assert step(clock)
    assert clock.step == 1
    clock.optimizer_stepped()  # no backward before it: another optimizer
    assert clock.step == 1


def test_only_the_first_forward_after_a_step_is_a_boundary():
    clock = StepClock()
    step(clock)
    assert clock.forward_begins()
    assert not clock.forward_begins()
    clock.gradients_reduced()
    assert not clock.forward_begins(), "accumulating: the step is not over"
    clock.optimizer_stepped()
    assert clock.forward_begins()


def test_accumulated_backwards_are_one_step():
    clock = StepClock()
    for _ in range(3):
        clock.forward_begins()
        clock.gradients_reduced()
    clock.optimizer_stepped()
    assert clock.step == 1


def test_two_optimizers_of_one_model_tick_once():
    clock = StepClock()
    clock.forward_begins()
    clock.gradients_reduced()
    assert clock.optimizer_stepped()
    assert not clock.optimizer_stepped()
    assert clock.step == 1


def test_a_paused_clock_neither_ticks_nor_opens():
    clock = StepClock()
    step(clock)
    clock.paused = True
    assert not step(clock)
    clock.paused = False
    assert clock.step == 1
    assert clock.forward_begins()


def test_a_graph_from_before_the_last_step_waits_and_is_given_up_after_another():
    clock = StepClock()
    weight = torch.ones(1, requires_grad=True)
    clock.forward_begins()
    used, unused = weight * 2, weight * 3
    clock.forward_ended([used])
    clock.forward_ended([unused])
    used.backward()
    assert not clock.graph_waits, "it is of this step"
    clock.gradients_reduced()
    clock.optimizer_stepped()
    assert clock.graph_waits
    assert step(clock) and not clock.graph_waits
    del unused


def test_a_graph_that_nobody_holds_any_more_does_not_wait():
    clock = StepClock()
    weight = torch.ones(1, requires_grad=True)
    clock.forward_begins()
    clock.forward_ended([weight * 2])
    output = weight * 3
    clock.forward_ended([output])
    loss = output.sum()
    del output  # what is made of it holds its graph
    step(clock)
    assert clock.graph_waits
    del loss
    assert not clock.graph_waits


def test_outputs_without_a_graph_are_not_waited_for():
    clock = StepClock()
    clock.forward_begins()
    clock.forward_ended([torch.ones(1)])
    step(clock)
    assert not clock.graph_waits
