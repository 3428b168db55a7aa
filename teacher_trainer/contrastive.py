"""NT-Xent, the loss that pulls two views of an image together and all other views apart (SimCLR, arXiv 2002.05709, section 2.1).

Shapes: B images, D embedding. Both views of one image are positives of each other; the 2B - 2 other views are the negatives.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.models.projection_head import unit_length

SELF_SIMILARITY = -1e9  # takes a view's similarity with itself out of the softmax


@dataclass(frozen=True)
class ContrastiveOutcome:
    """The loss and how well the task is solved."""

    loss: Tensor
    """Sum of both views' mean losses in nats, as in the official code (twice the per-view mean)."""
    accuracy: Tensor
    """Share of views whose nearest other view is their partner."""
    entropy: Tensor
    """Mean entropy, in nats, of the softmax over the other views."""


def nt_xent(first_BD: Tensor, second_BD: Tensor, contrastive_temperature: float) -> ContrastiveOutcome:
    """The loss on the embeddings of both views, row i of each being the same image.

    Args:
        first_BD, second_BD: float [B,D], of any length (they are normalised here), B >= 2.
        contrastive_temperature: what the cosine similarities are divided by.
    """
    batch = len(first_BD)
    views_2BD = unit_length(torch.cat([first_BD, second_BD]))
    similarity = views_2BD @ views_2BD.T / contrastive_temperature
    similarity = similarity.masked_fill(torch.eye(2 * batch, dtype=torch.bool, device=similarity.device), SELF_SIMILARITY)
    partner = torch.arange(2 * batch, device=similarity.device).roll(batch)
    log_probs = F.log_softmax(similarity, dim=1)
    return ContrastiveOutcome(
        loss=2 * F.nll_loss(log_probs, partner),
        accuracy=(similarity.argmax(dim=1) == partner).float().mean().detach(),
        entropy=-(log_probs.exp() * log_probs).sum(dim=1).mean().detach(),
    )
