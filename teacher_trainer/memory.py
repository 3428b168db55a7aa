"""Negatives from earlier steps: a moving average of the network, and the queue of what it said (SimCLRv2, section 2.1; He et al. 2020).

The network changes slowly from step to step, its average more slowly still, so the embeddings of the last steps' views can stand beside
fresh ones. Every worker holds the same average and the same queue. Beside each embedding lies the image it is of: an epoch is shuffled
anew, so an image may come while views of its last epoch are still in the queue, and those are no negatives of it.

Shapes: N images of a step over all workers, D embedding, M rows of the queue.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from distill.models.projection_head import unit_length
from teacher_trainer.settings import MemorySettings


class NegativeMemory:
    """The averaged network and its queue, at first empty.

    Args:
        network: backbone and head as training starts with them; copied.
        embedding_dim: D.
    """

    def __init__(self, network: nn.Module, settings: MemorySettings, embedding_dim: int, device: torch.device) -> None:
        self.network = copy.deepcopy(network).requires_grad_(False)
        self.momentum = settings.momentum
        self._queue_MD = torch.zeros(settings.size, embedding_dim, device=device)
        self._images_M2 = torch.full((settings.size, 2), -1, device=device)
        self._next = 0
        self._filled = 0

    @property
    def negatives(self) -> Tensor | None:
        """float32 [M,D], as far as the queue is filled, of unit length; None while the queue is empty."""
        return self._queue_MD[: self._filled] if self._filled else None

    def are_of(self, images_B2: Tensor) -> Tensor:
        """bool [B,M]: which of the `negatives` are views of these images, each given by int64 (shard, row)."""
        kept_M2 = self._images_M2[: self._filled]
        return (images_B2[:, None, 0] == kept_M2[:, 0]) & (images_B2[:, None, 1] == kept_M2[:, 1])

    @torch.no_grad()
    def follow(self, network: nn.Module) -> None:
        """Move the average a little towards the weights of `network`; its batch norms have statistics of their own."""
        for own, newer in zip(self.network.parameters(), network.parameters(), strict=True):
            own.lerp_(newer, 1 - self.momentum)

    def keep(self, embeddings_ND: Tensor, images_N2: Tensor) -> None:
        """Put embeddings (of any length, of all workers and in the same order in each, no more than the queue holds) in the place of the
        oldest, with the (shard, row) of the image that each is of."""
        size, count = len(self._queue_MD), len(embeddings_ND)
        at = torch.arange(self._next, self._next + count, device=self._queue_MD.device) % size
        self._queue_MD[at] = unit_length(embeddings_ND.detach().float())
        self._images_M2[at] = images_N2
        self._next = (self._next + count) % size
        self._filled = min(self._filled + count, size)

    def state_dict(self) -> dict[str, Any]:
        """Weights of the average, queue, its images, and how far it is filled."""
        queue = {"queue": self._queue_MD, "images": self._images_M2, "next": self._next, "filled": self._filled}
        return {"network": self.network.state_dict(), **queue}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.network.load_state_dict(state["network"])
        self._queue_MD.copy_(state["queue"])
        self._images_M2.copy_(state["images"])
        self._next, self._filled = int(state["next"]), int(state["filled"])
