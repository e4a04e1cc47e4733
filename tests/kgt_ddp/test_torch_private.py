from __future__ import annotations

import importlib

import pytest
import torch
import torch._dynamo
from torch.utils.checkpoint import checkpoint

from kgt_ddp import torch_private


@pytest.mark.parametrize("name", list(torch_private.PRIVATE_NAMES))
def test_every_private_name_exists(name):
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ImportError:
            continue
        for part in parts[length:]:
            found = getattr(found, part)
        return
    pytest.fail(f"{name} cannot be imported")


def test_inputs_of_reentrant_checkpoints_pass_through_and_the_swap_is_undone():
    original = torch.utils.checkpoint.CheckpointFunction
    seen = []

    def prepare(inputs):
        seen.append(len(inputs))
        return tuple(t.detach().requires_grad_() for t in inputs)

    layer = torch.nn.Linear(2, 2)
    with torch_private.reentrant_checkpoint_inputs(prepare):
        checkpoint(layer, torch.randn(3, 2), use_reentrant=True).sum().backward()
    assert seen == [1]
    assert layer.weight.grad is not None
    assert torch.utils.checkpoint.CheckpointFunction is original
