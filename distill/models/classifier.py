"""A classifier as everything else sees it: uint8 crops in, logits out. Teachers and students are both this.

Shapes: B crops, H W pixels, C = 3 channels, D features, K classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from distill.errors import ConfigError
from distill.models.imported_network import create_imported
from distill.models.projection_head import ProjectionHead
from distill.models.resnet import ResNet
from distill.models.settings import NetworkSettings
from distill.teacher_info import Preprocessing


class Normalize(nn.Module):
    """The first layer of every network: casts uint8 crops to float, scales to 0..1, subtracts the mean, divides by the std."""

    mean_C11: Tensor
    std_C11: Tensor

    def __init__(self, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.register_buffer("mean_C11", torch.tensor(preprocessing.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std_C11", torch.tensor(preprocessing.std).view(3, 1, 1), persistent=False)

    def forward(self, crops_BHWC: Tensor) -> Tensor:
        """uint8 [B,H,W,3] -> float32 [B,3,H,W]."""
        scaled_BCHW = crops_BHWC.permute(0, 3, 1, 2).to(torch.float32) / 255.0
        return (scaled_BCHW - self.mean_C11) / self.std_C11


class Classifier(nn.Module):
    """uint8 crops to logits.

    Args:
        body: float [B,3,H,W], normalised, to logits [B,K].
        preprocessing: the contract between image and network; its mean and std become the first layer.
    """

    def __init__(self, body: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.preprocessing = preprocessing
        self.normalize = Normalize(preprocessing)
        self.body = body

    def forward(self, crops_BHWC: Tensor) -> Tensor:
        """uint8 [B,H,W,3] -> logits float32 [B,K]."""
        return self.body(self.normalize(crops_BHWC)).float()


class ResNetClassifier(nn.Module):
    """Backbone, the first layers of the projection head (SimCLRv2 fine-tunes from the middle of the head), and a linear classifier."""

    def __init__(self, backbone: ResNet, neck: nn.Sequential, num_classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.neck = neck
        self.linear = nn.Linear(backbone.feature_dim, num_classes)
        nn.init.zeros_(self.linear.weight)  # logits start at 0, as in the official fine-tuning
        nn.init.zeros_(self.linear.bias)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """float [B,3,H,W], normalised -> logits [B,K]."""
        return self.linear(self.neck(self.backbone(images_BCHW)))


def build_backbone(network: NetworkSettings) -> ResNet:
    """The backbone that the settings name, freshly initialised.

    Raises:
        ConfigError: not one of our ResNets (only they have a projection head to pretrain).
    """
    if network.name != "resnet":
        raise ConfigError(f"network {network.name!r} has no backbone of ours to pretrain; use name: resnet")
    return ResNet(network.depth, network.width_multiplier, network.sk_ratio, network.stem)


def check_image_size(network: NetworkSettings, image_size: int) -> None:
    """Refuse crops that the network would shrink to nothing.

    Raises:
        ConfigError: the crops are smaller than the network's total stride.
    """
    if network.name == "resnet" and image_size < network.total_stride:
        raise ConfigError(
            f"image_size {image_size} is smaller than the network's total stride {network.total_stride};"
            " use larger crops or stem: cifar (total stride 8)"
        )


def build_classifier(network: NetworkSettings, num_classes: int, preprocessing: Preprocessing, num_head_layers: int = 0) -> Classifier:
    """A freshly initialised classifier.

    Args:
        num_head_layers: layers of the projection head between backbone and linear classifier; 0 for students.

    Raises:
        ConfigError: see `check_image_size`, `create_timm`, `create_imported`.
    """
    if network.name.startswith("timm:"):
        from distill.models.timm_networks import create_timm  # an extra; its import costs seconds

        return Classifier(create_timm(network.name.removeprefix("timm:"), num_classes).network, preprocessing)
    if network.name != "resnet":
        return Classifier(create_imported(network.name, num_classes, preprocessing.image_size), preprocessing)
    check_image_size(network, preprocessing.image_size)
    backbone = build_backbone(network)
    neck = ProjectionHead(backbone.feature_dim, num_layers=num_head_layers + 1).first_layers(num_head_layers)
    return Classifier(ResNetClassifier(backbone, neck, num_classes), preprocessing)
