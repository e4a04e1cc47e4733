"""Models of every kind through a real reference process, its score against the same computed here."""

from __future__ import annotations

import copy
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

from kgt_ddp.plasticity import first_floating_tensor, plasticity
from kgt_ddp.reference.client import ReferenceClient
from kgt_ddp.reference.samples import Samples, mask_for, masks_in, sub_batch

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.integration


class ConvNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.ModuleList(
            nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()) for _ in range(2)
        )
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.stem(x)
        for block in self.body:
            x = x + block(x)
        return self.head(x.mean((2, 3)))


class Toy(nn.Module):
    """Encoder-decoder of torch's own layers: batch in front, several inputs, padding marked by True."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.inner = nn.Transformer(16, 2, 2, 2, 32, batch_first=True)
        self.out = nn.Linear(16, 50)
        self.out.weight = self.embed.weight  # tied

    def forward(self, src, tgt, src_key_padding_mask):
        causal = nn.Transformer.generate_square_subsequent_mask(tgt.shape[1])
        hidden = self.inner(
            self.embed(src), self.embed(tgt), tgt_mask=causal, src_key_padding_mask=src_key_padding_mask
        )
        return self.out(hidden)


class MakesFloat32(nn.Module):
    """Mixes its bf16 weights with fp32 tensors of its own; torch refuses that in plain bf16."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x):
        return self.inner(x.float() + torch.ones(8))


def lengths_mask(batch, tokens):
    return (torch.arange(tokens) < torch.randint(2, tokens + 1, (batch, 1))).long()


def conv():
    return ConvNet(), ["stem", "body.0", "body.1"], Samples((torch.randn(8, 1, 12, 12),))


def bert():
    config = transformers.BertConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64
    )
    net = transformers.BertForSequenceClassification(config)
    inputs = {"input_ids": torch.randint(0, 100, (8, 10)), "attention_mask": lengths_mask(8, 10)}
    return net, ["bert.embeddings", "bert.encoder.layer.0", "bert.encoder.layer.2"], Samples((), inputs)


def t5():
    config = transformers.T5Config(
        vocab_size=100,
        d_model=32,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
        pad_token_id=0,
    )
    net = transformers.T5ForConditionalGeneration(config)
    inputs = {
        "input_ids": torch.randint(1, 100, (8, 10)),
        "attention_mask": lengths_mask(8, 10),
        "labels": torch.randint(1, 100, (8, 7)),
    }
    return net, ["encoder.block.0", "encoder.block.1", "decoder.block.0"], Samples((), inputs)


def toy():
    args = (torch.randint(0, 50, (8, 9)), torch.randint(0, 50, (8, 6)))
    padding = {"src_key_padding_mask": lengths_mask(8, 9) == 0}
    return Toy(), ["inner.encoder.layers.0", "inner.encoder.layers.1", "inner.decoder.layers.0"], Samples(args, padding)


def here(net, blocks, samples):
    """Outputs of the blocks, computed in this process."""
    found, masks = {}, masks_in(samples)
    modules = dict(net.named_modules())
    hooks = [
        modules[name].register_forward_hook(
            lambda _m, _a, out, n=name: found.__setitem__(n, first_floating_tensor(out))
        )
        for name in blocks
    ]
    net.eval()
    with torch.no_grad():
        net(*samples.args, **samples.kwargs)
    for hook in hooks:
        hook.remove()
    return found, {name: mask_for(name, found[name], masks) for name in blocks}


def move(net):
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.02 * torch.randn_like(p))
        for name, b in net.named_buffers():
            if "running" in name:
                b.add_(0.1 * torch.rand_like(b))


@pytest.fixture(scope="module")
def bf16_reference(tools_of_module):
    with tools_of_module.short_directory() as root:
        one = tools_of_module.Reference(root, "bf16")
        one.start()
        yield one
        one.stop()


@pytest.mark.parametrize("make", [conv, bert, t5, toy])
def test_scores_equal_those_computed_here(shared_reference, tools, make):
    torch.manual_seed(1)
    net, blocks, samples = make()
    client = ReferenceClient(shared_reference.directory, 0)
    assert client.offer_model(net, blocks, lags=(1,)), client.problem
    client.retain_probe(sub_batch(samples.args, samples.kwargs, 6))
    tools.exchange(client, 0)
    old = copy.deepcopy(net)
    move(net)
    net.train()
    scores = tools.exchange(client, 1)
    assert scores, client.problem
    few = sub_batch(samples.args, samples.kwargs, 6)
    (before, masks), (after, _) = here(old, blocks, few), here(net, blocks, few)
    for block in blocks:
        assert before[block].shape[0] == 6
        expected = plasticity(before[block], after[block], masks[block])
        assert scores[0].values[block] == pytest.approx(expected, rel=1e-3)
        assert expected > 1e-9
    client.close()


def test_masks_reach_the_blocks_they_belong_to():
    net, blocks, samples = bert()
    _, masks = here(net, blocks, samples)
    assert all(mask is not None for mask in masks.values())
    net, blocks, samples = t5()
    _, masks = here(net, blocks, samples)
    assert masks["encoder.block.0"] is not None and masks["decoder.block.0"] is None
    net, blocks, samples = toy()
    _, masks = here(net, blocks, samples)
    assert torch.equal(masks[blocks[0]], ~samples.kwargs["src_key_padding_mask"]) and masks[blocks[2]] is None


@pytest.mark.parametrize(("make", "precision"), [(conv, "bf16"), (bert, "bf16"), (t5, "bf16")])
def test_bf16_sees_what_fp32_sees(bf16_reference, tools, make, precision):
    torch.manual_seed(1)
    net, blocks, samples = make()
    client = ReferenceClient(bf16_reference.directory, 0)
    client.offer_model(net, blocks, lags=(1,))
    client.retain_probe(samples)
    tools.exchange(client, 0)
    old = copy.deepcopy(net)
    move(net)
    score = tools.exchange(client, 1)[0]
    (before, masks), (after, _) = here(old, blocks, samples), here(net, blocks, samples)
    assert score.precision == precision
    for block in blocks:
        expected = plasticity(before[block], after[block], masks[block])
        floor = score.floors[block]
        assert 0 < floor < expected
        assert score.values[block] == pytest.approx(expected, rel=0.2, abs=4 * floor)
    client.close()


def test_a_model_that_refuses_plain_bf16_runs_by_autocast(bf16_reference, tools):
    client = ReferenceClient(bf16_reference.directory, 0)
    net = MakesFloat32()
    client.offer_model(net, ["inner"], lags=(1,))
    client.retain_probe(Samples((torch.randn(6, 8),)))
    tools.exchange(client, 0)
    move(net)
    score = tools.exchange(client, 1)[0]
    assert score.precision == "bf16-autocast"
    assert score.values["inner"] > score.floors["inner"] > 0
    client.close()


def test_no_deeper_than_the_last_watched_block(shared_reference, tools):
    class Mine(nn.Module):
        def __init__(self):
            super().__init__()
            self.front, self.back = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            x = self.front(x)
            raise RuntimeError("went on behind the last watched block")

    client = ReferenceClient(shared_reference.directory, 0)
    client.offer_model(Mine(), ["front"], lags=(1,))
    client.retain_probe(Samples((torch.randn(6, 8),)))
    tools.exchange(client, 0)
    assert tools.exchange(client, 1)[0].values == {"front": 0.0}, client.problem
    client.close()


def test_a_watched_block_that_never_runs_is_dont_know(shared_reference, tools):
    net = tools.small_net()
    net[0].add_module("never", nn.Linear(8, 8))
    client = ReferenceClient(shared_reference.directory, 0)
    client.offer_model(net, ["0", "0.never"], lags=(1,))
    client.retain_probe(Samples((torch.randn(6, 8),)))
    tools.exchange(client, 0)
    assert tools.exchange(client, 1)[0].values == {"0": 0.0, "0.never": None}
    client.close()


def test_classes_of_main_and_of_a_module_beside_the_script(shared_reference, tmp_path):
    (tmp_path / "beside.py").write_text(
        "from torch import nn\nclass Beside(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.inner = nn.Linear(8, 8)\n"
        "    def forward(self, x):\n        return self.inner(x)\n"
    )
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent("""
        import sys, time, torch
        from dataclasses import dataclass
        from torch import nn
        from beside import Beside
        from kgt_ddp.reference.client import ReferenceClient
        from kgt_ddp.reference.samples import Samples

        FACTOR = 2.0

        @dataclass
        class Batch:
            x: torch.Tensor

        class Mine(nn.Module):
            def __init__(self):
                super().__init__()
                self.one, self.two = Beside(), nn.Linear(8, 8)
            def forward(self, batch, *, scale=1.0):
                return self.two(FACTOR * self.one(batch.x) * scale)

        net = Mine()
        client = ReferenceClient(sys.argv[1], 0)
        assert client.offer_model(net, ["one", "two"], lags=(1,)), client.problem
        client.retain_probe(Samples((Batch(torch.randn(6, 8)),), {"scale": 0.5}))
        scores, step, end = [], 0, time.monotonic() + 60
        while not scores and time.monotonic() < end:
            if not client.in_flight:
                with torch.no_grad():
                    net.two.weight.add_(0.1)
                step += client.submit(step, 0)
            scores = client.poll(0.1)
        print(client.problem)
        assert scores[0].values["one"] == 0.0 and scores[0].values["two"] > 0
        client.close()
        """)
    )
    done = subprocess.run(
        [sys.executable, str(script), str(shared_reference.directory)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stdout + done.stderr
