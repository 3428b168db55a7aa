"""SimCLRv2's projection head: a deep MLP, trained with the backbone and kept, in part, for fine-tuning (the paper's section 2).

Shapes: B images, D features. All layers but the last keep the width D; the last gives the embedding that the contrastive loss compares.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from distill.models.resnet import BN_EPS, BN_MOMENTUM


def head_layer(in_dim: int, out_dim: int, last: bool) -> nn.Sequential:
    """Dense without bias and batch norm; hidden layers add ReLU, the last layer's norm has no offset."""
    dense = nn.Linear(in_dim, out_dim, bias=False)
    nn.init.normal_(dense.weight, std=0.01)
    norm = nn.BatchNorm1d(out_dim, eps=BN_EPS, momentum=BN_MOMENTUM)
    if last:
        norm.bias.requires_grad_(False)  # stays 0: the official last layer has a scale but no offset
        return nn.Sequential(dense, norm)
    return nn.Sequential(dense, norm, nn.ReLU())


class ProjectionHead(nn.Module):
    """`num_layers` layers (SimCLRv2 uses 3, SimCLR 2) from D features to an embedding of `embedding_dim`."""

    def __init__(self, feature_dim: int, num_layers: int = 3, embedding_dim: int = 128) -> None:
        super().__init__()
        dims = [feature_dim] * num_layers + [embedding_dim]
        self.layers = nn.ModuleList(head_layer(dims[i], dims[i + 1], last=i == num_layers - 1) for i in range(num_layers))

    def forward(self, features_BD: Tensor) -> Tensor:
        """[B,D] -> [B,embedding_dim], not yet of unit length."""
        embedding: Tensor = features_BD
        for layer in self.layers:
            embedding = layer(embedding)
        return embedding

    def first_layers(self, count: int) -> nn.Sequential:
        """The first `count` layers: what fine-tuning from the middle of the head keeps (the paper's choice is 1; 0 keeps none)."""
        if not 0 <= count < len(self.layers):
            raise ValueError(f"count {count} is not between 0 and {len(self.layers) - 1}")
        return nn.Sequential(*list(self.layers)[:count])


def unit_length(embedding_BD: Tensor) -> Tensor:
    """[B,D] -> [B,D], each row divided by its L2 norm."""
    return torch.nn.functional.normalize(embedding_BD, dim=1)
