from __future__ import annotations

import os
from pathlib import Path

import minilm_newsgroups
import pytest
import torch
from torch import nn

CPU = torch.device("cpu")
REAL = Path(os.environ.get("KGTRUN_LANGUAGE_DIR") or minilm_newsgroups.DATA)
"""Read on import: inside a test no variable of kgtrun is set."""


class Echo(nn.Module):
    """An encoder that returns each token's id as its feature."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> object:
        class Output:
            last_hidden_state = input_ids.unsqueeze(2).float()

        return Output()


def test_a_batch_is_padded_to_its_longest_text() -> None:
    ids, mask, labels = minilm_newsgroups.padded([([5, 6, 7], 1), ([8], 0)], CPU)
    assert ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert labels.tolist() == [1, 0]


def test_padding_does_not_count_in_the_mean() -> None:
    net = minilm_newsgroups.MeanPooledClassifier(Echo(), 1, 1)
    nn.init.ones_(net.head.weight)
    nn.init.zeros_(net.head.bias)
    ids, mask, _ = minilm_newsgroups.padded([([2, 4], 0), ([6, 6, 6, 6], 0)], CPU)
    assert net(ids, mask).flatten().tolist() == [3.0, 6.0]


def test_the_learning_rate_rises_for_a_tenth_of_the_job_and_falls_to_nothing() -> None:
    factors = [minilm_newsgroups.warm_up_then_linear(step, 100) for step in range(101)]
    assert factors[0] == pytest.approx(0.1)
    assert max(factors) == 1.0 == factors[9]
    assert factors[55] == pytest.approx(0.5)
    assert factors[100] == 0.0
    assert minilm_newsgroups.warm_up_then_linear(0, 0) == 0.0


def test_texts_are_mixed_alike_in_every_run_and_classes_do_not_depend_on_the_number(tiny_language: Path) -> None:
    few = minilm_newsgroups.load(tiny_language, "train", 40, 128)
    many = minilm_newsgroups.load(tiny_language, "train", 200, 128)
    assert many[:40] == few
    assert len({label for _, label in few}) > 10, "the file is sorted by group"
    assert {label for _, label in many} == set(range(20))
    assert {len(tokens) for tokens, _ in many} == set(range(4, 11))
    assert len({tokens[1] for tokens, _ in many}) == 20, "every word is known"
    assert all(len(tokens) <= 5 for tokens, _ in minilm_newsgroups.load(tiny_language, "train", 40, 5))


def test_more_texts_than_there_are_is_an_error(tiny_language: Path) -> None:
    with pytest.raises(SystemExit, match="201 texts of 'train' asked for; there are 200"):
        minilm_newsgroups.load(tiny_language, "train", 201, 128)


def test_missing_data_names_the_script_that_fetches_it(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="scripts/data language"):
        minilm_newsgroups.read_split(tmp_path, "train")


@pytest.mark.skipif(not REAL.is_dir(), reason="20 Newsgroups is not here; scripts/data language fetches it")
def test_the_real_texts_have_the_published_splits() -> None:
    train, test = (minilm_newsgroups.read_split(REAL, split) for split in ("train", "test"))
    assert (len(train), len(test)) == (11_293, 7_528)
    assert {group for group, _ in train} == {group for group, _ in test}
    assert len({group for group, _ in train}) == minilm_newsgroups.NUM_CLASSES
