"""Supervised training of one classifier on labelled images: fine-tuning, linear evaluation, and the supervised baseline in one loop.

labelled image -> crop (view e of epoch e; crop and flip only, no colour distortion: SimCLRv2, section 2.2) -> logits -> cross-entropy.
What differs is the network that comes in (pretrained or fresh) and which of its weights are trained.

Every random choice is a function of (seed, epoch, image), so a run that was cut off continues with the very next step and ends with the
same weights. Its checkpoint is a classifier checkpoint (`distill.models.saved_classifier`) from the first one on.

Shapes: B crops of this worker, H W pixels, C = 3 channels, K classes.
"""

from __future__ import annotations

import logging
import math
import time
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from distill.checkpoint import load_checkpoint, load_weights, prepare_checkpoint
from distill.cluster.ddp import sum_over_workers, sync_batch_norm, wrap
from distill.cluster.worker import Worker, settling
from distill.config import digest_of
from distill.crops import CropRecipe
from distill.data_settings import DataSettings
from distill.errors import CheckpointError, ConfigError, DistillError
from distill.evaluation import evaluate_on, network_logits, require_labels
from distill.label_metrics import score
from distill.loader import CropBatch, CropLoader, LoaderSettings
from distill.models.classifier import Classifier
from distill.models.saved_classifier import CLASSIFIER, ClassifierCard
from distill.optimizers import build_optimizer, take_step
from distill.precision import autocast, resolve_precision
from distill.rejections import RejectionLog
from distill.sources import Source
from teacher_trainer.linear_evaluation import freeze_backbone, train_mode
from teacher_trainer.settings import FinetuneSettings

logger = logging.getLogger(__name__)

POST_EVERY_S = 0.5
ASK_EVERY_STEPS = 10
"""How often several workers ask worker 0 whether a checkpoint is due: asking makes them wait for each other."""


def train_supervised(
    network: Classifier,
    card: ClassifierCard,
    labelled: Source,
    data: DataSettings,
    settings: FinetuneSettings,
    seed: int,
    worker: Worker,
    rejections: RejectionLog,
    test: Source | None = None,
) -> dict[str, Any]:
    """Train `network` in place to the end, from the worker's last checkpoint if there is one of the same settings, card and images.

    Args:
        network: the same weights in every worker.
        card: what the checkpoint says it is.
        labelled: only images whose label may be used.
        test: labelled images on which worker 0 scores the trained network.

    Returns:
        `steps`, `seconds`, last `loss`, `num_labelled`, `global_batch`, `precision` (what `auto` became) and, with `test`, `scores` (of
        worker 0): plain data, also under `result` in the manifest of the last checkpoint. Where the worker was asked to stop before the
        last step, it is the result so far, without scores.

    Raises:
        SourceError: test images without labels.
        ConfigError: too few labelled images, a network that has no backbone to freeze, or a loss that is not finite.
        TooManyRejected: see `CropLoader`.
    """
    loop = _Loop(network, card, labelled, data, settings, seed, worker, rejections)
    with settling(worker):
        if loop.train() and test is not None:
            if worker.rank == 0:
                logits_NK, labels_N = evaluate_on(network_logits(network), test, data, rejections)
                loop.result["scores"] = score(logits_NK, require_labels(labels_N, data)).model_dump(mode="json")
            loop.is_saved = False  # in all workers: they keep a checkpoint together
        loop.save()
    return loop.result


def batch_that_fits(wanted: int, num_images: int, world: int) -> int:
    """The global batch: what is wanted, or all images where there are fewer (1 % of a small set is often less than one batch).

    Raises:
        ConfigError: less than the two images for each worker that batch norm needs.
    """
    batch = min(wanted, num_images)
    if batch < 2 * world:
        raise ConfigError(
            f"finetune.global_batch {wanted} of {num_images} labelled images gives {world} workers less than 2 images each;"
            " give more labels (data.label_fraction), a larger batch, or fewer workers (ray.num_workers)"
        )
    return batch


class _Loop:
    """The state of one training: network, optimiser, how far it is, and when it was last saved or spoken of."""

    def __init__(
        self,
        network: Classifier,
        card: ClassifierCard,
        labelled: Source,
        data: DataSettings,
        settings: FinetuneSettings,
        seed: int,
        worker: Worker,
        rejections: RejectionLog,
    ) -> None:
        self.settings, self.card, self.worker = settings, card, worker
        batch = batch_that_fits(settings.global_batch, labelled.num_images, worker.world)
        recipe = CropRecipe(kind="random_resized", image_size=data.image_size, min_area=settings.min_area, interpolation=data.interpolation)
        loading = LoaderSettings(seed, batch, data.window_shards, num_threads=data.num_threads)
        self.loader = CropLoader(labelled, recipe, loading, lambda epoch: (epoch,), rejections, worker.rank, worker.world)
        if settings.linear:
            freeze_backbone(network)
        self.network = network.to(worker.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it
        if not settings.linear:
            sync_batch_norm(self.network, worker)
        self.optimizer = build_optimizer(self.network, settings.optimizer, batch, settings.backbone_rate_factor)
        self.identity = _identity(labelled, data, settings, seed, card)
        self.result: dict[str, Any] = {"steps": 0, "seconds": 0.0, "loss": None, "num_labelled": labelled.num_images, "global_batch": batch}
        self.result["precision"] = resolve_precision(settings.precision, worker.device)
        self.is_saved = False
        self._loss: Tensor | None = None
        """Of this worker's last step, []."""
        self._resume()
        self.trained = wrap(self.network, worker)
        self._saved_at = self._posted_at = time.monotonic()

    def train(self) -> bool:
        """The steps that are left; False where a stop was wanted before the last one."""
        steps_per_epoch = self.loader.plan(0).num_steps
        num_steps = self.settings.epochs * steps_per_epoch
        done: int = self.result["steps"]
        started = time.monotonic() - self.result["seconds"]
        train_mode(self.network)
        for epoch in range(done // steps_per_epoch, self.settings.epochs):
            for crops in self.loader.epoch(epoch, start_step=done - epoch * steps_per_epoch):
                if self.worker.should_stop():
                    return False
                self._step(crops, done, num_steps)
                done += 1
                now = time.monotonic()
                self.result.update(steps=done, seconds=now - started)
                self.is_saved = False
                if now - self._posted_at > POST_EVERY_S or done == num_steps:
                    self._tell(num_steps)
                if self._save_is_due(done):
                    self.save()
        return True

    def _step(self, crops: CropBatch, step: int, num_steps: int) -> None:
        """One update; none where bad images left too few: batch norm needs two."""
        size, world = len(crops.image_ids), self.worker.world
        if size == 0 and world > 1:
            raise DistillError(f"worker {self.worker.rank} has no usable image in step {step}, and the others cannot go on without it")
        if size < 2 and world == 1:
            return
        device = self.worker.device
        with autocast(self.settings.precision, device):
            logits_BK = self.trained(torch.from_numpy(crops.crops_VBHWC[0]).to(device))
        loss = F.cross_entropy(logits_BK, torch.from_numpy(crops.labels_B).to(device))
        take_step(self.optimizer, self.network, loss * self._share(size), self.settings.optimizer, step, num_steps)
        self._loss = loss.detach()  # its number is asked for now and then only: asking waits for the accelerator

    def _share(self, size: int) -> Tensor | float:
        """What makes an average over workers one over images: this worker's images by the mean of all."""
        if self.worker.world == 1:
            return 1.0
        size_1 = torch.tensor([float(size)], device=self.worker.device)
        return (size_1 * self.worker.world / sum_over_workers(size_1)).squeeze(0)

    def _note_loss(self) -> None:
        if self._loss is None:
            return
        self.result["loss"] = self._loss.item()
        if not math.isfinite(self.result["loss"]):
            loss, step = self.result["loss"], self.result["steps"]
            raise ConfigError(f"finetune: the loss is {loss} in step {step}; give a smaller finetune.optimizer.learning_rate")

    def _tell(self, num_steps: int) -> None:
        self._note_loss()
        loss, batch, labelled = self.result["loss"], self.result["global_batch"], self.result["num_labelled"]
        few = f", all {labelled} labelled images in each step" if batch < self.settings.global_batch else ""
        note = ("no loss yet" if loss is None else f"loss {loss:.3f}") + few
        self.worker.post({"kind": "step", "step": self.result["steps"], "of": num_steps, "images": batch, "loss": loss, "note": note})
        self._posted_at = time.monotonic()

    def _save_is_due(self, done: int) -> bool:
        """The same answer in all workers: worker 0's clock decides."""
        due = time.monotonic() - self._saved_at > self.settings.checkpoint_every_s
        if self.worker.world == 1:
            return due
        if done % ASK_EVERY_STEPS:
            return False
        answer = torch.tensor([int(due)], device=self.worker.device)
        dist.broadcast(answer, 0)
        return bool(answer.item())

    def save(self) -> None:
        """Keep a checkpoint that continues with the next step, unless the last one says it all.

        Raises:
            ConfigError: the last loss is not finite; the checkpoint before it stays.
        """
        self._note_loss()
        manifest = {"kind": CLASSIFIER, "card": self.card.model_dump(mode="json"), "identity": self.identity, "result": self.result}
        if not self.is_saved:
            self.worker.checkpoint(
                lambda: prepare_checkpoint(self.network.state_dict(), manifest, {"optimizer": self.optimizer.state_dict()})
            )
        self.is_saved, self._saved_at = True, time.monotonic()

    def _resume(self) -> None:
        """Take weights, optimiser and result from the last checkpoint, if it is one of this training."""
        with self.worker.resume() as folder:
            if folder is None:
                return
            try:
                found = load_checkpoint(folder)
            except CheckpointError as error:
                logger.info("training starts afresh: %s", error)
                return
            if found.manifest.get("identity") != self.identity or found.state is None:
                logger.info("training starts afresh: the checkpoint in %s is of other settings", folder)
                return
            load_weights(self.network, found.weights, str(folder))
            self.optimizer.load_state_dict(found.state["optimizer"])
            self.result.update(found.manifest["result"])
            self.is_saved = True


def _identity(labelled: Source, data: DataSettings, settings: FinetuneSettings, seed: int, card: ClassifierCard) -> str:
    """Names everything that the weights depend on, and nothing else: another interval of saving must not start afresh."""
    return digest_of(
        {
            "settings": settings.model_dump(mode="json", exclude={"checkpoint_every_s"}),
            "card": card.model_dump(mode="json"),
            "window_shards": data.window_shards,
            "seed": seed,
            "images": labelled.digest(),
        }
    )
