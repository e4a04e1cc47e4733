"""When the reductions of a backward are waited for."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from kgt_ddp import torch_private
from kgt_ddp.comm_hook import FreezeHookState


class Work:
    def __init__(self) -> None:
        self.waited = False

    def wait(self) -> None:
        self.waited = True


@pytest.mark.parametrize("last", [0, 1])
def test_all_is_waited_for_before_the_reducer_looks_also_with_backwards_inside_the_backward(last):
    """Layers 1 and 2 are reentrant checkpoints. The reducer looks at the end of that backward, outer or inner, in which
    the last gradient comes: layer 0's or, where that is frozen, layer 1's."""
    layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
    state = FreezeHookState(SimpleNamespace(size=lambda: 2), [list(layer.parameters()) for layer in layers])
    works: dict[int, Work] = {}
    not_waited_for: list[list[int]] = []

    def reduce(index: int) -> None:
        works[index] = Work()
        state.wait_later(works[index], torch.device("cpu"))
        if index == last:
            torch_private.at_end_of_backward(
                lambda: not_waited_for.append([i for i, w in works.items() if not w.waited])
            )

    for index, layer in enumerate(layers[last:], last):
        layer.weight.register_post_accumulate_grad_hook(lambda _, index=index: reduce(index))
    for p in layers[:last].parameters():
        p.requires_grad_(False)
    for _ in range(2):
        works.clear()
        x = layers[0](torch.randn(2, 4))
        x = x if x.requires_grad else x.requires_grad_()
        for layer in layers[1:3]:
            x = checkpoint(layer, x, use_reentrant=True)
        layers[3](x).sum().backward()
        assert sorted(works) == list(range(last, 4))
    assert not_waited_for == [[], []]


def test_what_a_backward_that_raised_left_behind_is_waited_for_by_the_next_one():
    layer = nn.Linear(4, 4)
    state = FreezeHookState(SimpleNamespace(size=lambda: 2), [list(layer.parameters())])
    works: list[Work] = []

    def reduce(_: torch.Tensor) -> None:
        works.append(Work())
        state.wait_later(works[-1], torch.device("cpu"))
        if len(works) == 1:
            raise ValueError("something of the user's")

    layer.weight.register_post_accumulate_grad_hook(reduce)
    with pytest.raises(ValueError, match="of the user's"):
        layer(torch.randn(2, 4)).sum().backward()
    layer(torch.randn(2, 4)).sum().backward()
    assert [work.waited for work in works] == [True, True]
