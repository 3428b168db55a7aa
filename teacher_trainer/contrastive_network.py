"""What pretraining trains: normalisation, backbone and projection head (SimCLRv2, section 2.1), and what it takes to train a large one.

Shapes: B views, C = 3, H W pixels, D embedding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from distill.data_settings import DataSettings
from distill.models.classifier import Normalize, build_backbone, check_image_size
from distill.models.projection_head import ProjectionHead
from distill.models.resnet import ResNet
from teacher_trainer.settings import PretrainSettings


class ContrastiveNetwork(nn.Module):
    """Normalisation, backbone and projection head; what pretraining trains and its checkpoint holds."""

    def __init__(self, settings: PretrainSettings, data: DataSettings) -> None:
        super().__init__()
        check_image_size(settings.network, data.image_size)
        self.normalize = Normalize(data.preprocessing)
        self.backbone = build_backbone(settings.network)
        self.head = ProjectionHead(self.backbone.feature_dim, settings.num_head_layers, settings.embedding_dim)
        self.checkpoint_blocks = settings.checkpoint_blocks

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """float [B,3,H,W] in 0..1 -> embedding [B,D]."""
        normalised = (images_BCHW - self.normalize.mean_C11) / self.normalize.std_C11
        if self.checkpoint_blocks and torch.is_grad_enabled():
            return self.head(checkpointed_features(self.backbone, normalised))
        return self.head(self.backbone(normalised))


def checkpointed_features(backbone: ResNet, images_BCHW: Tensor) -> Tensor:
    """What `backbone` says, but of every residual block only its input is kept; the backward pass computes the rest a second time."""
    features = backbone.stem(images_BCHW)
    for group in backbone.groups.children():
        for block in group.children():
            again = partial(_once_and_again, block)
            features = checkpoint(block, features, use_reentrant=False, preserve_rng_state=False, context_fn=again)
    return features.mean(dim=(2, 3))


def _once_and_again(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """The contexts of the forward pass and of its repetition, which must not move the running statistics a second time."""
    return nullcontext(), kept_statistics(block)


@contextmanager
def kept_statistics(network: nn.Module) -> Iterator[None]:
    """In this block batch norms go on normalising by their batch, and forget it: running statistics stay as they are.

    They are moved in copies that are thrown away; that works for every kind of batch norm, torch's and our own.
    """
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    kept = [dict(norm._buffers) for norm in norms]
    for norm, buffers in zip(norms, kept, strict=True):
        norm._buffers.update({name: None if buffer is None else buffer.clone() for name, buffer in buffers.items()})
    try:
        yield
    finally:
        for norm, buffers in zip(norms, kept, strict=True):
            norm._buffers.update(buffers)
