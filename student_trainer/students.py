"""The students of one run: networks, optimisers, and their common checkpoint.

All of them see every batch. Shapes: B crops, K classes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from distill.checkpoint import load_checkpoint, load_weights, save_checkpoint
from distill.cluster.ddp import sync_batch_norm, wrap
from distill.cluster.worker import Worker
from distill.errors import CheckpointError, TeacherAnswerError
from distill.models.classifier import Classifier, build_classifier
from distill.optimizers import build_optimizer, take_step
from distill.precision import autocast
from student_trainer.job import TrainJob
from student_trainer.loss import Lesson, lesson_loss
from student_trainer.settings import StudentSettings, TrainSettings

STUDENTS = "students"
"""`kind` in the manifest of the common checkpoint."""


class Student:
    """One student: its network, its optimiser and the last loss.

    Args:
        network: as it starts.
        global_batch: images of one step over all workers; what the learning rate may be scaled by.
    """

    def __init__(self, settings: StudentSettings, network: Classifier, device: torch.device, global_batch: int) -> None:
        self.settings = settings
        self.device = device
        # Convolutions are fastest with the channels innermost, as the crops come. (torch's stubs do not know this way to say so.)
        self.network: Classifier = network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.trained: nn.Module = self.network
        self.optimizer = build_optimizer(self.network, settings.optimizer, global_batch)
        self.loss = float("nan")

    def join(self, worker: Worker) -> None:
        """Train together with the other workers from now on: batch norm over the global batch, gradients averaged."""
        self.trained = wrap(sync_batch_norm(self.network, worker), worker)

    def step(self, lesson: Lesson, train: TrainSettings, step: int, num_steps: int) -> None:
        """One update.

        Raises:
            TeacherAnswerError: a loss that is not finite; the weights keep their last value.
        """
        self.trained.train()
        with autocast(train.precision, self.device):
            student_BK = self.trained(lesson.crops_BHWC)
        squared = train.scale_by_temperature_squared
        loss = lesson_loss(student_BK, lesson, alpha=train.alpha, temperature=train.temperature, scale_by_temperature_squared=squared)
        self.loss = loss.item()
        if not torch.isfinite(loss):
            raise TeacherAnswerError(f"student {self.settings.name}: the loss is {self.loss} at step {step}; try a smaller learning_rate")
        take_step(self.optimizer, self.trained, loss, self.settings.optimizer, step, num_steps)


def new_students(job: TrainJob, device: torch.device, global_batch: int) -> list[Student]:
    """The students of a job with random weights, the same for the same seed."""
    students = []
    for number, settings in enumerate(job.train.students):
        torch.manual_seed(job.seed + number)
        network = build_classifier(settings.network, len(job.class_names), job.data.preprocessing, settings.num_head_layers)
        students.append(Student(settings, network, device, global_batch))
    return students


def save_students(folder: Path, students: list[Student], progress: dict[str, Any]) -> None:
    """Write weights and optimisers of all students and where in the plan they are."""
    weights = {f"{s.settings.name}/{name}": tensor for s in students for name, tensor in s.network.state_dict().items()}
    state = {s.settings.name: s.optimizer.state_dict() for s in students}
    save_checkpoint(folder, weights, {"kind": STUDENTS, **progress}, state)


def restore_students(folder: Path, students: list[Student]) -> dict[str, Any]:
    """Put a checkpoint's weights and optimiser states into `students`; return what `save_students` was told of the progress.

    Raises:
        CheckpointError: damaged, or of other students.
    """
    found = load_checkpoint(folder)
    names, known = {s.settings.name for s in students}, {key.partition("/")[0] for key in found.weights}
    if names != known:
        raise CheckpointError(f"{folder} holds the students {', '.join(sorted(known))}, not {', '.join(sorted(names))}")
    for student in students:
        name = student.settings.name
        own = {k.removeprefix(f"{name}/"): v for k, v in found.weights.items() if k.startswith(f"{name}/")}
        load_weights(student.network, own, f"student {name} in {folder}")
        if found.state is not None:
            student.optimizer.load_state_dict(found.state[name])
    return found.manifest
