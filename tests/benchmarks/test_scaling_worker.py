from __future__ import annotations

import torch

from benchmarks import scaling_worker
from benchmarks.scaling_model import Row


def test_a_profile_holds_medians_and_the_gradients_in_order_of_readiness():
    net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1, bias=False))
    net[0].bias.requires_grad_(False)
    rows = [Row(forward_s=s, backward_s=2 * s, optimizer_s=3 * s, ready_s=(0.5 * s, 0.1 * s)) for s in (1.0, 2.0, 9.0)]
    assert scaling_worker.profile(net, rows) == {
        **{"forward_s": 2.0, "backward_s": 4.0, "optimizer_s": 6.0},
        "gradients": [(0.2, 12), (1.0, 24)],
    }
