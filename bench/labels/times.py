"""What a label's way through the store costs, beside the work that it goes with: CPU seconds, by turns in each round.

    encoding a label      beside the teacher's work for the same crop
    decoding 256 labels   beside one step of a small student on 256 crops of 32 pixels

CPU seconds of the whole process, so that what else runs on the machine counts less. Unit of data: one round.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from bench.labels.teachers import Crops, Engine, Logits
from distill.models.classifier import build_classifier
from distill.models.settings import NetworkSettings
from distill.soft_labels import decode, encode
from distill.teacher_info import Preprocessing
from student_trainer.loss import distillation_loss

STUDENT = NetworkSettings(depth=18, width_multiplier=0.25, stem="cifar")
"""Basic blocks of 16, 32, 64 and 128 channels: about the work of ResNet-20."""
STEP_BATCH = 256
Cost = dict[str, float]


def student_step(num_classes: int) -> Callable[[], None]:
    """One training step on crops and labels that are at hand."""
    network = build_classifier(STUDENT, num_classes, Preprocessing(image_size=32, mean=(0.5,) * 3, std=(0.25,) * 3))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    random = np.random.default_rng(0)
    crops_BHWC = torch.from_numpy(random.integers(0, 256, (STEP_BATCH, 32, 32, 3), dtype=np.uint8))
    teacher_BK = torch.from_numpy(random.normal(0, 2, (STEP_BATCH, num_classes)).astype(np.float32))

    def step() -> None:
        optimizer.zero_grad()
        distillation_loss(network(crops_BHWC), teacher_BK, 1.0).backward()
        optimizer.step()

    return step


def measure(logits_NK: Logits, crops_BHWC: Crops, engine: Engine, temperatures: Sequence[float], max_tv: float, rounds: int) -> list[Cost]:
    """One cost for each round."""
    num_classes = logits_NK.shape[1]
    step = student_step(num_classes)
    few_records = encode(logits_NK[:STEP_BATCH], temperatures, max_tv)
    encodings, data = [record.encoding for record in few_records], [record.data for record in few_records]
    costs = []
    for number in range(rounds + 1):
        cost = {
            "teacher_s_per_label": _cpu_seconds(lambda: engine.logits(crops_BHWC)) / len(crops_BHWC),
            "encode_s_per_label": _cpu_seconds(lambda: encode(logits_NK, temperatures, max_tv)) / len(logits_NK),
            "student_step_s": _cpu_seconds(step),
            "decode_s_per_step": _cpu_seconds(lambda: decode(encodings, data, num_classes)) * STEP_BATCH / len(data),
        }
        if number:  # the first warms up
            costs.append(cost)
    return costs


def _cpu_seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start
