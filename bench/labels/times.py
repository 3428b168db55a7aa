"""What a label's way through the store costs, beside the work that it goes with: CPU seconds, by turns in each round.

    writing a label      encoded and committed with the rest of its image shard, beside the teacher's work for the same crop
    reading 256 labels   their share of an image shard from the store, beside one step of a small student on 256 crops of 32 pixels

The store is a real one in a temporary folder, its shards of 1000 images. CPU seconds of the whole process, so that what else runs on the
machine counts less. Unit of data: one round.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from bench.labels.teachers import Crops, Engine, Logits
from distill.crops import CropRecipe
from distill.models.classifier import build_classifier
from distill.models.settings import NetworkSettings
from distill.soft_labels import encode
from distill.teacher_info import Preprocessing
from student_trainer.loss import distillation_loss
from student_trainer.store import SoftLabelStore, StoreIdentity

STUDENT = NetworkSettings(depth=18, width_multiplier=0.25, stem="cifar")
"""Basic blocks of 16, 32, 64 and 128 channels: about the work of ResNet-20."""
STEP_BATCH = 256
SHARD = 1000
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
    """One cost for each round; of the logits, one image shard."""
    shard_NK = logits_NK[:SHARD]
    image_ids = [f"n{row:08d}/image_{row:06d}.JPEG" for row in range(len(shard_NK))]
    step = student_step(logits_NK.shape[1])
    costs = []
    with tempfile.TemporaryDirectory() as folder:
        store = _empty_store(Path(folder), logits_NK.shape[1])

        def write(view: int) -> None:
            records = encode(shard_NK, temperatures, max_tv)
            store.commit(view, 0, range(len(shard_NK)), image_ids, records, temperatures)

        def read(view: int) -> None:
            found = store.read(view, 0, temperatures[0], max_tv).rows
            assert len(found) == len(shard_NK)

        for number in range(rounds + 1):
            cost = {
                "teacher_s_per_label": _cpu_seconds(lambda: engine.logits(crops_BHWC)) / len(crops_BHWC),
                "write_s_per_label": _cpu_seconds(lambda view=number: write(view)) / len(shard_NK),
                "student_step_s": _cpu_seconds(step),
                "read_s_per_step": _cpu_seconds(lambda view=number: read(view)) * STEP_BATCH / len(shard_NK),
            }
            if number:  # the first warms up
                costs.append(cost)
    return costs


def _empty_store(folder: Path, num_classes: int) -> SoftLabelStore:
    recipe = CropRecipe(image_size=8)
    return SoftLabelStore(folder, StoreIdentity(fingerprint="f" * 64, num_classes=num_classes, recipe=recipe, seed=0, images="bench"))


def _cpu_seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start
