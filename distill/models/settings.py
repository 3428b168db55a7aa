"""Which network: the settings that name one, shared by teachers and students."""

from __future__ import annotations

import re
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from distill.config import Section

IMPORTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
"""How the function that makes a user's own network is named."""

DEPTHS = (10, 14, 18, 26, 34, 50, 101, 152, 200)


class NetworkSettings(Section):
    """One network: our SK-ResNet, one of timm's by name, or a user's own."""

    name: str = "resnet"
    """`resnet` (ours, shaped by the fields below), `timm:NAME` (extra `timm`), or `MODULE:FUNCTION`, an importable function of yours:
    FUNCTION(num_classes=K) returns a torch Module from normalised float crops [B,3,H,W] to logits [B,K]."""
    depth: int = 18
    """Layers of the ResNet: 18, 34, 50, 101, 152, 200 as in the paper; 10, 14, 26 are small ones. Those with bottleneck blocks
    (14, 26, 50 and deeper) can have selective kernels."""
    width_multiplier: float = Field(default=1.0, gt=0, le=16)
    """All channel counts are multiplied by it; the paper uses 1, 2 and 3. At least 1/64, or 1/32 with selective kernels under the ImageNet
    stem: the narrowest layer needs a channel."""
    sk_ratio: float = Field(default=0.0, ge=0, le=1)
    """Squeezed width of selective kernels; 0 for none, the paper's is 0.0625."""
    stem: Literal["imagenet", "cifar"] = "imagenet"
    """`cifar` for small images: a 3x3 convolution of stride 1 and no pool."""

    @property
    def total_stride(self) -> int:
        """How many input pixels one pixel of the last feature map of our ResNet steps over; smaller images are refused."""
        return 32 if self.stem == "imagenet" else 8

    @field_validator("depth")
    @classmethod
    def _known_depth(cls, depth: int) -> int:
        if depth not in DEPTHS:
            raise ValueError(f"depth is one of {', '.join(map(str, DEPTHS))}")
        return depth

    @model_validator(mode="after")
    def _known_name(self) -> Self:
        if self.name != "resnet" and not self.name.startswith("timm:") and not IMPORTED.fullmatch(self.name):
            raise ValueError("name is 'resnet', 'timm:NAME' or 'MODULE:FUNCTION'")
        return self

    @model_validator(mode="after")
    def _no_layer_without_channels(self) -> Self:
        narrowest = 32 if self.sk_ratio > 0 and self.stem == "imagenet" else 64  # channels at width 1, see `make_stem`
        if self.name == "resnet" and self.width_multiplier * narrowest < 1:
            raise ValueError(
                f"width_multiplier {self.width_multiplier:g} leaves nothing of the {narrowest} channels of the narrowest layer; "
                f"give at least 1/{narrowest} ({1 / narrowest:g})"
            )
        return self
