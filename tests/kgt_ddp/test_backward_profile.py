from __future__ import annotations

import time

import torch
from torch import nn

from kgt_ddp.backward_profile import SKIPPED, STEPS, BackwardProfile
from kgt_ddp.blocks import Blocks


class SlowBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, seconds):
        ctx.seconds = seconds
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        time.sleep(ctx.seconds)
        return gradient, None


class Part(nn.Module):
    def __init__(self, seconds):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.seconds = seconds

    def forward(self, x):
        # Slept behind the output: before this part's own gradients, after those of the part behind it.
        return SlowBackward.apply(self.linear(x), self.seconds)


def test_a_slow_block_is_seen_and_the_hooks_are_gone_afterwards():
    model = nn.Sequential(Part(0.0), Part(0.02), Part(0.0), Part(0.0))
    blocks = Blocks(model)
    profile = BackwardProfile(blocks)
    for _ in range(STEPS + SKIPPED):
        assert profile.block_seconds is None
        model(torch.randn(2, 4)).sum().backward()
        profile.step_ended()
    seconds = profile.block_seconds
    assert len(seconds) == 4
    assert seconds[1] > 0.015
    assert seconds[0] < 0.01
    assert seconds[3] == 0.0, "nothing is behind the last block to measure from"
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_a_block_that_got_no_gradient_costs_nothing():
    model = nn.Sequential(Part(0.0), Part(0.0), Part(0.0))
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)
    profile = BackwardProfile(Blocks(model))
    for _ in range(STEPS + SKIPPED):
        model(torch.randn(2, 4)).sum().backward()
        profile.step_ended()
    assert profile.block_seconds[0] == 0.0
