"""The gradient of one pretraining step: views -> embeddings -> NT-Xent over all workers -> gradients in the network's parameters.

The loss needs the embeddings of the whole batch at once, the network does not: the gradient of the loss by the embeddings is taken first,
and the network's backward pass starts from it. So a batch that does not fit into memory goes through the network in micro-batches, once
without a graph for the embeddings and once with one for the gradients, and still has all its negatives (GradCache, Gao et al. 2021,
arXiv 2101.06983).

Shapes: V = 2 views, B images of this worker, b images of one micro-batch, C = 3, H W pixels, D embedding, M rows of the queue.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distill.cluster.worker import Worker
from distill.crops import CropKey
from distill.loader import CropBatch
from distill.precision import autocast
from teacher_trainer.augment import Distortion, distort
from teacher_trainer.contrastive import BatchParts, ContrastiveOutcome, nt_xent
from teacher_trainer.contrastive_network import kept_statistics
from teacher_trainer.settings import PretrainSettings

Rows = slice


class Views:
    """Both views of one worker's part of a batch. They are distorted when they are asked for, always in the same way, and not kept."""

    def __init__(self, batch: CropBatch, settings: PretrainSettings, seed: int, device: torch.device) -> None:
        self._batch, self._settings, self._seed, self._device = batch, settings, seed, device

    def micro_batches(self, parts: BatchParts) -> list[Rows]:
        """The rows of each micro-batch, as many in every worker: synchronised batch norms meet in each. Call it with no worker empty."""
        count = 1
        if self._settings.micro_batch:
            share = math.ceil(self._settings.global_batch / len(parts.counts))
            count = min(math.ceil(share / self._settings.micro_batch), *parts.counts)
        edges = [len(self._batch.image_ids) * number // count for number in range(count + 1)]
        return [slice(start, stop) for start, stop in pairwise(edges)]

    def images(self, rows: Rows) -> Tensor:
        """float [2b,3,H,W] in 0..1, channels last: the first views of these rows, then the second ones."""
        crops = torch.from_numpy(self._batch.crops_VBHWC[:, rows]).flatten(0, 1).to(self._device)
        keys = [CropKey(self._seed, view, image_id) for view in self._batch.views for image_id in self._batch.image_ids[rows]]
        distortion = Distortion.draw(keys, self._settings.jitter_strength, self._settings.blur_probability)
        distorted = distort(crops.permute(0, 3, 1, 2).float() / 255, distortion)
        return distorted.contiguous(memory_format=torch.channels_last)


class ContrastiveStep:
    """How embeddings and gradients of a step are computed.

    Args:
        network: backbone and head, its batch norms synchronised over the workers.
        trained: `network`, or what averages its gradients over the workers.
    """

    def __init__(self, network: nn.Module, trained: nn.Module, settings: PretrainSettings, worker: Worker) -> None:
        self.network, self.trained, self.settings, self.worker = network, trained, settings, worker

    def backward(
        self, views: Views, parts: BatchParts, memory_MD: Tensor | None = None, own_BM: Tensor | None = None
    ) -> ContrastiveOutcome:
        """Add the gradient of the whole step's loss to the parameters' `grad`, the same in every worker. The memory: see `nt_xent`."""
        self.network.train()
        micro_batches = views.micro_batches(parts)
        whole_VBD = None
        if len(micro_batches) == 1:
            # Both views go through the network as one batch: batch norm sees 2B images, as on the authors' accelerators.
            whole_VBD = self._embed(self.trained, views, micro_batches[0])
            leaf_VBD = whole_VBD.detach().requires_grad_()
        else:
            with kept_statistics(self.network):
                leaf_VBD = self.embeddings(self.network, views, micro_batches).requires_grad_()
        outcome = nt_xent(leaf_VBD[0], leaf_VBD[1], self.settings.contrastive_temperature, parts, memory_MD, own_BM)
        outcome.loss.backward()
        assert leaf_VBD.grad is not None
        gradient_VBD = leaf_VBD.grad * self.worker.world  # gradients are averaged over the workers, the loss is a sum over them
        if whole_VBD is not None:
            whole_VBD.backward(gradient_VBD)
            return outcome
        for rows in micro_batches:
            with self._averaging(rows is micro_batches[-1]):
                self._embed(self.trained, views, rows).backward(gradient_VBD[:, rows])
        return outcome

    @torch.no_grad()
    def embeddings(self, network: nn.Module, views: Views, micro_batches: list[Rows]) -> Tensor:
        """float32 [2,B,D] of `network`, without a graph."""
        return torch.cat([self._embed(network, views, rows) for rows in micro_batches], dim=1)

    def _embed(self, network: nn.Module, views: Views, rows: Rows) -> Tensor:
        images = views.images(rows)
        with autocast(self.settings.precision, self.worker.device):
            embeddings = network(images)
        return embeddings.float().unflatten(0, (2, -1))

    def _averaging(self, last: bool) -> AbstractContextManager[None]:
        """Gradients add up in each worker; they are averaged over the workers once, with the last micro-batch."""
        if last or not isinstance(self.trained, DistributedDataParallel):
            return nullcontext()
        return self.trained.no_sync()
