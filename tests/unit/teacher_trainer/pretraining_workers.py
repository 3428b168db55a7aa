"""Run by test_pretrain_workers.py: two processes, joined by gloo, that pretrain together; after that, one of them does the same alone.

    python pretraining_workers.py FOLDER

FOLDER holds tasks.json, a list of `Task`. Of a step are left gradients-NAME-alone.pt and gradients-NAME-RANK.pt; of a whole pretraining
the folders NAME-alone, NAME-together, and NAME-cut: killed before its third step and started again.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor, nn

from distill.cluster.ddp import sync_batch_norm, wrap
from distill.loader import CropBatch
from distill.models.projection_head import unit_length
from teacher_trainer import pretrain
from teacher_trainer.contrastive import BatchParts
from teacher_trainer.contrastive_step import ContrastiveStep, Views
from teacher_trainer.settings import PretrainSettings

sys.path.insert(0, str(Path(__file__).parents[2]))  # the folder of the tests
from forked_workers import ForkedWorker, run_forked

IMAGES = 7  # 4 and 3: what a rejected image leaves of a batch of 8


class Task(TypedDict):
    """What both workers are given. With a `job` it is a whole pretraining, else one step's gradients."""

    name: str
    settings: dict[str, Any]
    batch_norm: bool
    queue: int
    job: dict[str, Any] | None


class SmallNetwork(nn.Module):
    """Smooth everywhere, unlike a ReLU, so that rounding stays rounding. Without batch norm every image is for itself, and micro-batches
    may not change anything."""

    def __init__(self, batch_norm: bool) -> None:
        super().__init__()
        norms = [nn.BatchNorm2d(4), nn.BatchNorm1d(8)] if batch_norm else [nn.Identity(), nn.Identity()]
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3, 3), norms[0], nn.GELU(), nn.Flatten(), nn.Linear(64, 8), norms[1])

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """[B,3,12,12] -> [B,8]."""
        return self.layers(images_BCHW)


def gradients_of(task: Task, worker: ForkedWorker) -> dict[str, Any]:
    """Loss, accuracy, entropy, gradients and running statistics after one step on this worker's part of the images."""
    settings = PretrainSettings.model_validate(task["settings"])
    random = np.random.default_rng(0)
    mine = slice(worker.rank, None, worker.world)
    crops = random.integers(0, 256, (2, IMAGES, 12, 12, 3), dtype=np.uint8)[:, mine]
    ids = [f"image {number}" for number in range(IMAGES)][mine]
    batch = CropBatch(0, 0, (0, 1), np.zeros((len(ids), 2), dtype=np.int64), ids, crops, np.full(len(ids), -1))
    counts = tuple(len(range(IMAGES)[rank :: worker.world]) for rank in range(worker.world))
    memory_MD = unit_length(torch.from_numpy(random.normal(size=(task["queue"], 8))).float()) if task["queue"] else None
    torch.manual_seed(0)
    network = sync_batch_norm(SmallNetwork(task["batch_norm"]), worker)
    step = ContrastiveStep(network, wrap(network, worker), settings, worker)
    outcome = step.backward(Views(batch, settings, 3, worker.device), BatchParts(counts, worker.rank), memory_MD)
    gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    said = {"loss": outcome.loss.detach(), "accuracy": outcome.accuracy, "entropy": outcome.entropy}
    return {"said": said, "gradients": gradients, "buffers": dict(network.named_buffers())}


class Killed(Exception):
    """All workers die here."""


@contextlib.contextmanager
def dying_before(step: int) -> Iterator[None]:
    """Pretraining raises `Killed` before it takes `step`, counted from 1."""
    taken = 0
    take = pretrain._Pretraining.take

    def step_or_death(self: Any, batch: CropBatch, parts: BatchParts) -> Any:
        nonlocal taken
        taken += 1
        if taken == step:
            raise Killed
        return take(self, batch, parts)

    pretrain._Pretraining.take = step_or_death  # type: ignore[method-assign]
    try:
        yield
    finally:
        pretrain._Pretraining.take = take  # type: ignore[method-assign]


def work_alone(folder: Path, tasks: list[Task]) -> None:
    """All tasks in one worker that has all the images."""
    for task in tasks:
        worker = ForkedWorker(folder / f"{task['name']}-alone", 0, 1)
        if task["job"] is None:
            torch.save(gradients_of(task, worker), folder / f"gradients-{task['name']}-alone.pt")
        else:
            pretrain.pretrain_worker(task["job"], worker)


def work_together(tasks: list[Task], worker: ForkedWorker) -> None:
    """All tasks in one of two workers."""
    folder, rank = worker.folder, worker.rank
    for task in tasks:
        worker.folder = folder / f"{task['name']}-together"
        if task["job"] is None:
            torch.save(gradients_of(task, worker), folder / f"gradients-{task['name']}-{rank}.pt")
            continue
        pretrain.pretrain_worker(task["job"], worker)
        worker.folder = folder / f"{task['name']}-cut"
        with contextlib.suppress(Killed), dying_before(3):
            pretrain.pretrain_worker(task["job"], worker)
        worker.barrier()
        pretrain.pretrain_worker(task["job"], worker)


def main(folder: Path) -> int:
    """One worker, then both; the exit code is the worse one."""
    tasks: list[Task] = json.loads((folder / "tasks.json").read_text())
    code = run_forked(folder, partial(work_together, tasks))
    work_alone(folder, tasks)
    return code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
