"""The weights of images against slow loops in float64, and their mean of 1 over the batch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distill.cluster.worker import LocalWorker
from distill.loader import CropBatch
from student_trainer.job import TrainJob
from student_trainer.lessons import Lessons
from student_trainer.loss import distillation_loss
from student_trainer.stream import LabelledBatch
from student_trainer.waits import Waits
from student_trainer.weighting import certificate_weights, entropy_weights

NUM_IMAGES, NUM_CLASSES, MAX_TV, TEMPERATURE = 9, 5, 0.05, 2.0


def a_batch() -> LabelledBatch:
    random = np.random.default_rng(0)
    crops = CropBatch(
        epoch=0,
        step=0,
        views=(0,),
        rows=np.zeros((NUM_IMAGES, 2), dtype=np.int64),
        image_ids=[str(number) for number in range(NUM_IMAGES)],
        crops_VBHWC=np.zeros((1, NUM_IMAGES, 8, 8, 3), dtype=np.uint8),
        labels_B=np.zeros(NUM_IMAGES, dtype=np.int64),
    )
    logits_BK = random.normal(0, 8, (NUM_IMAGES, NUM_CLASSES)).astype(np.float32)
    return LabelledBatch(crops, logits_BK, tv_B=random.uniform(0, MAX_TV, NUM_IMAGES).astype(np.float32), num_asked=0)


class OneBatch:
    """A stream of one batch."""

    waits = Waits()

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[LabelledBatch]:
        yield a_batch()


def slow_weights(kind: str, batch: LabelledBatch) -> list[float]:
    assert batch.logits_BK is not None
    assert batch.tv_B is not None
    if kind == "certificate":
        return [1 / (1 + (float(tv) / MAX_TV) ** 2) for tv in batch.tv_B]
    found = []
    for logits_K in batch.logits_BK.tolist():
        powers = [math.exp(logit / TEMPERATURE) for logit in logits_K]
        entropy = -sum(power / sum(powers) * math.log(power / sum(powers)) for power in powers)
        found.append(1 + math.exp(-entropy))
    return found


def job_of(weighting: str) -> TrainJob:
    images = {"path": "nowhere"}
    return TrainJob.model_validate(
        {
            "objective": "distill",
            "data": {"unlabelled": images, "labelled": images, "test": images},
            "train": {"students": [{"name": "a", "network": {}}], "weighting": weighting, "temperature": TEMPERATURE},
            "epochs": 1,
            "seed": 0,
            "class_names": [str(number) for number in range(NUM_CLASSES)],
            "rejected_path": "nowhere",
            "store": {"max_tv": MAX_TV},
        }
    )


@pytest.mark.parametrize("kind", ["certificate", "entropy"])
def test_a_lesson_has_the_slow_loops_weights_with_a_mean_of_1_and_its_loss(kind: str, tmp_path: Path) -> None:
    stream: Any = OneBatch()
    ((batch, lesson),) = Lessons(job_of(kind), stream, None, LocalWorker(tmp_path, device=torch.device("cpu"))).epoch(0, 0)
    assert lesson.weights_U is not None
    assert lesson.teacher_UK is not None
    slow = slow_weights(kind, batch)
    slow = [weight * NUM_IMAGES / sum(slow) for weight in slow]
    assert lesson.weights_U.tolist() == pytest.approx(slow, rel=1e-5)
    assert lesson.weights_U.mean().item() == pytest.approx(1)
    assert max(slow) / min(slow) > 1.1  # the oracle can tell
    student_BK = torch.randn(NUM_IMAGES, NUM_CLASSES, generator=torch.Generator().manual_seed(1))
    total = 0.0
    for image in range(NUM_IMAGES):
        teacher, student = (logits_BK[image].double() / TEMPERATURE for logits_BK in (lesson.teacher_UK, student_BK))
        total -= slow[image] * sum(p * q for p, q in zip(teacher.softmax(0).tolist(), student.log_softmax(0).tolist(), strict=True))
    loss = distillation_loss(student_BK, lesson.teacher_UK, TEMPERATURE, weights_B=lesson.weights_U)
    assert loss.item() == pytest.approx(total / NUM_IMAGES, rel=1e-5)


def test_unweighted_is_weighted_alike() -> None:
    student_BK, teacher_BK = torch.randn(2, 7, NUM_CLASSES, generator=torch.Generator().manual_seed(1))
    plain = distillation_loss(student_BK, teacher_BK, TEMPERATURE)
    assert torch.equal(distillation_loss(student_BK, teacher_BK, TEMPERATURE, weights_B=torch.ones(7)), plain)


def test_the_ends_of_both_scales() -> None:
    assert certificate_weights(torch.tensor([0.0, MAX_TV]), MAX_TV).tolist() == pytest.approx([1.0, 0.5])
    sure, clueless = torch.tensor([[1000.0, 0, 0, 0]]), torch.zeros(1, 4)
    assert entropy_weights(torch.cat([sure, clueless]), 1.0).tolist() == pytest.approx([2.0, 1.25])
