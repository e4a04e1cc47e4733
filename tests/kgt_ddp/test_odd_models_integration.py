"""Models and options of DDP in which something is unusual and which train on all the same when blocks freeze."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn

from kgt_ddp import FreezeAwareDDP
from kgt_ddp.policies.schedules import Replay
from tests.kgt_ddp.networks import SmallResNet
from tests.kgt_ddp.training import descend, image_batch

pytestmark = pytest.mark.integration


class WithUnused(SmallResNet):
    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(3, 3)


def static_graph(rank, world, options):
    torch.manual_seed(0)
    ddp = FreezeAwareDDP(WithUnused(), policy=Replay([(3, 2), (9, 1)]), interval=3, static_graph=True, **options)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.05)
    frontiers = []
    for step in range(14):
        descend(ddp, optimizer, *image_batch(step, rank))
        frontiers.append(ddp.freezing.frontier)
    return frontiers, ddp.module.head.weight.detach().clone()


@pytest.mark.parametrize("options", [{}, {"find_unused_parameters": True}], ids=str)
def test_a_static_graph_with_an_unused_layer_is_static_after_a_mask_too(run_ranks, options):
    (frontiers, ours), (_, theirs) = run_ranks(2, static_graph, options)
    assert {0, 1, 2} == set(frontiers)
    assert torch.equal(ours, theirs)


class Padded(nn.Module):
    """torch's own encoder, called with a padding mask."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 16)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 4)
        self.head = nn.Linear(16, 5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(self.embedding(ids), src_key_padding_mask=ids == 0).mean(1))


def padded(rank, world):
    torch.manual_seed(0)
    ddp = FreezeAwareDDP(Padded(), policy=Replay([(1, 2), (7, 0)]), interval=3)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.05)
    ids = torch.arange(1, 13).reshape(2, 6)
    ids[1, 4:] = 0
    seen = []
    for _ in range(14):
        descend(ddp, optimizer, ids, torch.tensor([0, 1]))
        seen.append((ddp.freezing.frontier, ddp.module.encoder.use_nested_tensor))
    return seen


def test_torchs_encoder_with_a_padding_mask_trains_on_behind_a_frozen_layer(run_ranks):
    (seen,) = run_ranks(1, padded)
    assert {(2, False), (0, True)} == set(seen)


class WithScripted(SmallResNet):
    """Takes no hooks in its stem, nor in its second block."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = torch.jit.script(self.stem)
        self.blocks[1] = torch.jit.script(self.blocks[1])


def scripted(rank, world, make):
    torch.manual_seed(0)
    ddp = FreezeAwareDDP(make(), policy=Replay([(1, 1), (4, 2), (7, 4), (10, 0)]), interval=3)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.05)
    frontiers, without = [], set()
    for step in range(15):
        descend(ddp, optimizer, *image_batch(step, rank))
        frontiers.append(ddp.freezing.frontier)
        without |= {n for n, p in ddp.module.named_parameters() if p.requires_grad and p.grad is None}
    return set(frontiers), without, [b.name for b in ddp.freezing.blocks.blocks], ddp.module.state_dict()


@pytest.mark.parametrize("kind", ["parts", "whole"])
def test_a_model_with_parts_in_torchscript_trains_on(run_ranks, kind):
    make = WithScripted if kind == "parts" else lambda: torch.jit.script(SmallResNet())
    (frontiers, without, names, ours), (*_, theirs) = run_ranks(2, scripted, make)
    assert without == set()
    assert all(torch.equal(t, theirs[n]) for n, t in ours.items() if "running" not in n and "batches" not in n)
    if kind == "parts":
        assert frontiers == {0, 1, 2, 4}
        assert names == ["blocks.0", "blocks.2", "blocks.3", "blocks.1", "head"], "what was not seen to run comes last"


def frozen_tail(rank, world):
    """The user froze all behind block 1; the policy would freeze three."""
    torch.manual_seed(0)
    net = SmallResNet()
    for p in [*net.blocks[2:].parameters(), *net.head.parameters()]:
        p.requires_grad_(False)
    ddp = FreezeAwareDDP(net, policy="static:blocks=3", interval=3)
    optimizer = torch.optim.SGD([p for p in ddp.parameters() if p.requires_grad], lr=0.05)
    for step in range(9):
        descend(ddp, optimizer, *image_batch(step, rank))
    return ddp.freezing.frontier, ddp.module.blocks[1].conv.weight.requires_grad


def test_where_the_user_froze_the_end_the_last_block_that_trains_is_left_to_train(run_ranks):
    assert run_ranks(2, frozen_tail) == [(1, True)] * 2


class KeepsNormsStill(SmallResNet):
    def train(self, mode: bool = True) -> KeepsNormsStill:
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.training = False
        return self


def own_train(rank, world):
    torch.manual_seed(0)
    ddp = FreezeAwareDDP(KeepsNormsStill(), policy=Replay([(1, 2), (7, 0)]), interval=3)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.05)
    frontiers = set()
    for step in range(12):
        if step < 6:
            ddp.train()
        descend(ddp, optimizer, *image_batch(step, rank))
        frontiers.add(ddp.freezing.frontier)
    return frontiers, [m.training for m in ddp.modules() if isinstance(m, (nn.BatchNorm2d, nn.Conv2d))]


def test_modules_that_the_models_own_train_keeps_in_eval_mode_stay_so_when_they_are_lifted(run_ranks):
    ((frontiers, training),) = run_ranks(1, own_train)
    assert frontiers == {0, 2}
    assert training == [True, False] * 5


def scaled_after_resume(rank, world):
    """The backbone has an optimizer of its own, all of whose parameters are frozen, in a job that goes on."""

    def made():
        torch.manual_seed(0)
        ddp = FreezeAwareDDP(SmallResNet(), policy=Replay([(1, 3)]), interval=3)
        net = ddp.module
        backbone = torch.optim.SGD([*net.stem.parameters(), *net.blocks[:3].parameters()], lr=0.05)
        return ddp, [backbone, torch.optim.SGD([*net.blocks[3].parameters(), *net.head.parameters()], lr=0.05)]

    def steps(ddp, optimizers, count):
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        for step in range(count):
            for optimizer in optimizers:
                optimizer.zero_grad()
            x, y = image_batch(step, rank)
            scaler.scale(nn.functional.cross_entropy(ddp(x), y)).backward()
            for optimizer in optimizers:
                scaler.step(optimizer)
            scaler.update()

    first, optimizers = made()
    steps(first, optimizers, 6)
    again, optimizers = made()
    again.module.load_state_dict(first.module.state_dict())
    again.freezing.load_state_dict(first.freezing.state_dict())
    steps(again, optimizers, 3)
    return first.freezing.frontier, again.freezing.frontier


def test_a_scaler_finds_gradients_of_a_frozen_optimizer_in_the_first_step_of_a_resumed_job(run_ranks):
    assert run_ranks(1, scaled_after_resume) == [(3, 3)]


def uneven(rank, world):
    ddp = FreezeAwareDDP(SmallResNet(), policy="none", interval=3)
    with pytest.raises(ValueError, match="divide_by_initial_world_size"), contextlib.ExitStack() as stack:
        stack.enter_context(ddp.join(divide_by_initial_world_size=False))
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.05)
    with ddp.join():
        for step in range(2 + rank):
            descend(ddp, optimizer, *image_batch(step, rank))
    return ddp.module.head.weight.detach().clone()


def test_join_by_the_number_of_ranks_that_are_left_is_refused(run_ranks):
    ours, theirs = run_ranks(2, uneven)
    assert torch.equal(ours, theirs)
