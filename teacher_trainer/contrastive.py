"""NT-Xent, the loss that pulls two views of an image together and all other views apart (SimCLR, arXiv 2002.05709, section 2.1).

Both views of one image are positives of each other; the views of all other images of the step, on whichever worker they are, are the
negatives, and with a memory (SimCLRv2, section 2.1) the embeddings of other images in its queue too. A worker's anchors are its own views.
The embeddings of the other workers are gathered with gradient: a view is also pushed by the anchors to which it is a negative.

Shapes: B images of this worker, N of all workers, D embedding, M rows of the memory's queue. All in float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.cluster.ddp import sum_over_workers
from distill.errors import ConfigError
from distill.models.projection_head import unit_length

SELF_SIMILARITY = -1e9  # takes a view's similarity with itself, or with its image's views in the memory, out of the softmax


@dataclass(frozen=True)
class BatchParts:
    """How the images of one step lie on the workers. Rejected images make the parts unequal."""

    counts: tuple[int, ...]
    """Images of each worker."""
    rank: int
    """This worker."""

    @property
    def num_images(self) -> int:
        """N."""
        return sum(self.counts)

    @property
    def num_before(self) -> int:
        """Images of the workers before this one."""
        return sum(self.counts[: self.rank])

    def gather(self, rows_BD: Tensor) -> Tensor:
        """[B,D] of this worker -> [N,D] of all, in the order of the workers, with gradient."""
        if len(self.counts) == 1:
            return rows_BD
        # A sum of tables that are 0 but for one's own rows takes parts of any size, on every back end.
        after = self.num_images - self.num_before - len(rows_BD)
        return sum_over_workers(F.pad(rows_BD, (0, 0, self.num_before, after)))


@dataclass(frozen=True)
class ContrastiveOutcome:
    """The loss and how well the task is solved: this worker's part, so that the sum over the workers is that of the step."""

    loss: Tensor
    """Sum of both views' mean losses in nats, as in the official code (twice the per-view mean)."""
    accuracy: Tensor
    """Share of views whose nearest of all others is their partner. The official code's looks from the first views, and at second views
    only, so it is higher."""
    entropy: Tensor
    """Mean entropy, in nats, of the softmax over all others; the official code's is over the second views."""


def nt_xent(
    first_BD: Tensor,
    second_BD: Tensor,
    contrastive_temperature: float,
    parts: BatchParts | None = None,
    memory_MD: Tensor | None = None,
    own_BM: Tensor | None = None,
) -> ContrastiveOutcome:
    """The loss on the embeddings of both views, row i of each being the same image.

    Args:
        first_BD, second_BD: float [B,D], of any length (they are normalised here).
        contrastive_temperature: what the cosine similarities are divided by.
        parts: how the step's images lie on the workers; None for all of them here. With it all workers call this together, and
            `backward` too.
        memory_MD: float [M,D] of unit length, without gradient: more negatives of every view.
        own_BM: bool [B,M], where a row of the memory is an earlier view of the image itself, which is no negative; None for nowhere.

    Raises:
        ConfigError: one image in all, and no memory: there is nothing to tell it from.
    """
    batch = len(first_BD)
    parts = parts or BatchParts((batch,), 0)
    total, before = parts.num_images, parts.num_before
    if total < 2 and memory_MD is None:
        raise ConfigError("a batch of one image has no negatives; make pretrain.global_batch larger")
    unit_BD, partner_BD = unit_length(first_BD), unit_length(second_BD)
    own_2BD = torch.cat([unit_BD, partner_BD])
    all_2ND = torch.cat(parts.gather(torch.cat([unit_BD, partner_BD], dim=1)).chunk(2, dim=1))
    similarity = own_2BD @ all_2ND.T / contrastive_temperature
    row = torch.arange(before, before + batch, device=similarity.device)
    itself_2B, partner_2B = torch.cat([row, row + total]), torch.cat([row + total, row])
    similarity = similarity.scatter(1, itself_2B[:, None], SELF_SIMILARITY)
    if memory_MD is not None:
        to_memory_2BM = own_2BD @ memory_MD.T / contrastive_temperature
        if own_BM is not None:
            to_memory_2BM = to_memory_2BM.masked_fill(own_BM.repeat(2, 1), SELF_SIMILARITY)
        similarity = torch.cat([similarity, to_memory_2BM], dim=1)
    log_probs = F.log_softmax(similarity, dim=1)
    return ContrastiveOutcome(
        loss=F.nll_loss(log_probs, partner_2B, reduction="sum") / total,
        accuracy=(similarity.argmax(dim=1) == partner_2B).sum().detach() / (2 * total),
        entropy=-(log_probs.exp() * log_probs).sum().detach() / (2 * total),
    )
