"""Blocks freeze at the mean of their weights on all ranks alike, stay there bit for bit, and a replay does the same."""

from __future__ import annotations

import pytest
import torch

from kgt_ddp import FreezeAwareDDP
from kgt_ddp.policies.schedules import Replay
from kgt_ddp.policy_spec import parse_policy
from tests.kgt_ddp.networks import SmallResNet
from tests.kgt_ddp.training import OPTIMIZERS, differing, snapshot, train

pytestmark = pytest.mark.integration

SHARE = 0.5
FROZEN_AT = 36
SAMPLED = (10, 20, 30)


def job(policy, steps, rank):
    """Weights after each step, and the frozen part of them from the freeze on."""
    torch.manual_seed(3)
    ddp = FreezeAwareDDP(SmallResNet(), policy=policy, interval=3)
    optimizer = OPTIMIZERS["sgd"](ddp.parameters())
    weights, frozen = {}, {}
    for step in range(steps):
        train(ddp, optimizer, rank=rank, steps=range(step, step + 1))
        weights[step + 1] = snapshot(ddp.module)
        if ddp.freezing.frontier:
            names = ddp.freezing.blocks.tensors_at(ddp.freezing.frontier)
            frozen[step + 1] = {name: weights[step + 1][name] for name in names}
    ddp.freezing.close()
    return weights, frozen


def recorded(rank, world):
    return job(Replay([(FROZEN_AT, 2)], SHARE), FROZEN_AT + 10, rank)


def replayed(rank, world, run_dir):
    return job(parse_policy(f"replay:{run_dir}"), FROZEN_AT + 10, rank)


def in_two_ways(rank, world):
    return job(Replay([(FROZEN_AT, 1), (FROZEN_AT + 6, 2)], SHARE, {FROZEN_AT + 6}), FROZEN_AT + 10, rank)


def test_a_block_freezes_as_it_is_where_the_decision_says_so_and_a_replay_does_it_again(run_ranks, tmp_path):
    results = run_ranks(2, in_two_ways, env={"KGTRUN_RUN_DIR": str(tmp_path)})
    weights, frozen = results[0]
    before, after = weights[FROZEN_AT + 6], frozen[FROZEN_AT + 7]
    added = [name for name in after if name not in frozen[FROZEN_AT + 1]]
    assert added and all(torch.equal(after[name], before[name]) for name in added)
    at_mean = [name for name in frozen[FROZEN_AT + 1] if "num_batches" not in name]
    assert not any(torch.equal(after[name], weights[FROZEN_AT][name]) for name in at_mean)
    for (again, _), (once, _) in zip(run_ranks(2, replayed, str(tmp_path)), results, strict=True):
        assert differing(again[FROZEN_AT + 10], once[FROZEN_AT + 10]) == []


def test_blocks_freeze_at_their_mean_on_all_ranks_and_a_replay_repeats_it(run_ranks, tmp_path):
    results = run_ranks(2, recorded, env={"KGTRUN_RUN_DIR": str(tmp_path)})
    (weights, frozen), (_, other) = results
    first = frozen[FROZEN_AT + 1]
    assert {name.split(".")[0] for name in first} == {"stem", "blocks"}
    for name, tensor in first.items():
        if "num_batches" not in name:  # share 0.5: the sample of step s stands for s² less the square of the one before
            ends = [0, *SAMPLED]
            mean = sum(weights[b][name] * (b**2 - a**2) for a, b in zip(ends, ends[1:], strict=False)) / ends[-1] ** 2
            torch.testing.assert_close(tensor, mean)
            assert not torch.equal(tensor, weights[FROZEN_AT][name]), f"{name} stayed as it was"
    for step in range(FROZEN_AT + 1, FROZEN_AT + 11):
        assert differing(frozen[step], first) == [] == differing(other[step], first), f"after step {step}"
    for (again, _), (once, _) in zip(run_ranks(2, replayed, str(tmp_path)), results, strict=True):
        assert differing(again[FROZEN_AT + 10], once[FROZEN_AT + 10]) == []
