"""What the example scripts say to kgtrun, and at the end of a run: its cost, and what freezing left out."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def frozen_so_far(model: nn.Module) -> str:
    """For the line of an epoch: how many front blocks are frozen; empty where nothing of ours is active."""
    freezing = getattr(model, "freezing", None)
    if freezing is None or not freezing.active:
        return ""
    return f"  {freezing.frontier} of {freezing.summary()['num_blocks']} blocks frozen"


def tell_loss(model: nn.Module, loss: torch.Tensor) -> None:
    """Only the policy kgt-paper looks at the loss; no other needs this line in a script."""
    if hasattr(model, "freezing"):
        model.freezing.observe_loss(loss)


def report(figures: dict[str, Any]) -> str:
    """What the run cost and what it left out, for a reader at a terminal."""
    lines = [
        f"test accuracy    {figures['accuracy']:.2%}",
        f"training took    {figures['train_wall_s']:.1f} s, "
        f"{figures['train_cpu_s']:.1f} CPU seconds over {figures['world_size']} ranks",
    ]
    saved = figures.get("freezing", {"active": False, "reason": "stock DistributedDataParallel"})
    if not saved["active"]:
        return "\n".join([*lines, f"blocks frozen    none: {saved['reason']}"])
    when = ", ".join(f"{f['frontier']} from step {f['step']}" for f in saved["freezes"]) or "none"
    lines.append(f"blocks frozen    {when} (of {saved['num_blocks']} blocks, {figures['steps']} steps)")
    lines.append(
        f"backward passes  {backward_left_out(saved, figures['steps']):.0%} of them left out, by block and step"
    )
    reduced, dropped = saved["reduced_bytes"], saved["dropped_bytes"]
    share = dropped / max(reduced + dropped, 1)
    lines.append(
        f"gradients        {reduced / 1e6:.1f} MB reduced, {dropped / 1e6:.1f} MB left out ({share:.0%}) by each rank"
    )
    return "\n".join(lines)


def backward_left_out(saved: dict[str, Any], num_steps: int) -> float:
    """Share of all (block, step) pairs in which a block was frozen and had no backward pass."""
    ends = [freeze["step"] for freeze in saved["freezes"][1:]] + [num_steps]
    pairs = zip(saved["freezes"], ends, strict=False)
    return sum(f["frontier"] * (end - f["step"]) for f, end in pairs) / (saved["num_blocks"] * num_steps)
