"""What a snapshot of the weights carries, and what it leaves out."""

from __future__ import annotations

import torch

from kgt_ddp.reference.selection import EVERYTHING, Selection, runs_of_positions


def weights() -> dict[str, torch.Tensor]:
    return {name: torch.zeros(3) for name in ("layer1.weight", "layer1.bias", "layer10.weight", "layer2.weight")}


def test_everything_is_sent_while_everything_moves() -> None:
    selection, tensors = Selection(), weights()
    assert selection.choose(tensors, ()) == list(tensors)
    assert selection.choose(tensors, ()) == list(tensors)


def test_a_block_that_no_longer_moves_is_sent_once_more_and_then_left_out() -> None:
    selection, tensors = Selection(), weights()
    assert selection.choose(tensors, ["layer1"]) == list(tensors)
    assert selection.choose(tensors, ["layer1"]) == ["layer10.weight", "layer2.weight"]


def test_a_write_into_a_frozen_block_sends_that_tensor_again() -> None:
    selection, tensors = Selection(), weights()
    selection.choose(tensors, ["layer1"])
    tensors["layer1.bias"].add_(1)
    assert selection.choose(tensors, ["layer1"]) == ["layer1.bias", "layer10.weight", "layer2.weight"]
    assert selection.choose(tensors, ["layer1"]) == ["layer10.weight", "layer2.weight"]


def test_a_tensor_put_in_the_place_of_a_frozen_one_is_sent() -> None:
    selection, tensors = Selection(), weights()
    selection.choose(tensors, ["layer1"])
    replaced = {**tensors, "layer1.weight": torch.ones(3)}
    assert "layer1.weight" in selection.choose(replaced, ["layer1"])


def test_a_block_that_moved_in_between_is_sent_anew_when_it_stands_still_again() -> None:
    selection, tensors = Selection(), weights()
    selection.choose(tensors, ["layer1"])
    selection.choose(tensors, ())
    assert "layer1.weight" in selection.choose(tensors, ["layer1"])


def test_names_become_runs_of_positions() -> None:
    assert runs_of_positions(["c", "d", "a", "f"], "abcdef") == [[0, 1], [2, 4], [5, 6]]
    assert runs_of_positions([], "abc") == []


def test_a_write_that_torch_does_not_count_is_sent_in_the_end() -> None:
    selection, tensors = Selection(), weights()
    sent = []
    for _ in range(2 * EVERYTHING):
        tensors["layer1.bias"].data.add_(1)
        sent.append("layer1.bias" in selection.choose(tensors, ["layer1"]))
    assert sent == [True, *[False] * 6, True, *[False] * 7, True]
