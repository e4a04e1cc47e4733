"""`torch.compile` around the wrapper or on a part of what it wraps: training goes on, uncached, and the line says so."""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn

from kgt_ddp import FreezeAwareDDP
from kgt_ddp.policies.schedules import Replay
from tests.kgt_ddp.networks import SmallResNet

BACKEND = "aot_eager"


class Contained(nn.Module):
    """Its blocks stand in a module of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.features = SmallResNet()
        self.head = nn.Linear(5, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x))


class HasCompiledPart(SmallResNet):
    """Only a function that calls its blocks is compiled: no attribute of a module shows it."""

    def __init__(self) -> None:
        super().__init__()
        self.part = [torch.compile(self.run, backend=BACKEND)]

    def run(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.part[0](self.stem(x)).mean((2, 3)))


def compiled(model, ddp, how):
    """The module to call."""
    if how == "outside":
        return torch.compile(ddp, backend=BACKEND)
    if how == "forward":
        model.forward = torch.compile(model.forward, backend=BACKEND)
    elif how == "block":
        model.blocks[0].forward = torch.compile(model.blocks[0].forward, backend=BACKEND)
    elif how == "container":
        model.features = torch.compile(model.features, backend=BACKEND)
    elif how == "suffix":
        model.head.compile(backend=BACKEND)
    return ddp


HOW = ["eager", "outside", "forward", "block", "container", "part", "suffix"]


def train(folder, how, mode):
    """Losses, and the cache's summary. Around a compiled wrapper the frontier moves once more."""
    moves, steps = ([(1, 2), (13, 3)], 20) if how == "outside" else ([(1, 2)], 14)
    os.environ.update(KGTRUN_CACHE=mode, KGTRUN_CACHE_DIR=str(folder), KGTRUN_CACHE_DTYPE="exact")
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = {"container": Contained, "part": HasCompiledPart}.get(how, SmallResNet)()
    if how != "outside":
        compiled(model, None, how)
    ddp = FreezeAwareDDP(model, policy=Replay(moves), interval=3)
    called = compiled(model, ddp, how) if how == "outside" else ddp
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.05, momentum=0.9)
    g = torch.Generator().manual_seed(3)
    batches = [torch.randn(4, 1, 8, 8, generator=g) for _ in range(3)]
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = called(batches[step % 3]).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        ddp.freezing.cache.drain()
    assert ddp.freezing.frontier == moves[-1][1]
    summary = ddp.freezing.summary()["cache"]
    ddp.freezing.close()
    return losses, summary


def run_all(rank, world, folder):
    return {how: [train(folder / how, how, mode) for mode in ("on", "off")] for how in HOW}


@pytest.mark.integration
def test_a_compiled_model_trains_uncached_wherever_compilation_begins(run_ranks, tmp_path):
    (results,) = run_ranks(1, run_all, tmp_path, timeout_s=280)
    for how, ((losses, summary), (plain, _)) in results.items():
        assert losses == plain, how
        if how in ("eager", "suffix"):
            assert summary["full_batches"] > 2, how
        else:
            assert summary["reason"] == "the model is compiled", how
            assert summary["state"] == "refused", how
            assert summary["hits"] == 0, how
