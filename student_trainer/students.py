"""The students of one run: networks, optimisers, averaged weights, and their common checkpoint.

All of them see every batch until they are stopped. Shapes: B crops, K classes.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn

from distill.checkpoint import Write, load_checkpoint, load_weights, prepare_checkpoint
from distill.cluster.ddp import sync_batch_norm, wrap
from distill.cluster.worker import Worker
from distill.config import Section
from distill.errors import CheckpointError, ConfigError
from distill.models.classifier import Classifier, build_classifier
from distill.optimizers import build_optimizer, gradient_norm, update
from distill.precision import autocast
from student_trainer.agreement import RunningAgreement
from student_trainer.averaging import AveragedWeights
from student_trainer.job import TrainJob
from student_trainer.loss import Lesson, lesson_loss
from student_trainer.settings import StudentSettings, TrainSettings

STUDENTS = "students"
"""`kind` in the manifest of the common checkpoint."""


AVERAGED = "averaged/"
"""Between a student's name and those of its averaged weights, in the common checkpoint."""


class Stopped(Section):
    """Why a student trains no more while the others go on."""

    why: Literal["diverged", "early stop", "halving"]
    """`diverged`: its loss or its gradient is not finite, and it has nothing to keep. The others keep what they had learnt."""
    step: int
    """Steps that it had taken."""
    detail: str
    """In words."""


class Student:
    """One student: its network, its optimiser, its averaged weights if it has any, and the last loss that was finite.

    Args:
        network: as it starts.
        global_batch: images of one step over all workers; what the learning rate may be scaled by.
        seed: of the job; what dropout and stochastic depth draw follows from it, the student's name, the step and the worker.
    """

    def __init__(self, settings: StudentSettings, network: Classifier, device: torch.device, global_batch: int, seed: int) -> None:
        self.settings = settings
        self.device = device
        self._seed, self._rank = seed, 0
        # Convolutions are fastest with the channels innermost, as the crops come. (torch's stubs do not know this way to say so.)
        self.network: Classifier = network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.trained: nn.Module = self.network
        self.optimizer = build_optimizer(self.network, settings.optimizer, global_batch)
        self.loss = float("nan")
        self.agreement = RunningAgreement()
        self.averaged = None if settings.ema_decay is None else AveragedWeights(self.network, settings.ema_decay)
        self.stopped: Stopped | None = None

    @property
    def judged(self) -> Classifier:
        """The network that is evaluated and kept at the end: the averaged one, or as it is."""
        return self.averaged.network if self.averaged else self.network

    def join(self, worker: Worker, compile_backend: str | None = None) -> None:
        """Train together with the other workers from now on: batch norm over the global batch, gradients averaged.

        Args:
            compile_backend: of torch.compile. `network` stays as it is: what is compiled is a view of it, with the same tensors.

        Raises:
            ConfigError: no backend of this name, or a kind of batch norm that cannot be synchronised.
        """
        self._rank = worker.rank
        if self.stopped:
            return
        self.trained = wrap(sync_batch_norm(self.network, worker), worker)
        if compile_backend is not None:
            self.trained = _compiled(self.trained, compile_backend)

    def step(self, lesson: Lesson, train: TrainSettings, step: int, num_steps: int) -> None:
        """One update; none where the loss or the gradient is not finite: then the student is stopped, in all workers alike."""
        self.trained.train()
        _seed_draws(self.device, self._seed, self.settings.name, step, self._rank)
        with autocast(train.precision, self.device):
            student_BK = self.trained(lesson.crops_BHWC)
        squared = train.scale_by_temperature_squared
        loss = lesson_loss(student_BK, lesson, alpha=train.alpha, temperature=train.temperature, scale_by_temperature_squared=squared)
        # A loss that is not finite in one worker makes the gradient NaN, and the average carries that into every worker.
        (loss * torch.where(torch.isfinite(loss), 1.0, float("nan"))).backward()
        norm = gradient_norm(self.trained)
        loss_value, norm_value = torch.stack([loss.detach(), norm]).tolist()
        if not math.isfinite(norm_value):
            what = "gradient" if math.isfinite(loss_value) else "loss"
            self.stop(Stopped(why="diverged", step=step, detail=f"the {what} is not finite at step {step}; try a smaller learning_rate"))
            return
        self.loss = loss_value
        self.agreement.count(student_BK, lesson)
        update(self.optimizer, self.trained, self.settings.optimizer, step, num_steps, norm)
        if self.averaged:
            self.averaged.follow()

    def stop(self, why: Stopped) -> None:
        """Train no more. What only training needs is given back."""
        self.stopped = why
        self.trained = self.network
        self.optimizer.zero_grad(set_to_none=True)
        self.optimizer.state.clear()


def _seed_draws(device: torch.device, *of: int | str) -> None:
    """Let what a network draws in its forward pass (dropout, stochastic depth) be a function of `of`: so a resumed run draws the same, no
    student's draws depend on another's, and each worker has its own. (`torch.manual_seed` would take 150 us where no GPU is in use.)"""
    seed = int.from_bytes(hashlib.blake2b(repr(of).encode(), digest_size=8, person=b"distill.draws").digest(), "big")
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


def _compiled(network: nn.Module, backend: str) -> nn.Module:
    if backend not in torch.compiler.list_backends(exclude_tags=()):
        raise ConfigError(f"train.compile_backend {backend!r} is none of torch.compile's: {', '.join(torch.compiler.list_backends())}")
    return cast("nn.Module", torch.compile(network, backend=backend))  # the stubs call it a function


def new_students(job: TrainJob, device: torch.device, global_batch: int) -> list[Student]:
    """The students of a job with random weights, the same for the same seed."""
    students = []
    for number, settings in enumerate(job.train.students):
        torch.manual_seed(job.seed + number)
        network = build_classifier(settings.network, len(job.class_names), job.data.preprocessing, settings.num_head_layers)
        students.append(Student(settings, network, device, global_batch, job.seed))
    return students


def prepare_students(students: list[Student], progress: dict[str, Any]) -> Write:
    """A copy of the weights and optimisers of all students and of where in the plan they are, to be written later."""
    weights = {f"{s.settings.name}/{name}": tensor for s in students for name, tensor in s.network.state_dict().items()}
    for s in students:
        if s.averaged:
            weights |= {f"{s.settings.name}/{AVERAGED}{name}": tensor for name, tensor in s.averaged.network.state_dict().items()}
    state = {
        s.settings.name: {"optimizer": s.optimizer.state_dict(), "averaged": s.averaged.num_updates if s.averaged else 0}
        for s in students
        if not s.stopped
    }
    stopped = {s.settings.name: s.stopped.model_dump(mode="json") for s in students if s.stopped}
    return prepare_checkpoint(weights, {"kind": STUDENTS, **progress, "stopped": stopped}, state)


def save_students(folder: Path, students: list[Student], progress: dict[str, Any]) -> None:
    """Write weights and optimisers of all students and where in the plan they are."""
    prepare_students(students, progress)(folder)


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
        averaged = {k.removeprefix(AVERAGED): own.pop(k) for k in list(own) if k.startswith(AVERAGED)}
        load_weights(student.network, own, f"student {name} in {folder}")
        if student.averaged:
            load_weights(student.averaged.network, averaged, f"the averaged weights of student {name} in {folder}")
        if name in found.manifest["stopped"]:
            student.stop(Stopped.model_validate(found.manifest["stopped"][name]))
        elif found.state is not None:
            student.optimizer.load_state_dict(found.state[name]["optimizer"])
            if student.averaged:
                student.averaged.num_updates = found.state[name]["averaged"]
    return found.manifest
