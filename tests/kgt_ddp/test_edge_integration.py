"""No backward node runs in front of the frontier, for every kind of model, and what autograd needs at the edge is there."""

from __future__ import annotations

import copy
import os

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from kgt_ddp import FreezeAwareDDP
from kgt_ddp.policies.schedules import Replay
from tests.kgt_ddp.networks import (
    EncoderDecoder,
    Layer,
    SmallResNet,
    SmallViT,
    TiedLanguageModel,
    backward_modules,
    graph_size,
    small_bert,
)

pytestmark = pytest.mark.integration


def t5():
    import transformers

    config = transformers.T5Config(
        d_model=16, d_kv=8, d_ff=16, num_layers=3, num_heads=2, vocab_size=30, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


class Segments(nn.Module):
    """Six layers in two reentrant checkpoints, or in three (the last one of torch's segments is none). Input (batch, 5, 3)."""

    def __init__(self, segments: int = 2) -> None:
        super().__init__()
        self.stem = nn.Linear(3, 16)
        self.layers = nn.Sequential(*[Layer(16) for _ in range(6)])
        self.head = nn.Linear(16, 5)
        self.segments = segments

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = (
            checkpoint_sequential(self.layers, self.segments, x, use_reentrant=True)
            if self.segments
            else self.layers(x)
        )
        return self.head(x.mean(1))


class Strays(nn.Module):
    """Its layers are dictionaries, never called themselves; what scales a layer's output is a parameter of the model, in a
    checkpoint of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(3, 16)
        parts = [{"widen": nn.Linear(16, 32), "narrow": nn.Linear(32, 16)} for _ in range(4)]
        self.layers = nn.ModuleList([nn.ModuleDict(part) for part in parts])
        self.scales = nn.ParameterList([nn.Parameter(torch.ones(16)) for _ in range(4)])
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for layer, scale in zip(self.layers, self.scales, strict=True):
            for part in layer.values():
                x = checkpoint(lambda t, part=part: part(t), x, use_reentrant=True)
            x = checkpoint(lambda t, scale=scale: t * scale, x, use_reentrant=True)
        return self.head(x.mean(1))


class TiedInCheckpoints(TiedLanguageModel):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=True)
        return self.output(x)


IDS = torch.arange(10).reshape(2, 5) % 7 + 1
CASES = {
    "resnet": (SmallResNet, ((torch.randn(4, 1, 8, 8),), {}), lambda out: out.square().mean()),
    "vit": (SmallViT, ((torch.randn(4, 1, 8, 8),), {}), lambda out: out.square().mean()),
    "bert": (small_bert, ((), {"input_ids": IDS, "labels": torch.tensor([0, 1])}), lambda out: out.loss),
    "encoder_decoder": (EncoderDecoder, ((IDS, IDS), {}), lambda out: out.square().mean()),
    "t5": (t5, ((), {"input_ids": IDS, "labels": IDS}), lambda out: out.loss),
    "tied": (TiedLanguageModel, ((IDS,), {}), lambda out: out.square().mean()),
    "vit_reentrant": (
        lambda: SmallViT(checkpointing="reentrant"),
        ((torch.randn(4, 1, 8, 8),), {}),
        lambda o: o.mean(),
    ),
    "segments_reentrant": (Segments, ((torch.randn(4, 5, 3),), {}), lambda out: out.square().mean()),
    "three_segments_reentrant": (lambda: Segments(3), ((torch.randn(4, 5, 3),), {}), lambda out: out.square().mean()),
    "strays_reentrant": (Strays, ((torch.randn(4, 5, 3),), {}), lambda out: out.square().mean()),
    "tied_reentrant": (TiedInCheckpoints, ((IDS,), {}), lambda out: out.square().mean()),
    "vit_checkpoint": (lambda: SmallViT(checkpointing="yes"), ((torch.randn(4, 1, 8, 8),), {}), lambda o: o.mean()),
}


def every_frontier(rank, world, name):
    make, (args, kwargs), loss_of = CASES[name]
    torch.manual_seed(0)
    ddp = FreezeAwareDDP(make(), policy=Replay([(3 * k, k) for k in range(1, 12)]), interval=3)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.01)
    rows = []
    for _ in range(50):
        optimizer.zero_grad()
        loss = loss_of(ddp(*args, **kwargs))
        reached = backward_modules(ddp.module, loss)
        size = graph_size(loss)
        loss.backward()
        blocks = ddp.freezing.blocks
        k = blocks.frontier
        active = {n for b in blocks.blocks[k:] for n, p in b.parameters}
        shared = set(blocks.shared_in_prefix())
        without = [n for n, p in ddp.module.named_parameters() if p.grad is None]
        rows.append((k, size, reached - active - shared - {"<activation>"}, sorted(set(without) & active)))
        optimizer.step()
        if k == blocks.max_frontier:
            break
    return rows, ddp.freezing.blocks.max_frontier


@pytest.mark.parametrize("name", list(CASES))
def test_no_backward_node_runs_in_front_of_the_frontier(run_ranks, name):
    (result,) = run_ranks(1, every_frontier, name)
    rows, top = result
    assert rows[-1][0] == top, "not every frontier was reached"
    sizes = {}
    for k, size, in_front, _ in rows:
        assert in_front == set(), f"frontier {k}"
        sizes[k] = size
    if "reentrant" not in name:  # a reentrant checkpoint is one node whatever is inside
        assert sorted(sizes.values(), reverse=True) == [sizes[k] for k in sorted(sizes)]
    for k, _, _, active_without_gradient in rows:
        unused = {"bert": ["bert.pooler"]}.get(name, [])
        missing = [n for n in active_without_gradient if not n.startswith(tuple(unused) or ("-",))]
        assert missing == [], f"frontier {k}: active parameters got no gradient"


def calls_of_layers(rank, world, make):
    """Calls of each layer in one step, forward and backward, by frontier."""
    torch.manual_seed(0)
    ddp = FreezeAwareDDP(make(), policy=Replay([(3 * k, k) for k in range(1, 12)]), interval=3)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.01)
    counts = []
    for layer in ddp.module.layers:
        layer.register_forward_hook(lambda m, *_: counts.append(id(m)))
    found = {}
    for _ in range(30):
        counts.clear()
        ddp(torch.randn(4, 5, 3)).square().mean().backward()
        optimizer.step()
        found[ddp.freezing.frontier] = [counts.count(id(layer)) for layer in ddp.module.layers]
    return found


def test_of_frozen_layers_only_those_are_recomputed_that_share_a_checkpoint_with_an_active_one(run_ranks):
    """Frontier k: k layers are frozen, the stem with the first."""
    (found,) = run_ranks(1, calls_of_layers, lambda: Segments(3))
    assert found[0] == [2, 2, 2, 2, 1, 1]
    assert found[1] == [2, 2, 2, 2, 1, 1], "the first layer and the second are one checkpoint"
    assert found[2] == [1, 1, 2, 2, 1, 1]
    assert found[3] == [1, 1, 2, 2, 1, 1]
    assert found[4] == found[5] == [1, 1, 1, 1, 1, 1]


def weights_after(
    rank, world, make, *, moves=((2, 1), (9, 4), (14, 2)), steps=18, stop=None, older=False, cache="off", folder=""
):
    """Of a job whose frontier moves into a segment; `stop`: saved there and gone on with in a fresh one. `older`: by a
    release that knew no more than that there are checkpoints."""
    os.environ.update(KGTRUN_CACHE=cache, KGTRUN_CACHE_DIR=folder, KGTRUN_CACHE_DTYPE="exact")

    def job():
        torch.manual_seed(0)
        ddp = FreezeAwareDDP(make(), policy=Replay(list(moves)), interval=3, total_steps=steps)
        return ddp, torch.optim.SGD(ddp.parameters(), lr=0.05, momentum=0.9)

    ddp, optimizer = job()
    for step in range(steps):
        if step == stop:
            saved = copy.deepcopy([ddp.module.state_dict(), optimizer.state_dict(), ddp.freezing.state_dict()])
            if older:
                saved[2]["shared"][0]["reentrant_checkpoint"] = True
            ddp, optimizer = job()
            for part, state in zip((ddp.module, optimizer, ddp.freezing), saved, strict=True):
                part.load_state_dict(state)
        g = torch.Generator().manual_seed(step % 2)
        optimizer.zero_grad()
        nn.functional.cross_entropy(ddp(torch.randn(4, 5, 3, generator=g)), torch.arange(4)).backward()
        optimizer.step()
        ddp.freezing.cache.drain()
    summary = ddp.freezing.summary()
    ddp.freezing.close()
    return ddp.module.state_dict(), [f["frontier"] for f in summary["freezes"]], summary["cache"]


def both_ways(rank, world, one, other):
    return [weights_after(rank, world, **kwargs) for kwargs in (one, other)]


def test_layers_in_a_checkpoint_over_the_frontier_train_as_without_checkpoints(run_ranks):
    ((ours, theirs),) = run_ranks(1, both_ways, {"make": Segments}, {"make": lambda: Segments(0)})
    assert ours[1] == theirs[1] == [1, 4, 2]
    assert all(torch.allclose(t, theirs[0][n], atol=1e-6) for n, t in ours[0].items())


@pytest.mark.parametrize(("stop", "older"), [(5, False), (12, False), (5, True)])
def test_layers_in_a_checkpoint_over_the_frontier_train_on_in_a_resumed_job(run_ranks, stop, older):
    ((ours, theirs),) = run_ranks(1, both_ways, {"make": Segments, "stop": stop, "older": older}, {"make": Segments})
    assert ours[1] == theirs[1]
    # The older one walks back through frozen layers as well, and attention that needs no gradient has another kernel.
    tolerance = 1e-6 if older else 0.0
    assert all(torch.allclose(t, theirs[0][n], rtol=0.0, atol=tolerance) for n, t in ours[0].items())


def test_a_cache_does_not_stand_in_for_what_a_checkpoint_over_the_frontier_recomputes(run_ranks, tmp_path):
    job = {"make": Segments, "moves": ((2, 2),), "steps": 24}
    cached = {"cache": "on", "folder": str(tmp_path)}
    ((ours, theirs),) = run_ranks(1, both_ways, job | cached, job)
    assert all(torch.allclose(t, theirs[0][n], atol=1e-5) for n, t in ours[0].items())
    assert ours[2]["hits"] == 0


def prefix_output_of_tied(rank, world):
    """A tied embedding keeps training through its output use, and the prefix in front builds no graph."""
    torch.manual_seed(0)
    ddp = FreezeAwareDDP(TiedLanguageModel(), policy=Replay([(1, 2)]), interval=3)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    for _ in range(4):
        optimizer.zero_grad()
        ddp(IDS).logsumexp(-1).mean().backward()
        optimizer.step()
    before = ddp.module.embedding.weight.detach().clone()
    seen = []
    handle = ddp.module.layers[2].register_forward_pre_hook(lambda m, args: seen.append(args[0].requires_grad))
    optimizer.zero_grad()
    ddp(IDS).logsumexp(-1).mean().backward()
    optimizer.step()
    handle.remove()
    return ddp.freezing.frontier, seen, not torch.equal(before, ddp.module.embedding.weight)


def test_a_tied_embedding_trains_on_through_its_active_use(run_ranks):
    for frontier, seen, moved in run_ranks(2, prefix_output_of_tied):
        assert frontier == 2
        assert seen == [False]
        assert moved


def input_with_gradient(rank, world):
    """An adversarial input: its gradient flows through the frozen prefix."""
    torch.manual_seed(0)
    ddp = FreezeAwareDDP(SmallResNet(), policy=Replay([(1, 2)]), interval=3)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    norms = []
    for _ in range(5):
        optimizer.zero_grad()
        x = torch.randn(4, 1, 8, 8, requires_grad=True)
        ddp(x).square().mean().backward()
        norms.append(x.grad.norm().item())
        optimizer.step()
    return ddp.freezing.frontier, norms, ddp.module.blocks[0].conv.weight.grad is None


def test_an_input_that_requires_grad_gets_it_through_the_frozen_prefix(run_ranks):
    for frontier, norms, frozen in run_ranks(2, input_with_gradient):
        assert frontier == 2
        assert all(n > 0 for n in norms)
        assert frozen


class TakesEmbeds(TiedLanguageModel):
    def forward(self, ids: torch.Tensor | None = None, embeds: torch.Tensor | None = None) -> torch.Tensor:
        x = self.embedding(ids) if embeds is None else embeds
        for layer in self.layers:
            x = layer(x)
        return self.output(x)


def embeds_with_gradient(rank, world):
    """Adversarial training where the embedding is tied: a step on the text, one on its embeddings, and an attack."""
    torch.manual_seed(0)
    ddp = FreezeAwareDDP(TakesEmbeds(), policy=Replay([(1, 2)]), interval=3)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    seen, norms, attacks = [], [], []
    ddp.module.layers[2].register_forward_pre_hook(lambda _, args: seen.append(args[0].requires_grad))
    for _ in range(4):
        embeds = ddp.module.embedding(IDS).detach().requires_grad_()
        for inputs in ({"ids": IDS}, {"embeds": embeds}):
            optimizer.zero_grad()
            ddp(**inputs).logsumexp(-1).mean().backward()
            optimizer.step()
        norms.append(embeds.grad.norm().item())
        ddp.eval()
        with ddp.no_sync():
            (gradient,) = torch.autograd.grad(ddp(embeds=embeds).logsumexp(-1).mean(), embeds)
        ddp.train()
        attacks.append(gradient.norm().item())
    return ddp.freezing.frontier, seen[-3:], norms, attacks


def test_embeddings_that_are_an_input_get_their_gradient_where_the_embedding_is_tied(run_ranks):
    ((frontier, seen, norms, attacks),) = run_ranks(1, embeds_with_gradient)
    assert frontier == 2
    assert seen == [False, True, True], (
        "the prefix is in the backward where an input requires a gradient, and only there"
    )
    assert min(norms) > 0 and min(attacks) > 0, (norms, attacks)


def compiled(rank, world, where):
    """The frontier moves four times; gradients equal those of an eager twin."""
    results = []
    for mode in ("eager", where):
        torch._dynamo.reset()
        torch.manual_seed(0)
        net = SmallResNet()
        inner = torch.compile(net, backend="aot_eager") if mode == "inside" else net
        ddp = FreezeAwareDDP(inner, policy=Replay([(1, 1), (4, 2), (7, 3), (10, 1)]), interval=3)
        model = torch.compile(ddp, backend="aot_eager") if mode == "outside" else ddp
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        frontiers, losses = [], []
        for step in range(14):
            g = torch.Generator().manual_seed(step)
            x = torch.randn(4, 1, 8, 8, generator=g)
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), torch.arange(4) % 5)
            loss.backward()
            frozen = {n for b in ddp.freezing.blocks.blocks[: ddp.freezing.frontier] for n, _ in b.parameters}
            live = {n for n, p in ddp.module.named_parameters() if p.grad is not None}
            assert not (frozen & live), frozen & live
            optimizer.step()
            frontiers.append(ddp.freezing.frontier)
            losses.append(loss.item())
        results.append((frontiers, losses, [n for n, _ in ddp.freezing.blocks[0].parameters][:1]))
    return results


@pytest.mark.parametrize("where", ["inside", "outside"])
def test_torch_compile_inside_and_outside(run_ranks, where):
    for eager, other in run_ranks(2, compiled, where, timeout_s=200):
        assert eager[0] == other[0]
        assert {1, 2, 3} <= set(eager[0])
        assert torch.allclose(torch.tensor(eager[1]), torch.tensor(other[1]), atol=1e-4)


def many_moves(rank, world):
    """More moves of the frontier than torch's limit of recompilations: the model must not fall back to eager."""
    compiled_graphs = []

    def backend(graph, inputs):
        compiled_graphs.append(graph)
        return graph.forward

    torch.manual_seed(0)
    moves = [(3 * i + 3, i % 4) for i in range(1, 13)]
    ddp = FreezeAwareDDP(torch.compile(SmallResNet(), backend=backend), policy=Replay(moves), interval=3)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.05)
    fresh = []
    for _ in range(48):
        before = len(compiled_graphs)
        frontier = ddp.freezing.frontier
        optimizer.zero_grad()
        ddp(torch.randn(4, 1, 8, 8)).square().mean().backward()
        optimizer.step()
        if ddp.freezing.frontier != frontier:
            fresh.append((ddp.freezing.frontier, len(compiled_graphs) - before))
    return fresh


def test_more_moves_than_torch_compiles_do_not_end_in_eager(run_ranks):
    (fresh,) = run_ranks(1, many_moves, timeout_s=200)
    assert len(fresh) >= 12
    seen = set()
    for frontier, graphs in fresh:
        if frontier not in seen and frontier:
            assert graphs > 0, f"no graph was compiled for frontier {frontier}"
        seen.add(frontier)
