"""Real texts, padded as they come: MiniLM's weights, and an encoder-decoder, train with the cache as without it.

Skipped where `scripts/data language` has not fetched them. The encoder-decoder is a small T5 of random weights without
dropout (a dropout module that serves several of T5's places keeps its prefix from being cached).
"""

from __future__ import annotations

import copy
import importlib
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.kgt_ddp.activation_cache.jobs import equal, farthest, job

ROOT = Path(__file__).resolve().parents[3]
REAL = Path(os.environ.get("KGTRUN_LANGUAGE_DIR") or ROOT / ".data" / "language")
"""Read on import: inside a test no variable of kgtrun is set."""
TEXTS, BATCH, MOST_TOKENS = 36, 6, 24


@pytest.fixture(scope="module")
def example():
    """The module of the example, if its weights and texts are there."""
    pytest.importorskip("transformers")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "examples"))
        module = importlib.import_module("minilm_newsgroups")
    if not (REAL / module.MODEL).is_dir() or not (REAL / module.TEXTS).is_dir():
        pytest.skip(f"there are no weights and texts in {REAL.name}: scripts/data language fetches them")
    return module


@pytest.fixture(scope="module")
def texts(example):
    """The beginnings of some posts, of 3 to 19 words, as token ids: of most lengths up to `MOST_TOKENS`."""
    from transformers import AutoTokenizer

    rows = example.read_split(REAL, "train")[:TEXTS]
    tokenizer = AutoTokenizer.from_pretrained(REAL / example.MODEL)
    beginnings = [" ".join(text.split()[: 3 + 7 * i % 17]) for i, (_, text) in enumerate(rows)]
    ids = tokenizer(beginnings, truncation=True, max_length=MOST_TOKENS)["input_ids"]
    assert len({len(tokens) for tokens in ids}) > 5
    return [(tokens, i % example.NUM_CLASSES) for i, tokens in enumerate(ids)]


@pytest.fixture(scope="module")
def minilm(example):
    """Scores and loss of the example's classifier."""
    from transformers.modeling_outputs import SequenceClassifierOutput

    class WithLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.classifier = example.classifier(REAL)

        def forward(self, input_ids, attention_mask, labels):
            logits = self.classifier(input_ids, attention_mask)
            return SequenceClassifierOutput(loss=nn.functional.cross_entropy(logits, labels), logits=logits)

    loaded = WithLoss()
    return lambda: copy.deepcopy(loaded)


def batches(example, texts, seed=None):
    """An epoch: in the given order, or in one by `seed`, each batch padded to its longest text."""
    order = range(len(texts)) if seed is None else torch.randperm(len(texts), generator=_by(seed)).tolist()
    made = []
    for start in range(0, len(texts), BATCH):
        chosen = [texts[i] for i in order[start : start + BATCH]]
        ids, mask, labels = example.padded(chosen, torch.device("cpu"))
        made.append(((), {"input_ids": ids, "attention_mask": mask, "labels": labels}))
    return made


def _by(seed):
    return torch.Generator().manual_seed(seed)


def shapes(epoch):
    return {tuple(kwargs["input_ids"].shape) for _, kwargs in epoch}


def behind(made, seen):
    """Notes what the first active block is given."""
    unit = made.blocks[made.blocks.frontier].unit
    unit.register_forward_pre_hook(lambda _, args, kwargs: seen.append(args[0].detach()), with_kwargs=True)


@pytest.mark.parametrize("frontier", [3, 5])
def test_minilms_loss_and_gradients_are_those_without_the_cache_bit_for_bit(frontier, example, texts, minilm, tmp_path):
    epoch = batches(example, texts)
    assert len(shapes(epoch)) > 1, "padded dynamically"
    with (
        job(minilm, epoch[0], frontier, tmp_path) as cached,
        job(minilm, epoch[0], frontier, tmp_path, mode="off") as plain,
    ):
        cached.epochs(epoch, 2)
        before = copy.copy(cached.cache.counters)
        assert equal(cached.epochs(epoch, 1), plain.epochs(epoch, 1))
        assert cached.cache.refused is None
        assert cached.cache.counters.full_batches - before.full_batches == len(epoch)
        assert cached.cache.counters.hits - before.hits == TEXTS


def test_minilm_over_texts_padded_to_another_length_each_time_and_in_bfloat16(example, texts, minilm, tmp_path):
    """Exact records: padding moves the last bits, as it does without a cache. bf16: each element of the frontier's output is
    rounded once, by at most 2^-8 of itself; loss and gradients move by a few times that."""
    first, second, other = (batches(example, texts, seed) for seed in range(3))
    runs = {"exact": {}, "compact": {"exact": False}, "plain": {"mode": "off"}}
    results, given = {}, {name: [] for name in runs}
    for name, options in runs.items():
        with job(minilm, first[0], 4, tmp_path / name, **options) as made:
            if name != "plain":
                made.epochs(first, 1)
                made.epochs(second, 1)
            before = copy.copy(made.cache.counters)
            behind(made, given[name])
            results[name] = made.epochs(other, 1)
            if name != "plain":
                assert made.cache.counters.full_batches - before.full_batches == len(other)
                assert made.cache.counters.misses == before.misses
    assert farthest(results["exact"], results["plain"]) < 2e-5
    assert not equal(results["compact"], results["plain"])
    assert farthest(results["compact"], results["plain"]) < 0.05
    assert farthest([step[:1] for step in results["compact"]], [step[:1] for step in results["plain"]]) < 0.01
    for (_, kwargs), ours, theirs in zip(other, given["compact"], given["plain"], strict=True):
        real = kwargs["attention_mask"].bool()
        off = (ours - theirs).abs()[real] - 2.0**-8 * theirs.abs()[real]
        assert float(off.max()) < 1e-5, "what padding moves comes on top"


def t5():
    import transformers

    config = transformers.T5Config(
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=3,
        num_heads=4,
        vocab_size=30_522,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        tie_word_embeddings=False,
        use_cache=False,
    )
    return transformers.T5ForConditionalGeneration(config)


def without_embeddings(model):
    """Encoder and decoder share their embeddings, which would train on through the decoder."""
    model.shared.requires_grad_(False)


@pytest.mark.parametrize("frontier", [1, 2])
def test_an_encoder_decoder_learns_real_texts_as_without_the_cache(frontier, example, texts, tmp_path):
    """From each text to the next one, with padding on both sides."""

    def pairs(seed=None):
        sources = batches(example, texts, seed)
        targets = [kwargs["input_ids"] for _, kwargs in batches(example, texts[1:] + texts[:1], seed)]
        for (_, kwargs), target in zip(sources, targets, strict=True):
            kwargs["labels"] = target.masked_fill(target == 0, -100)
        return sources

    epoch = pairs()
    assert len(shapes(epoch)) > 1
    with (
        job(t5, epoch[0], frontier, tmp_path, before=without_embeddings) as cached,
        job(t5, epoch[0], frontier, tmp_path, before=without_embeddings, mode="off") as plain,
    ):
        cached.epochs(epoch, 3)
        before = copy.copy(cached.cache.counters)
        assert equal(cached.epochs(epoch, 1), plain.epochs(epoch, 1))
        assert cached.cache.refused is None
        assert cached.cache.counters.full_batches - before.full_batches == len(epoch)
        for seed in (1, 2):
            ours, theirs = cached.epochs(pairs(seed), 1), plain.epochs(pairs(seed), 1)
            assert farthest(ours, theirs) < 2e-5
        assert cached.cache.refused is None
    with job(t5, epoch[0], frontier, tmp_path) as training_embeddings:
        training_embeddings.epochs(epoch, 1)
        assert "shared.weight in block encoder.block.0 still trains" in training_embeddings.cache.refused
