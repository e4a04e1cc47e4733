"""The CIFAR-style ResNet-20 of the examples and benchmarks: nothing but the network.

A 3x3 stem, three stages of three basic blocks (16, 32, 64 channels; the second and third stage halve the image), mean
over the image, one linear layer. About 0.27 million parameters. He et al., "Deep Residual Learning for Image
Recognition" (2015), section 4.2; the shortcut of a block that changes its shape is a 1x1 convolution.
"""

from __future__ import annotations

import torch
from torch import nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class ResNet(nn.Module):
    """Residual network for small images: (batch, in_channels, height, width) to (batch, num_classes)."""

    def __init__(
        self, *, blocks_per_stage: int = 3, width: int = 16, in_channels: int = 1, num_classes: int = 10
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        )
        self.stage1 = self._stage(width, width, blocks_per_stage, stride=1)
        self.stage2 = self._stage(width, 2 * width, blocks_per_stage, stride=2)
        self.stage3 = self._stage(2 * width, 4 * width, blocks_per_stage, stride=2)
        self.head = nn.Linear(4 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @staticmethod
    def _stage(in_channels: int, out_channels: int, num_blocks: int, stride: int) -> nn.Sequential:
        first = BasicBlock(in_channels, out_channels, stride)
        return nn.Sequential(first, *(BasicBlock(out_channels, out_channels) for _ in range(num_blocks - 1)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stage3(self.stage2(self.stage1(self.stem(x))))
        return self.head(x.mean(dim=(2, 3)))


def resnet20(in_channels: int = 1, num_classes: int = 10) -> ResNet:
    """ResNet-20: 6 convolution layers a stage, plus stem and head."""
    return ResNet(blocks_per_stage=3, width=16, in_channels=in_channels, num_classes=num_classes)
