"""Stage 1, pretrain: a big network learns from images without labels (SimCLRv2, section 2.1).

image -> two crops (views 2e and 2e+1 of epoch e) -> colour distortion -> backbone -> projection head -> NT-Xent. Every random choice is a
function of (seed, view, image), so a run that was cut off continues with the very next step and ends with the same weights, and several
workers do together what one would do alone.

Unit of data: one step, the same `global_batch` images however many workers share them.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.checkpoint import PRETRAINED, load_checkpoint, load_weights, prepare_checkpoint, read_manifest
from distill.cluster.ddp import sum_over_workers, sync_batch_norm, wrap
from distill.cluster.worker import Worker, settling
from distill.crops import CropRecipe
from distill.errors import CheckpointError, ConfigError, DistillError
from distill.image_sets import open_unlabelled
from distill.loader import CropBatch, CropLoader, LoaderSettings
from distill.optimizers import apply_step, build_optimizer
from distill.precision import resolve_precision
from distill.rejections import RejectionLog
from distill.sources import Source
from teacher_trainer.contrastive import BatchParts, ContrastiveOutcome
from teacher_trainer.contrastive_network import ContrastiveNetwork
from teacher_trainer.contrastive_step import ContrastiveStep, Views
from teacher_trainer.curve import METRICS, Curve
from teacher_trainer.memory import NegativeMemory
from teacher_trainer.pretrain_job import PretrainJob, check_job, identity_of

logger = logging.getLogger(__name__)

POST_EVERY_S = 0.5


def pretrain_result(checkpoint: Path) -> dict[str, Any]:
    """What a pretrained checkpoint says of its training: `steps`, `seconds`, `digest`, last `loss`, `accuracy` and `entropy`, and `curve`.

    Raises:
        CheckpointError: see `read_manifest`.
    """
    manifest = read_manifest(checkpoint)
    return {
        "steps": manifest["step"],
        "seconds": manifest["seconds"],
        "digest": manifest["identity"],
        **manifest["metrics"],
        "curve": manifest["curve"],
    }


def pretrain_worker(config: dict[str, Any], worker: Worker) -> None:
    """Entry point of one worker: the checkpoint that it ends with is the pretrained network.

    Args:
        config: a `PretrainJob` as plain data.

    Raises:
        ConfigError: a network that is none of ours, an image smaller than its stride, a batch larger than the images or smaller than the
            workers, a queue longer than an epoch, or a loss that is not finite.
        SourceError, TooManyRejected: see `open_unlabelled` and `CropLoader`.
    """
    job = PretrainJob.model_validate(config)
    with RejectionLog(Path(job.rejected_path), job.data.max_rejected_share) as rejections:
        _Pretraining(job, open_unlabelled(job.data), worker, rejections).run()


class _Pretraining:
    """The state of one training: network, optimiser, memory and curve, how far it is, and when it was last saved or spoken of."""

    def __init__(self, job: PretrainJob, source: Source, worker: Worker, rejections: RejectionLog) -> None:
        settings = job.pretrain
        check_job(settings, source, worker.world)
        self.settings, self.seed, self.worker = settings, job.seed, worker
        self.preprocessing = job.data.preprocessing
        # The official code resizes its training crops by bicubic interpolation.
        recipe = CropRecipe(kind="random_resized", image_size=job.data.image_size, min_area=settings.min_area, interpolation="bicubic")
        loading = LoaderSettings(job.seed, settings.global_batch, job.data.window_shards, num_threads=job.data.num_threads)
        self.loader = CropLoader(source, recipe, loading, lambda e: (2 * e, 2 * e + 1), rejections, worker.rank, worker.world)
        self.steps_per_epoch = self.loader.plan(0).num_steps
        self.num_steps = settings.epochs * self.steps_per_epoch
        torch.manual_seed(job.seed)
        network = ContrastiveNetwork(settings, job.data).to(device=worker.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.network: ContrastiveNetwork = sync_batch_norm(network, worker)
        self.memory = settings.memory and NegativeMemory(network, settings.memory, settings.embedding_dim, worker.device)
        self.optimizer = build_optimizer(network, settings.optimizer, settings.global_batch)
        self.curve = Curve(self.num_steps, worker.device)
        self.identity = identity_of(job, source)
        self.done = 0
        self.seconds = 0.0
        self._saved: int | None = None
        self._resume()
        self.step = ContrastiveStep(network, wrap(network, worker), settings, worker)
        self._started = time.monotonic() - self.seconds
        self._saved_at = self._posted_at = time.monotonic()

    def run(self) -> None:
        """The steps that are left, or those until a stop is wanted, and a checkpoint at the end."""
        self._post("")
        with settling(self.worker):
            self._train()
            self.save()

    def _train(self) -> None:
        for epoch in range(self.done // max(1, self.steps_per_epoch), self.settings.epochs):
            for batch in self.loader.epoch(epoch, start_step=self.done - epoch * self.steps_per_epoch):
                if self.worker.should_stop():
                    return
                parts, save_is_due = self._agree(len(batch.image_ids))
                if save_is_due:
                    self.save()
                outcome = self.take(batch, parts)
                self.done += 1
                self.seconds = time.monotonic() - self._started
                if self.curve.is_due(self.done):
                    self._end_row(epoch)
                if outcome is not None:
                    self._tell(outcome, parts)

    def take(self, batch: CropBatch, parts: BatchParts) -> ContrastiveOutcome | None:
        """One step of all workers; None where bad images left one of them none, or all of them nothing to compare."""
        if min(parts.counts) < 1 or parts.num_images < 2:
            return None
        views = Views(batch, self.settings, self.seed, self.worker.device)
        images_B2 = torch.from_numpy(batch.rows).to(self.worker.device)
        memory = (self.memory.negatives, self.memory.are_of(images_B2)) if self.memory else ()
        outcome = self.step.backward(views, parts, *memory)
        apply_step(self.optimizer, self.network, self.settings.optimizer, self.done, self.num_steps)
        if self.memory:
            self.memory.follow(self.network)
            embeddings_VBD = self.step.embeddings(self.memory.network, views, views.micro_batches(parts))
            kept_ND = torch.cat([parts.gather(embeddings_BD) for embeddings_BD in embeddings_VBD])
            self.memory.keep(kept_ND, parts.gather(images_B2).repeat(len(embeddings_VBD), 1))
        self.curve.add(outcome)
        return outcome

    def _agree(self, num_images: int) -> tuple[BatchParts, bool]:
        """How many images each worker has, and whether a checkpoint is due: worker 0's clock decides for all."""
        due = time.monotonic() - self._saved_at > self.settings.checkpoint_every_s and self.done != self._saved
        if self.worker.world == 1:
            return BatchParts((num_images,), 0), due
        said = torch.zeros(self.worker.world, 2, dtype=torch.int64, device=self.worker.device)
        said[self.worker.rank] = torch.tensor([num_images, int(due)])
        counts, wishes = sum_over_workers(said).T.tolist()
        return BatchParts(tuple(counts), self.worker.rank), bool(wishes[0])

    def _sums(self) -> Tensor:
        """The curve's sums over all workers.

        Raises:
            ConfigError: they are not finite, in every worker.
        """
        sums_3 = self.curve.sums if self.worker.world == 1 else sum_over_workers(self.curve.sums)
        if not torch.isfinite(sums_3).all():
            raise ConfigError(f"pretrain: the loss is not finite in step {self.done}; give a smaller pretrain.optimizer.learning_rate")
        return sums_3

    def _end_row(self, epoch: int) -> None:
        row = self.curve.end_row(self.done, epoch, max(group["lr"] for group in self.optimizer.param_groups), self._sums())
        self.worker.post({"kind": "curve", **row})

    def _tell(self, outcome: ContrastiveOutcome, parts: BatchParts) -> None:
        now = time.monotonic()
        if self.worker.rank != 0 or (now - self._posted_at < POST_EVERY_S and self.done < self.num_steps):
            return
        self._posted_at = now
        scale = parts.num_images / parts.counts[0]  # what worker 0 sees of the step stands for all of it
        self._post(f"loss {scale * outcome.loss.item():.3f}, finds its partner {scale * outcome.accuracy.item():.0%}")

    def _post(self, note: str) -> None:
        self.worker.post({"kind": "step", "step": self.done, "of": self.num_steps, "images": self.settings.global_batch, "note": note})

    def save(self) -> None:
        """Keep a checkpoint that continues with the next step; nothing where the last one says it all. All workers call it together."""
        if self.done == self._saved:
            return
        sums_3 = self._sums()
        last = self.curve.rows[-1] if self.curve.rows else {}
        manifest: dict[str, Any] = {
            "kind": PRETRAINED,
            "identity": self.identity,
            "step": self.done,
            "seconds": self.seconds,
            "network": self.settings.network.model_dump(mode="json"),
            "num_head_layers": self.settings.num_head_layers,
            "embedding_dim": self.settings.embedding_dim,
            "preprocessing": self.preprocessing.model_dump(mode="json"),
            "precision": resolve_precision(self.settings.precision, self.worker.device),
            "metrics": {name: last.get(name) for name in METRICS},
            "curve": self.curve.rows,
        }
        state: dict[str, Any] = {"optimizer": self.optimizer.state_dict(), "curve": self.curve.state_dict(sums_3)}
        if self.memory:
            state["memory"] = self.memory.state_dict()
        self.worker.checkpoint(lambda: prepare_checkpoint(self.network.state_dict(), manifest, state))
        self._saved, self._saved_at = self.done, time.monotonic()

    def _resume(self) -> None:
        """Take everything from the last checkpoint, if it is one of this job.

        Raises:
            DistillError: the workers did not find the same checkpoint.
        """
        with self.worker.resume() as folder:
            if folder is not None:
                self._load(folder)
        if self.worker.world > 1:
            found = torch.tensor([self.done, self.done**2], dtype=torch.float64, device=self.worker.device)
            total, squares = (sum_over_workers(found) / self.worker.world).tolist()
            if squares != total**2:
                raise DistillError(
                    f"worker {self.worker.rank} found a checkpoint of step {self.done}, others of another; do they share a disk?"
                )

    def _load(self, folder: Path) -> None:
        try:
            found = load_checkpoint(folder)
        except CheckpointError as error:
            logger.info("pretraining starts afresh: %s", error)
            return
        if found.manifest.get("identity") != self.identity or found.state is None:
            logger.info("pretraining starts afresh: the checkpoint in %s is of other settings", folder)
            return
        load_weights(self.network, found.weights, str(folder))
        self.optimizer.load_state_dict(found.state["optimizer"])
        self.curve.load_state_dict(found.state["curve"], found.manifest["curve"], self.worker.rank)
        if self.memory:
            self.memory.load_state_dict(found.state["memory"])
        self.done = self._saved = int(found.manifest["step"])
        self.seconds = float(found.manifest["seconds"])
