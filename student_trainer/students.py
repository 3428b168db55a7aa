"""The students of one run: networks, optimisers, and their common checkpoint.

All of them see every batch. Shapes: B crops, K classes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.checkpoint import load_checkpoint, load_weights, save_checkpoint
from distill.errors import CheckpointError, TeacherAnswerError
from distill.models.classifier import Classifier, build_classifier
from distill.optimizers import build_optimizer, take_step
from distill.teacher_info import Preprocessing
from student_trainer.loss import distillation_loss
from student_trainer.settings import StudentSettings, TrainSettings

STUDENTS = "students"
"""`kind` in the manifest of the common checkpoint."""


class Student:
    """One student: its network, its optimiser and the last loss."""

    def __init__(self, settings: StudentSettings, num_classes: int, preprocessing: Preprocessing, seed: int, device: torch.device) -> None:
        torch.manual_seed(seed)
        self.settings = settings
        self.network: Classifier = build_classifier(settings.network, num_classes, preprocessing).to(device)
        self.trained: nn.Module = self.network
        self.optimizer = build_optimizer(self.network, settings.optimizer)
        self.loss = float("nan")

    def step(
        self, crops_BHWC: Tensor, teacher_BK: Tensor | None, labels_B: Tensor, train: TrainSettings, step: int, num_steps: int
    ) -> None:
        """One update: on the teacher's logits where there are any, else on the labels.

        Raises:
            TeacherAnswerError: a loss that is not finite; the weights keep their last value.
        """
        self.trained.train()
        student_BK = self.trained(crops_BHWC)
        if teacher_BK is None:
            loss = F.cross_entropy(student_BK, labels_B)
        else:
            loss = distillation_loss(student_BK, teacher_BK, train.temperature, train.scale_by_temperature_squared)
        self.loss = loss.item()
        if not torch.isfinite(loss):
            raise TeacherAnswerError(f"student {self.settings.name}: the loss is {self.loss} at step {step}; try a smaller learning_rate")
        take_step(self.optimizer, self.trained, loss, self.settings.optimizer, step, num_steps)


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
