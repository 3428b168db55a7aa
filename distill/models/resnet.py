"""ResNet with a width multiplier and selective kernels: the backbone of SimCLRv2's teachers, and of our own students.

Layer by layer this follows the official TensorFlow code of SimCLRv2 (arXiv 2006.10029, appendix; google-research/simclr), because published
weights only make sense in exactly that graph. Where it differs from the common PyTorch ResNet a comment says so. Depths 10, 14 and 26 are
ours, for small images: one or two blocks a group.

Shapes: B images, C channels, H W pixels, D features (the width of the last group). Input is float, normalised.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Stem = Literal["imagenet", "cifar"]

NUM_STREAMS = 2  # of a selective kernel: both are 3x3 convolutions, made as one convolution of twice the width
MIN_SK_WIDTH = 32  # floor of the squeezed width of a selective kernel
BN_EPS = 1e-5
BN_MOMENTUM = 0.1  # TensorFlow's decay of 0.9


ONEDNN_LANES = 8
"""Channels that oneDNN's kernels for AVX2 take at once."""


class NarrowProjection(nn.Conv2d):
    """A strided 1x1 convolution of fewer than 8 channels; in training the pixels are picked first, then convolved.

    With channels last, as uint8 crops come, the backward pass of the strided form in oneDNN (torch 2.13, processors with AVX2 and no
    AVX-512) writes beyond its memory: the process dies in `free()`, or worse, does not.
    """

    def forward(self, input: Tensor) -> Tensor:
        """[B,C,H,W] -> [B,C',ceil(H/stride),ceil(W/stride)]."""
        if not self.training:
            return super().forward(input)
        step_h, step_w = self.stride
        return F.conv2d(input[:, :, ::step_h, ::step_w].contiguous(), self.weight)


def conv(in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    """A convolution without bias, padded by (kernel - 1) // 2 on both sides; initialised as in the official code (fan-in, truncated)."""
    kind = NarrowProjection if kernel == 1 and stride > 1 and in_channels < ONEDNN_LANES else nn.Conv2d
    layer = kind(in_channels, out_channels, kernel, stride, padding=(kernel - 1) // 2, bias=False)
    # Cut off at two sigma a normal keeps 0.88 of its spread; TensorFlow widens sigma first, so that 1 / sqrt(fan-in) is left.
    sigma = (in_channels * kernel * kernel) ** -0.5 / 0.87962566
    nn.init.trunc_normal_(layer.weight, std=sigma, a=-2 * sigma, b=2 * sigma)
    return layer


def batch_norm(channels: int, zero_init: bool = False) -> nn.BatchNorm2d:
    """Batch norm; `zero_init` starts a residual block as the identity (its last norm's scale is 0)."""
    norm = nn.BatchNorm2d(channels, eps=BN_EPS, momentum=BN_MOMENTUM)
    if zero_init:
        nn.init.zeros_(norm.weight)
    return norm


class SamePadMaxPool(nn.Module):
    """3x3 max-pool of stride 2, TensorFlow's SAME padding: an even side is padded at its far end only, unlike `MaxPool2d(padding=1)`."""

    def forward(self, features_BCHW: Tensor) -> Tensor:
        """[B,C,H,W] -> [B,C,ceil(H/2),ceil(W/2)]."""
        near_h, near_w = features_BCHW.shape[2] % 2, features_BCHW.shape[3] % 2
        padded = F.pad(features_BCHW, (near_w, 1, near_h, 1), value=float("-inf"))
        return F.max_pool2d(padded, kernel_size=3, stride=2)


class ShortcutPool(nn.Module):
    """2x2 average pool before the 1x1 projection of a ResNet-D shortcut, with the two border rules of the official code.

    Stride 2 pads one zero at the far end and counts it; stride 1 pads the same but averages real pixels only.
    """

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, features_BCHW: Tensor) -> Tensor:
        """[B,C,H,W] -> [B,C,ceil(H/stride),ceil(W/stride)]."""
        sums = F.avg_pool2d(F.pad(features_BCHW, (0, 1, 0, 1)), kernel_size=2, stride=self.stride)
        if self.stride > 1:
            return sums
        ones = torch.ones_like(features_BCHW[:1, :1])
        return sums / F.avg_pool2d(F.pad(ones, (0, 1, 0, 1)), kernel_size=2, stride=1)


class SelectiveKernel(nn.Module):
    """Two 3x3 streams, mixed per channel by a softmax that a squeezed global average computes (Li et al. 2019, as SimCLRv2 uses it)."""

    def __init__(self, in_channels: int, channels: int, stride: int, sk_ratio: float) -> None:
        super().__init__()
        squeezed = max(int(channels * sk_ratio), MIN_SK_WIDTH)
        self.streams = nn.Sequential(conv(in_channels, NUM_STREAMS * channels, 3, stride), batch_norm(NUM_STREAMS * channels), nn.ReLU())
        self.squeeze = nn.Sequential(conv(channels, squeezed, 1), batch_norm(squeezed), nn.ReLU())
        self.select = conv(squeezed, NUM_STREAMS * channels, 1)

    def forward(self, features_BCHW: Tensor) -> Tensor:
        """[B,in_channels,H,W] -> [B,channels,H/stride,W/stride], already through BN and ReLU."""
        first_BCHW, second_BCHW = self.streams(features_BCHW).chunk(NUM_STREAMS, dim=1)
        summary_BC11 = (first_BCHW + second_BCHW).mean(dim=(2, 3), keepdim=True)
        first_weight, second_weight = self.select(self.squeeze(summary_BC11)).chunk(NUM_STREAMS, dim=1)
        # A softmax over two streams is a sigmoid of their difference.
        share_BC11 = torch.sigmoid(first_weight - second_weight)
        return share_BC11 * first_BCHW + (1 - share_BC11) * second_BCHW


def shortcut(in_channels: int, out_channels: int, stride: int, sk_ratio: float) -> nn.Module:
    """The projection of a group's first block: ResNet-D (pool, then 1x1) with selective kernels, else a strided 1x1."""
    if sk_ratio > 0:
        return nn.Sequential(ShortcutPool(stride), conv(in_channels, out_channels, 1), batch_norm(out_channels))
    return nn.Sequential(conv(in_channels, out_channels, 1, stride), batch_norm(out_channels))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions. Selective kernels change its shortcut only, as in the official code."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int, sk_ratio: float, project: bool) -> None:
        super().__init__()
        self.shortcut = shortcut(in_channels, channels, stride, sk_ratio) if project else nn.Identity()
        self.residual = nn.Sequential(
            conv(in_channels, channels, 3, stride),
            batch_norm(channels),
            nn.ReLU(),
            conv(channels, channels, 3),
            batch_norm(channels, zero_init=True),
        )

    def forward(self, features_BCHW: Tensor) -> Tensor:
        """[B,in_channels,H,W] -> [B,channels,H/stride,W/stride]."""
        return F.relu(self.residual(features_BCHW) + self.shortcut(features_BCHW))


class BottleneckBlock(nn.Module):
    """1x1, 3x3 (strided, or a selective kernel), 1x1 to four times the channels."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int, sk_ratio: float, project: bool) -> None:
        super().__init__()
        out_channels = channels * self.expansion
        self.shortcut = shortcut(in_channels, out_channels, stride, sk_ratio) if project else nn.Identity()
        middle: nn.Module = (
            SelectiveKernel(channels, channels, stride, sk_ratio)
            if sk_ratio > 0
            else nn.Sequential(conv(channels, channels, 3, stride), batch_norm(channels), nn.ReLU())
        )
        self.residual = nn.Sequential(
            conv(in_channels, channels, 1),
            batch_norm(channels),
            nn.ReLU(),
            middle,
            conv(channels, out_channels, 1),
            batch_norm(out_channels, zero_init=True),
        )

    def forward(self, features_BCHW: Tensor) -> Tensor:
        """[B,in_channels,H,W] -> [B,4*channels,H/stride,W/stride]."""
        return F.relu(self.residual(features_BCHW) + self.shortcut(features_BCHW))


BLOCKS_PER_GROUP: dict[int, tuple[type[BasicBlock] | type[BottleneckBlock], tuple[int, int, int, int]]] = {
    10: (BasicBlock, (1, 1, 1, 1)),
    14: (BottleneckBlock, (1, 1, 1, 1)),
    18: (BasicBlock, (2, 2, 2, 2)),
    26: (BottleneckBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (BottleneckBlock, (3, 4, 6, 3)),
    101: (BottleneckBlock, (3, 4, 23, 3)),
    152: (BottleneckBlock, (3, 8, 36, 3)),
    200: (BottleneckBlock, (3, 24, 36, 3)),
}
"""Depth -> (block, blocks in each of the four groups)."""


def make_stem(stem: Stem, width_multiplier: float, sk_ratio: float) -> tuple[nn.Sequential, int]:
    """The layers before the first group and the number of channels they end with."""
    channels = int(64 * width_multiplier)
    if stem == "cifar":
        return nn.Sequential(conv(3, channels, 3), batch_norm(channels), nn.ReLU()), channels
    if sk_ratio == 0:
        first: list[nn.Module] = [conv(3, channels, 7, 2)]
    else:  # ResNet-D: three 3x3 convolutions in place of the 7x7
        half = int(32 * width_multiplier)
        first = [
            conv(3, half, 3, 2),
            batch_norm(half),
            nn.ReLU(),
            conv(half, half, 3),
            batch_norm(half),
            nn.ReLU(),
            conv(half, channels, 3),
        ]
    return nn.Sequential(*first, batch_norm(channels), nn.ReLU(), SamePadMaxPool()), channels


class ResNet(nn.Module):
    """Backbone: normalised images to the features after global average pooling.

    Args:
        depth: one of `BLOCKS_PER_GROUP`.
        width_multiplier: all channel counts are multiplied by it.
        sk_ratio: squeezed width of selective kernels as a share of the channels; 0 for plain convolutions. The paper's is 0.0625.
        stem: `imagenet` (total stride 32) or `cifar` (a 3x3 of stride 1 and no pool; total stride 8).
    """

    def __init__(self, depth: int, width_multiplier: float = 1.0, sk_ratio: float = 0.0, stem: Stem = "imagenet") -> None:
        super().__init__()
        block, num_blocks = BLOCKS_PER_GROUP[depth]
        self.stem, in_channels = make_stem(stem, width_multiplier, sk_ratio)
        groups: list[nn.Module] = []
        for group, count in enumerate(num_blocks):
            channels = int(64 * 2**group * width_multiplier)
            blocks: list[nn.Module] = []
            for position in range(count):
                first = position == 0
                stride = 2 if first and group > 0 else 1
                blocks.append(block(in_channels, channels, stride, sk_ratio, project=first))
                in_channels = channels * block.expansion
            groups.append(nn.Sequential(*blocks))
        self.groups = nn.Sequential(*groups)
        self.feature_dim = in_channels

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """float [B,3,H,W], normalised -> [B,D]."""
        return self.groups(self.stem(images_BCHW)).mean(dim=(2, 3))
