"""The CIFAR ResNets of He et al. 2015 (section 4.2) under timm's names: our trainer, timm's and torchdistill build the same network.

The peers import it too, in an environment of their own. Names of layers are those of akamaster/pytorch_resnet_cifar10,
whose weights are the teacher's. Shapes: B images, C channels, H W pixels, K classes.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from distill.models.timm_networks import import_timm_library

import_timm_library()  # repairs torchvision, which timm imports
from timm.models import register_model  # noqa: E402

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
"""Of R, G, B on the scale 0 to 1: what the published weights were trained with."""


class Block(nn.Module):
    """Two 3x3 convolutions; where the size changes the shortcut takes every second pixel and fills up with zero channels (option A)."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride, self.extra = stride, (channels - in_channels) // 2

    def forward(self, features_BCHW: Tensor) -> Tensor:
        """[B,in_channels,H,W] -> [B,channels,H/stride,W/stride]."""
        shortcut = features_BCHW
        if self.stride > 1:
            shortcut = F.pad(features_BCHW[:, :, ::2, ::2], (0, 0, 0, 0, self.extra, self.extra))
        inner = F.relu(self.bn1(self.conv1(features_BCHW)))
        return F.relu(self.bn2(self.conv2(inner)) + shortcut)


class CifarResNet(nn.Module):
    """6n + 2 layers: a stem of 16 channels, three groups of n blocks with 16, 32, 64, and a linear classifier."""

    def __init__(self, num_blocks: int, num_classes: int) -> None:
        super().__init__()
        self.num_classes, self.in_chans = num_classes, 3
        self.pretrained_cfg: dict[str, Any] = {
            "input_size": (3, 32, 32),
            "mean": MEAN,
            "std": STD,
            "crop_pct": 1.0,
            "interpolation": "bilinear",
            "classifier": "linear",
            "num_classes": num_classes,
        }
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._group(16, 16, num_blocks, 1)
        self.layer2 = self._group(16, 32, num_blocks, 2)
        self.layer3 = self._group(32, 64, num_blocks, 2)
        self.linear = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    @staticmethod
    def _group(in_channels: int, channels: int, num_blocks: int, stride: int) -> nn.Sequential:
        first = Block(in_channels, channels, stride)
        return nn.Sequential(first, *(Block(channels, channels, 1) for _ in range(num_blocks - 1)))

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """float [B,3,H,W], normalised -> logits [B,K]."""
        features_BCHW = F.relu(self.bn1(self.conv1(images_BCHW)))
        features_BCHW = self.layer3(self.layer2(self.layer1(features_BCHW)))
        logits_BK: Tensor = self.linear(features_BCHW.mean(dim=(2, 3)))
        return logits_BK


@register_model
def cifar_resnet20(pretrained: bool = False, num_classes: int | None = None, **_: Any) -> CifarResNet:
    """ResNet-20."""
    return CifarResNet(3, num_classes or 10)


@register_model
def cifar_resnet56(pretrained: bool = False, num_classes: int | None = None, **_: Any) -> CifarResNet:
    """ResNet-56."""
    return CifarResNet(9, num_classes or 10)
