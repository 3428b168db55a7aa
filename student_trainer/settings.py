"""Settings of the soft-label store, the stream, and the students trained on it."""

from __future__ import annotations

import os
from typing import Self

from pydantic import Field, model_validator

from distill.config import Section
from distill.models.settings import NetworkSettings
from distill.optimizer_settings import OptimizerSettings


class StoreSettings(Section):
    """Where soft labels are kept and how exactly."""

    path: str | None = None
    """Folder of the store. Default: inside the run folder, one for each teacher, crop recipe and image set."""
    max_tv: float = Field(default=0.02, gt=0, lt=1)
    """Largest total-variation error that a kept label may have at the temperatures below, and at any other that it is read at."""
    temperatures: list[float] = Field(default_factory=lambda: [1.0], min_length=1)
    """Temperatures at which the error is computed exactly when a label is written; train.temperature is always among them."""


class RaySettings(Section):
    """The Ray cluster that labels and trains."""

    address: str | None = None
    """Address of a running cluster. Without it one is started on this machine, bound to loopback, with a token of its own."""
    num_workers: int = Field(default=1, ge=1)
    """Training workers (data-parallel)."""
    use_gpu: bool = False
    """One GPU for each training worker."""
    cpus_per_worker: float = Field(default=1, gt=0)
    """CPUs that Ray sets aside for each worker."""
    threads_per_worker: int = Field(default=0, ge=0)
    """Threads that torch uses in each worker on a CPU; 0 shares this machine's cores among the workers."""
    max_failures: int = Field(default=3, ge=-1)
    """Times that a dead worker is replaced and training resumes from the last checkpoint; -1 for always."""

    @property
    def threads(self) -> int:
        """Threads that torch uses in each worker on a CPU. (Ray itself would leave it one.)"""
        return self.threads_per_worker or max(1, (os.cpu_count() or 1) // self.num_workers)


class StudentSettings(Section):
    """One student."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    """Its name in files and in the report."""
    network: NetworkSettings
    """Its network."""
    optimizer: OptimizerSettings = OptimizerSettings()
    """Its optimiser and schedule."""


class TrainSettings(Section):
    """Stage 3: students trained on the teacher's soft labels, all on one stream (SimCLRv2, section 2.3)."""

    students: list[StudentSettings] = Field(min_length=1)
    """The students. Each image is decoded once, asked for once, and trains all of them."""
    epochs: int = Field(default=100, ge=1)
    """Passes over the unlabelled images."""
    num_views: int = Field(default=50, ge=1)
    """Different crops of each image; epoch e uses view e mod num_views, so later epochs read labels that are already stored."""
    global_batch: int = Field(default=256, ge=2)
    """Images of one step over all workers."""
    min_area: float = Field(default=0.08, gt=0, le=1)
    """Smallest share of an image's area that a crop covers."""
    temperature: float = Field(default=1.0, gt=0, le=100)
    """Distillation temperature of teacher and student."""
    scale_by_temperature_squared: bool = False
    """Multiply the loss by T squared, which keeps the size of its gradient (Hinton 2015); the paper's formula does not."""
    requests_in_flight: int = Field(default=4, ge=1)
    """Batches of one worker that may be waiting for the teacher."""
    teacher_patience_s: float = Field(default=600, gt=0)
    """How long a teacher that gives no answer is waited for before the run stops (resumable)."""
    checkpoint_every_steps: int = Field(default=500, ge=1)
    """Steps between checkpoints; one is written at each evaluation anyway."""
    num_evaluations: int = Field(default=20, ge=1)
    """Evaluations on the test images, at ends of epochs spread evenly over the run; the last epoch's is always one."""
    control: bool = True
    """Also train each student on the labelled images alone, for as many steps: what distillation is compared with."""

    @model_validator(mode="after")
    def _distinct_names(self) -> Self:
        names = [student.name for student in self.students]
        if len(set(names)) != len(names):
            raise ValueError("every student needs a name of its own")
        return self
