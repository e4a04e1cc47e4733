"""Training with the cache is training without it, for every kind of model; what cannot be cached is not, and says why."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from kgt_ddp.activation_cache.prefix import Prefix
from kgt_ddp.blocks import Blocks
from kgt_ddp.execution_order import watch
from tests.kgt_ddp.activation_cache.jobs import both, equal, farthest, job
from tests.kgt_ddp.networks import (
    EncoderDecoder,
    Layer,
    Residual,
    SmallResNet,
    SmallViT,
    TiedLanguageModel,
    small_bert,
)


def images(batches=4, size=4):
    g = torch.Generator().manual_seed(1)
    return [((torch.randn(size, 1, 8, 8, generator=g),), {}) for _ in range(batches)]


def pairs(batches=4):
    g = torch.Generator().manual_seed(2)
    return [(tuple(torch.randint(0, 30, (2, 4, 6), generator=g)), {}) for _ in range(batches)]


TEXTS = [torch.randint(1, 30, (n,), generator=torch.Generator().manual_seed(n)) for n in range(2, 18)]


def texts(order, size=4):
    """Batches of a few texts of known lengths, padded to the longest of the batch."""
    batches = []
    for start in range(0, len(order), size):
        chosen = [TEXTS[i] for i in order[start : start + size]]
        ids = nn.utils.rnn.pad_sequence(chosen, batch_first=True)
        labels = torch.tensor([len(t) % 2 for t in chosen])
        batches.append(((), {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels}))
    return batches


def t5_encoder():
    """Its blocks return tuples: hidden states, and a bias that belongs to no sample."""
    import transformers

    config = transformers.T5Config(
        d_model=16, d_kv=8, d_ff=16, num_layers=3, num_heads=2, vocab_size=30, dropout_rate=0.0
    )

    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = transformers.T5EncoderModel(config)
            self.head = nn.Linear(16, 2)

        def forward(self, ids):
            return self.head(self.encoder(input_ids=ids).last_hidden_state.mean(1))

    return Classifier()


def call_and_pass_on(self, *args, **kwargs):
    """As layers of transformers do, up to 5.17 at least."""
    if self.gradient_checkpointing and self.training:
        return checkpoint(super(type(self), self).__call__, *args, use_reentrant=False, **kwargs)
    return super(type(self), self).__call__(*args, **kwargs)


def vit_of(layer):
    """A ViT whose layers are of a class made of `Layer`."""
    model = SmallViT()
    for block in model.blocks:
        block.__class__ = layer
    return model


TransformersLayer = type(
    "GradientCheckpointingLayer",
    (Layer,),
    {
        "__module__": "transformers.modeling_layers",
        "__call__": call_and_pass_on,
        "gradient_checkpointing": True,
    },
)


CASES = {
    "resnet": (SmallResNet, images(), (1, 2, 3, 4)),
    "vit": (SmallViT, images(), (1, 3)),
    "bert": (small_bert, texts(range(16)), (1, 3)),
    "encoder_decoder": (EncoderDecoder, pairs(), (1, 2)),
    "t5_encoder": (t5_encoder, [((source,), {}) for (source, _), _ in pairs()], (1, 2)),
    "vit_transformers": (lambda: vit_of(TransformersLayer), images(), (1, 3)),
    "vit_checkpoint": (lambda: SmallViT(checkpointing="yes"), images(), (2,)),
}


@pytest.mark.parametrize(("name", "frontier"), [(n, k) for n, (_, _, ks) in CASES.items() for k in ks])
def test_outputs_and_gradients_are_those_without_the_cache_bit_for_bit(name, frontier, tmp_path):
    make, batches, _ = CASES[name]
    ours, theirs, summary = both(make, batches, frontier, tmp_path)
    assert summary["reason"] is None
    assert summary["full_batches"] >= 5
    assert equal(ours, theirs)


def test_texts_hit_whatever_they_are_padded_to(tmp_path):
    """Shuffled, so that each text is padded to another length in each epoch. Padding alone changes bits (6e-7 here)."""
    orders = [torch.randperm(16, generator=torch.Generator().manual_seed(e)).tolist() for e in range(5)]
    with (
        job(small_bert, texts(orders[0])[0], 2, tmp_path) as cached,
        job(small_bert, texts(orders[0])[0], 2, tmp_path, mode="off") as off,
    ):
        for order in orders[:2]:
            cached.epochs(texts(order), 1)
        before = cached.cache.summary()
        for order in orders[2:]:
            assert farthest(cached.epochs(texts(order), 1), off.epochs(texts(order), 1)) < 2e-5
        after = cached.cache.summary()
    assert after["full_batches"] - before["full_batches"] == 12
    assert after["misses"] == before["misses"]


def test_texts_padded_to_just_the_models_width_are_not_given_records_with_padding(tmp_path):
    """Then nothing tells tokens from features: records are of whole padded texts, and so must be their keys."""

    def padded(chosen, length):
        ids = nn.functional.pad(nn.utils.rnn.pad_sequence([TEXTS[i] for i in chosen], batch_first=True), (0, 20))[
            :, :length
        ]
        return (), {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": torch.tensor([0, 1, 0, 1])}

    halves = (range(4), range(4, 8))
    batches = [padded(half, 16) for half in halves]  # 16 is small_bert's width, too
    with (
        job(small_bert, batches[0], 2, tmp_path) as cached,
        job(small_bert, batches[0], 2, tmp_path, mode="off") as off,
    ):
        for length in (16, 12):
            some = [padded(half, length) for half in halves]
            assert farthest(cached.epochs(some, 4), off.epochs(some, 4)) < 2e-5
        assert cached.cache.summary()["full_batches"] > 0


def test_records_that_are_wrong_are_found_in_batches_of_which_some_samples_are_known(tmp_path, monkeypatch):
    """A data set larger than the budget has no full batches, or hardly any."""
    monkeypatch.setattr("kgt_ddp.activation_cache.frontier_cache.SPOT_CHECK_EVERY", 3)
    known = images(4)
    new = torch.randn(8, 2, 1, 8, 8)
    with job(SmallResNet, known[0], 2, tmp_path) as cached:
        cached.epochs(known, 2)
        for step in range(8):
            if step == 2:  # the first batch has taught the shapes of its size
                cached.model.stem[0].weight.data.mul_(1.5)  # past torch's notice
            cached.step(((torch.cat([known[step % 4][0][0], new[step]]),), {}))
        assert "is not what the block computes" in str(cached.cache.refused)


class Peaked(SmallResNet):
    """One element of each sample is far larger than the others, as in the residual stream of large transformers."""

    def forward(self, x):
        x = self.stem(x)
        peak = torch.zeros_like(x[:1])
        peak[0, 0, 0, 0] = 1e5
        x = x + peak
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


def test_records_that_are_wrong_in_all_but_a_few_large_elements_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr("kgt_ddp.activation_cache.frontier_cache.SPOT_CHECK_EVERY", 3)
    with job(Peaked, images()[0], 2, tmp_path) as cached:
        cached.epochs(images(), 3)
        assert cached.cache.counters.full_batches > 0 and cached.cache.refused is None
        cached.model.stem[0].weight.data.mul_(2.0)  # past torch's notice, and in front of what is large
        cached.epochs(images(), 1)
        assert "is not what the block computes" in str(cached.cache.refused)


class WritesItsInput(SmallResNet):
    """Normalises in place."""

    def forward(self, x, shift):
        x -= shift
        shift *= 2
        return super().forward(x)


def test_a_model_that_writes_into_its_input_gets_each_batch_as_it_is(tmp_path, monkeypatch):
    """Neither the check of the first use nor a spot check, nor computing some samples of a batch, writes into it before."""
    monkeypatch.setattr("kgt_ddp.activation_cache.frontier_cache.SPOT_CHECK_EVERY", 2)
    fresh = torch.randn(4, 2, 1, 8, 8)

    def batches(epoch):
        some = [args[0].clone() for args, _ in images()]
        mixed = [torch.cat([x[:2], fresh[epoch]]) for x in some[:1]]
        return [((x, torch.full((), 0.5)), {}) for x in some + mixed]

    with (
        job(WritesItsInput, batches(0)[0], 2, tmp_path) as cached,
        job(WritesItsInput, batches(0)[0], 2, tmp_path, mode="off") as plain,
    ):
        for epoch in range(4):
            ours, theirs = batches(epoch), batches(epoch)
            assert farthest(cached.epochs(ours, 1), plain.epochs(theirs, 1)) < 1e-5
            for (a, _), (b, _) in zip(ours, theirs, strict=True):
                assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
        assert cached.cache.refused is None
        assert cached.cache.counters.full_batches > 5 and cached.cache.counters.partial_batches > 0
        assert cached.cache.counters.spot_checks > 2


def test_a_cut_whose_file_can_only_be_read_stays(tmp_path):
    """Nothing could be written for another one."""
    with job(SmallResNet, images()[0], 2, tmp_path) as cached:
        session = SimpleNamespace(prefix=SimpleNamespace(cut=2), state="open", read_only=True)
        assert cached.cache._stays(session, 3)
        assert not cached.cache._stays(session, 1)


class Centred(SmallResNet):
    """Its own buffer is read in front of the first block."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(1))

    def forward(self, x):
        return super().forward(x - self.mean)


def prefix_of(change=lambda model: None):
    torch.manual_seed(0)
    model = Centred()
    change(model)
    blocks = Blocks(model)
    with watch(model) as order:
        model(images()[0][0][0])
    blocks.order_by(order)
    blocks.move_to(2)
    return model, Prefix(model, blocks)


def test_buffers_around_the_blocks_and_settings_of_every_module_are_part_of_what_records_depend_on():
    model, plain = prefix_of()
    assert prefix_of()[1].digest() == plain.digest()
    assert prefix_of(lambda m: m.mean.fill_(3.0))[1].digest() != plain.digest()
    assert prefix_of(lambda m: setattr(m.blocks[0].conv, "padding_mode", "reflect"))[1].digest() != plain.digest()
    assert prefix_of(lambda m: setattr(m.stem[0], "padding_mode", "reflect"))[1].digest() != plain.digest()
    assert not plain.changed()
    model.mean.fill_(3.0)
    assert plain.changed()


def test_compact_records_stay_within_bfloat16s_error(tmp_path):
    """One rounding to 8 significant bits of the frontier's output: 2^-8 of each element, a few times that of a gradient."""
    for name in ("resnet", "bert"):
        make, batches, _ = CASES[name]
        ours, theirs, summary = both(make, batches, 2, tmp_path / name, exact=False)
        assert summary["full_batches"] >= 5
        assert not equal(ours, theirs)
        assert farthest(ours, theirs) < 0.05
        outputs = farthest([step[:1] for step in ours], [step[:1] for step in theirs])
        assert outputs < 0.01


def test_under_autocast_records_keep_their_bits(tmp_path):
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs, summary = both(SmallViT, images(), 2, tmp_path)
    assert summary["full_batches"] >= 5
    assert equal(ours, theirs)


def test_of_a_batch_with_some_known_samples_only_the_others_are_computed(tmp_path):
    known, fresh = images(4), torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(9))
    mixed = ((torch.cat([known[3][0][0], fresh])[[4, 0, 5, 1, 2, 6, 3]],), {})
    sizes = []
    with job(SmallResNet, known[0], 2, tmp_path) as cached, job(SmallResNet, known[0], 2, tmp_path, mode="off") as off:
        cached.epochs(known, 2)
        unit = cached.blocks[0].unit
        compute = unit.forward
        unit.forward = lambda x: sizes.append(len(x)) or compute(x)
        # The batch of 7 is of a new size: its first pass teaches the shapes, and computes everything.
        ours = [cached.step(mixed)]
        cached.cache.drain()
        again = [cached.step(((torch.cat([mixed[0][0][:4], fresh + 1]),), {}))]
        del unit.forward
        summary = cached.cache.summary()
        assert summary["partial_batches"] == 1
        assert sizes == [7, 3]
        assert equal(ours, [off.step(mixed)])
        assert farthest(again, [off.step(((torch.cat([mixed[0][0][:4], fresh + 1]),), {}))]) < 1e-5


def test_a_smaller_last_batch_is_read_too(tmp_path):
    batches = [*images(3, size=6), ((images(1, size=6)[0][0][0][:2],), {})]
    ours, theirs, summary = both(SmallResNet, batches, 3, tmp_path)
    assert summary["full_batches"] >= 5
    assert farthest(ours, theirs) < 1e-5


def test_a_stray_read_from_behind_the_frontier_goes_on_computing(tmp_path):
    """The target embedding runs in front of the encoder, so it freezes with its first layer; only the decoder reads it."""
    with job(EncoderDecoder, pairs()[0], 1, tmp_path) as cached:
        calls = []
        for name in ("source", "target"):
            module = getattr(cached.model, name)
            module.forward = lambda x, name=name, compute=module.forward: calls.append(name) or compute(x)
        cached.epochs(pairs(), 2)
        calls.clear()
        cached.step(pairs()[0])
    assert calls == ["target"]


# ---- what is not cached ---------------------------------------------------------------------------------------------


class Skips(nn.Module):
    """Reads the output of block 0 behind block 2, as a U-Net does."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 1)
        self.blocks = nn.ModuleList([Residual(4) for _ in range(4)])
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        first = self.blocks[0](self.stem(x))
        x = self.blocks[2](self.blocks[1](first)) + first
        return self.head(self.blocks[3](x).mean((2, 3)))


class Mixes(SmallResNet):
    """Normalises with the statistics of the batch, in evaluation too."""

    def __init__(self):
        super().__init__()
        self.blocks[0].norm = nn.BatchNorm2d(8, track_running_stats=False)


class Noisy(SmallResNet):
    """Noise that evaluation mode does not switch off."""

    def forward(self, x):
        return super().forward(x + 0.1 * torch.randn_like(x))


class Segments(SmallResNet):
    """A checkpoint around two blocks, recomputed in the backward when the short circuit is over."""

    def forward(self, x):
        x = self.blocks[0](self.stem(x))
        x = checkpoint(lambda t: self.blocks[2](self.blocks[1](t)), x, use_reentrant=False)
        return self.head(self.blocks[3](x).mean((2, 3)))


class LengthFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(30, 16)
        self.layers = nn.ModuleList([nn.TransformerEncoderLayer(16, 2, 16, dropout=0.0) for _ in range(3)])
        self.head = nn.Linear(16, 2)

    def forward(self, ids):
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(0))


class Opaque:
    def __init__(self, tensor):
        self.tensor = tensor


class ReturnsObject(SmallResNet):
    def forward(self, x):
        return Opaque(super().forward(x)).tensor


class WrapsBlock(nn.Module):
    """Its blocks hand an object from one to the next."""

    def __init__(self):
        super().__init__()

        class Step(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = Residual(4)

            def forward(self, x):
                return Opaque(self.inner(x.tensor))

        self.blocks = nn.ModuleList([Step() for _ in range(3)])
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        x = Opaque(x.expand(-1, 4, -1, -1).clone())
        for block in self.blocks:
            x = block(x)
        return self.head(x.tensor.mean((2, 3)))


def hooked(model):
    model.blocks[1].conv.register_forward_hook(lambda *_: None)


class OddlyCalled(Layer):
    def __call__(self, x):
        return self.forward(x)


IDS = [((ids,), {}) for (ids, _), _ in pairs()]
REFUSED = {
    "skip": (Skips, images(), {}, "reads inside block blocks.0 from behind"),
    "hook": (SmallResNet, images(), {"before": hooked}, "block blocks.1 has a hook on blocks.1.conv"),
    "tied": (TiedLanguageModel, IDS, {}, "embedding.weight in block layers.0 still trains"),
    "mixes": (Mixes, images(), {}, "block blocks.1 a sample depends on the rest of its batch"),
    "noisy": (Noisy, images(), {}, "up to blocks.1 compute with random numbers"),
    "length_first": (LengthFirst, IDS, {}, "block layers.1 a sample depends on the rest of its batch"),
    "object": (WrapsBlock, images(), {}, "block blocks.1: it returns a Opaque"),
    "gradient": (
        SmallResNet,
        [((torch.randn(4, 1, 8, 8, requires_grad=True),), {})] * 6,
        {},
        "'0' needs a gradient",
    ),
    "oddly_called": (lambda: vit_of(OddlyCalled), images(), {}, "blocks.0 is not called as other modules are"),
    "one_sample": (SmallResNet, images(8, size=1), {}, "no batch was fit for the check"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_a_model_that_cannot_be_cached_trains_on_and_the_line_says_why(name, tmp_path, caplog):
    make, batches, extra, why = REFUSED[name]
    ours, theirs, summary = both(make, batches, 2, tmp_path, **extra)
    assert summary["state"] == "refused"
    assert why in summary["reason"]
    assert caplog.text.count("go uncached") == 1
    assert summary["hits"] == 0
    if name != "noisy":  # which draws other numbers after the check, being random
        assert equal(ours, theirs)


def test_a_checkpoint_across_the_frontier_is_refused_and_one_behind_it_is_not(tmp_path):
    inside, _, summary = both(Segments, images(), 2, tmp_path / "inside")
    assert "reads" in summary["reason"]
    ours, theirs, summary = both(Segments, images(), 1, tmp_path / "behind")
    assert summary["reason"] is None
    assert summary["full_batches"] >= 5
    assert equal(ours, theirs)


def test_samples_that_are_always_new_close_the_gate_and_change_nothing(tmp_path):
    """Random crops, say: no sample comes twice."""
    batches = images(40)
    with job(SmallResNet, batches[0], 2, tmp_path, mode="auto", patience=48) as made:
        made.cache._session_now().gate.computed(1, 1.0)  # a prefix that it would pay to skip
        ours = made.epochs(batches, 1)
        counters = made.cache.counters
        assert made.cache.state == "closed"
        assert counters.hits == 0
        assert counters.batches < 30
    with job(SmallResNet, batches[0], 2, tmp_path, mode="off") as plain:
        assert equal(ours, plain.epochs(batches, 1))


def test_a_forward_that_the_reference_looks_at_computes(tmp_path):
    from kgt_ddp.reference.tap import ActivationTap

    with job(SmallResNet, images()[0], 2, tmp_path) as made:
        made.epochs(images(), 2)
        tap = ActivationTap(made.model, ["blocks.0"], limit=4)
        before = made.cache.counters.batches
        with tap.recording():
            made.step(images()[0])
        assert made.cache.counters.batches == before
        assert float(tap.take()["blocks.0"].abs().max()) > 0
        made.step(images()[0])
        assert made.cache.counters.batches == before + 1
        assert made.cache.refused is None


def test_a_compiled_model_is_refused(tmp_path):
    with job(SmallResNet, images()[0], 2, tmp_path) as cached:
        cached.blocks[0].unit.compile(backend="eager")
        cached.epochs(images(2), 1)
        assert "is compiled" in cached.cache.refused


class Bypasses(SmallResNet):
    """Calls past its blocks' own `forward`, as code does that was compiled before it was replaced."""

    bypassing = False

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = Residual.forward(block, x) if self.bypassing else block(x)
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("compiles", [False, True])
def test_a_model_that_no_longer_takes_what_it_is_given_computes_and_is_refused(compiles, tmp_path, caplog):
    with (
        job(Bypasses, images()[0], 2, tmp_path) as cached,
        job(Bypasses, images()[0], 2, tmp_path, mode="off") as plain,
    ):
        assert equal(cached.epochs(images(), 3), plain.epochs(images(), 3))
        assert cached.cache.counters.full_batches > 0
        if compiles:
            cached.model.forward = torch.compile(cached.model.forward, backend="eager")
        else:
            cached.model.bypassing = True
        assert equal(cached.epochs(images(), 2), plain.epochs(images(), 2))
        expected = "the model is compiled" if compiles else "block blocks.1 is not called as modules are any more"
        assert cached.cache.refused == expected
        assert caplog.text.count("go uncached") == 1


def test_a_forward_that_fails_refuses_nothing(tmp_path):
    with job(SmallResNet, images()[0], 2, tmp_path) as cached:
        for _ in range(3):
            with pytest.raises(RuntimeError):
                cached.wrapper(torch.randn(4, 2, 8, 8))
            cached.epochs(images(), 1)
        assert cached.cache.refused is None
        assert cached.cache.counters.full_batches > 0


def test_the_check_leaves_no_trace(tmp_path):
    """Random numbers, running statistics of active layers, modes and gradients are as without it."""
    make = lambda: SmallResNet(dropout=0.2)  # noqa: E731
    states = []
    for mode in ("on", "off"):
        with job(make, images()[0], 2, tmp_path, mode=mode) as made:
            torch.manual_seed(5)
            for arguments in images(5):
                made.wrapper(*arguments[0]).sum().backward()
            states.append((copy.deepcopy(made.model.state_dict()), torch.random.get_rng_state(), made.cache.counters))
    (ours, our_rng, counters), (theirs, their_rng, _) = states
    assert counters.check_s > 0
    assert torch.equal(our_rng, their_rng)
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)


def test_layers_of_a_list_in_a_model_of_the_users(tmp_path):
    """A model that makes its mask itself, from the ids, in front of the prefix."""

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(30, 16)
            self.layers = nn.ModuleList([nn.TransformerEncoderLayer(16, 2, 16, batch_first=True) for _ in range(3)])
            self.extra = Layer(16)
            self.head = nn.Linear(16, 2)

        def forward(self, ids):
            mask, x = ids == 0, self.embedding(ids)
            for layer in self.layers:
                x = layer(x, src_key_padding_mask=mask)
            return self.head(self.extra(x).masked_fill(mask[..., None], 0).sum(1))

    ids = [((a[1]["input_ids"],), {}) for a in texts(range(16))]
    ours, theirs, summary = both(Masked, ids, 2, tmp_path)
    assert summary["full_batches"] >= 5
    assert equal(ours, theirs)


def test_a_data_set_larger_than_the_budget_keeps_its_share_of_hits_and_the_budget(tmp_path):
    """Read in cycles, with room for a third of it: what is there stays there, in place of being pushed out."""
    batches = images(48)
    sample_bytes, budget = 8 * 8 * 8 * 4, 4096 + 64 * 2112
    with job(SmallResNet, batches[0], 2, tmp_path, budget_bytes=budget) as made:
        made.epochs(batches, 2)
        before = made.cache.summary()
        made.epochs(batches, 2)
        after = made.cache.summary()
        assert made.cache.refused is None
    rate = (after["hits"] - before["hits"]) / (2 * 4 * len(batches))
    assert 0.2 < rate <= 64 / (4 * len(batches)) + 0.02
    assert before["bytes_written"] > 60 * sample_bytes
    assert sum(f.stat().st_size for f in tmp_path.iterdir()) <= budget
