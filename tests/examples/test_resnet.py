from __future__ import annotations

import torch
from resnet import BasicBlock, resnet20


def test_it_is_the_twenty_layer_network_of_the_paper() -> None:
    net = resnet20()
    weighted = [m for m in net.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
    shortcuts = [m for m in weighted if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (1, 1)]
    assert len(weighted) - len(shortcuts) == 20
    assert len([m for m in net.modules() if isinstance(m, BasicBlock)]) == 9
    assert sum(p.numel() for p in net.parameters()) == 272_186


def test_images_go_in_and_class_scores_come_out() -> None:
    assert resnet20()(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    assert resnet20(in_channels=3, num_classes=100)(torch.zeros(2, 3, 32, 32)).shape == (2, 100)


def test_every_parameter_gets_a_gradient() -> None:
    net = resnet20()
    net(torch.randn(4, 1, 28, 28)).sum().backward()
    assert all(p.grad is not None for p in net.parameters())
