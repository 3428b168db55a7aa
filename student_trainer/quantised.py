"""Quantisation-aware distillation: a short fine-tuning of a student that rounds like int8, on soft labels that are stored already.

Flow: label store -> the run's own stream of crops and logits (no teacher is asked) -> fake-quantised student -> a student in float whose
weights bear the rounding. Unit of data: one batch. Shapes: B crops, K classes.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from distill.devices import best_device
from distill.errors import DistillError, StoreError
from distill.loader import CropLoader
from distill.optimizer_settings import OptimizerSettings
from distill.optimizers import build_optimizer, take_step
from distill.rejections import RejectionLog
from student_trainer.fake_quantisation import fake_quantised
from student_trainer.job import TrainJob
from student_trainer.loss import distillation_loss
from student_trainer.open_store import open_label_store
from student_trainer.stream import LabelledBatch, LabelledStream

RANGES_EVERY = 50
"""Steps after which the ranges are measured anew: weights have moved, and the file will be calibrated on the same crops."""
NUM_AVERAGED = 20
"""Steps that the first and the last loss are the mean of, at most half of all."""


@dataclass(frozen=True)
class TunedForInt8:
    """What fine-tuning brought."""

    network: nn.Module
    """The student in float, in evaluation mode, on the CPU."""
    steps: int
    """Updates made."""
    num_labels: int
    """Stored labels that were learnt from; one that came twice counts twice."""
    first_loss: float
    """Mean distillation loss of the first steps, in nats."""
    last_loss: float
    """Of the last ones."""
    seconds: float
    """How long it took."""


class NoTeacher:
    """In a teacher's place where only the store may be read: every question is an error."""

    async def info(self) -> NoReturn:
        """Raises StoreError."""
        raise StoreError("labels that it wants are not in the store (or are too rough for store.max_tv); `distill label` fills it")

    async def logits(self, crops_BHWC: object, *, fingerprint: str | None = None) -> NoReturn:
        """Raises StoreError."""
        await self.info()

    async def soft_labels(
        self, crops_BHWC: object, temperature_B1: object, *, with_logits: bool = False, fingerprint: str | None = None
    ) -> NoReturn:
        """Raises StoreError."""
        await self.info()

    async def top_logits(self, crops_BHWC: object, *, fingerprint: str | None = None) -> NoReturn:
        """Raises StoreError."""
        await self.info()

    async def ready(self) -> bool:
        """Never."""
        return False

    async def close(self) -> None:
        """Nothing to let go of."""


def train_quantised(
    network: nn.Module,
    job: TrainJob,
    calibration_crops: npt.NDArray[np.uint8],
    steps: int,
    learning_rate: float,
    weight_bits: int = 8,
) -> TunedForInt8:
    """Fine-tune a copy of a student for int8.

    Args:
        network: the trained student; it stays as it is.
        job: the distillation that it was trained by; its store holds the labels.
        calibration_crops: uint8 [N,H,W,3], what the file's ranges will be measured on.
        steps: updates, of the job's global batch each.
        learning_rate: peak rate of AdamW.
        weight_bits: 8, or 7 for processors whose 8-bit multiply-add saturates.

    Raises:
        StoreError: a label that is wanted is not in the store.
        DistillError: the loss became infinite or no number, or the student has no layer to round.
    """
    started, device = time.monotonic(), best_device()
    student = copy.deepcopy(network).to(device).eval()  # batch norm is frozen, dropout off
    settings = OptimizerSettings(name="adamw", learning_rate=learning_rate, weight_decay=0.0)
    calibration_NHWC = torch.from_numpy(calibration_crops).to(device)
    losses: list[float] = []
    num_labels = 0
    with fake_quantised(student, weight_bits) as rounding, closing(_batches(job)) as batches:
        optimizer = build_optimizer(student, settings, job.train.global_batch)
        for step, batch in zip(range(steps), batches, strict=False):
            if step % RANGES_EVERY == 0:
                rounding.measure_ranges(calibration_NHWC)
            crops_BHWC, teacher_BK = (torch.from_numpy(array).to(device) for array in (batch.crops.crops_VBHWC[0], batch.logits_BK))
            student_BK = student(crops_BHWC)
            loss = distillation_loss(student_BK, teacher_BK, job.train.temperature, job.train.scale_by_temperature_squared)
            take_step(optimizer, student, loss, settings, step, steps)
            losses.append(loss.item())
            num_labels += len(crops_BHWC)
            if not np.isfinite(losses[-1]):
                raise DistillError(f"the loss is not finite at step {step}; try a smaller edge.quantised_training.learning_rate")
    averaged = max(1, min(NUM_AVERAGED, len(losses) // 2))
    return TunedForInt8(
        network=student.cpu().eval(),
        steps=len(losses),
        num_labels=num_labels,
        first_loss=float(np.mean(losses[:averaged])),
        last_loss=float(np.mean(losses[-averaged:])),
        seconds=time.monotonic() - started,
    )


def _batches(job: TrainJob) -> Generator[LabelledBatch]:
    """The batches of the run again, epoch after epoch, and from the start when the last has passed. None that is empty."""
    images, views = job.open_images(), job.train.num_views
    with RejectionLog(Path(job.rejected_path), job.data.max_rejected_share) as rejections:
        loader = CropLoader(images, job.recipe, job.loading(images), lambda epoch: (epoch % views,), rejections)
        with LabelledStream(loader, open_label_store(job), NoTeacher, job.rules, job.train.requests_in_flight) as stream:
            while True:
                for epoch in range(job.epochs):
                    yield from (batch for batch in stream.epoch(epoch) if len(batch.crops.image_ids))
