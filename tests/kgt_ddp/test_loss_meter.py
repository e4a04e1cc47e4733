from __future__ import annotations

import pytest
import torch

from kgt_ddp.inactive import Inactive
from kgt_ddp.loss_meter import LossMeter


def test_the_mean_since_the_last_look():
    meter = LossMeter()
    assert meter.take() is None
    weight = torch.tensor(3.0, requires_grad=True)
    for loss in (1.0, weight * 2, torch.tensor([1.0, 3.0], dtype=torch.bfloat16)):
        meter.add(loss)
    assert meter.take() == 3.0
    assert meter.take() is None
    meter.add(7)
    assert meter.take() == 7.0


@pytest.mark.parametrize("bad", [None, "0.3", torch.empty(0), torch.tensor(1j), [0.3]], ids=str)
def test_what_is_no_loss(bad):
    with pytest.raises(TypeError, match="a number or a tensor of numbers"):
        LossMeter().add(bad)


def test_a_script_may_report_it_with_freezing_off():
    Inactive("test").observe_loss(torch.tensor(0.5))
