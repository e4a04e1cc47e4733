"""The blocks that the runtime would make of a model, in a process that has no wrapper."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from kgt_ddp.blocks import Blocks
from kgt_ddp.execution_order import watch


def ordered_blocks(model: nn.Module, *args: Any, **kwargs: Any) -> Blocks:
    """Blocks of `model` in order of execution, learned from one forward of `args` and `kwargs` in evaluation mode; the model is
    in training mode afterwards."""
    blocks = Blocks(model)
    model.eval()
    with torch.no_grad(), watch(model) as order:
        model(*args, **kwargs)
    model.train()
    blocks.order_by(order)
    return blocks
