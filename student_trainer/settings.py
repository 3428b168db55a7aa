"""Settings of the soft-label store, the stream, and the students trained on it."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from distill.config import Section
from distill.models.settings import NetworkSettings
from distill.optimizer_settings import OptimizerSettings

SELF_DISTILLED = "self-distilled"
"""Name of the teacher's own student, in files and in the report."""


class StoreSettings(Section):
    """Where soft labels are kept and how exactly."""

    path: str | None = None
    """Folder of the stores; there is one in it for each teacher, crop recipe and image set. Default: `store` in the run folder."""
    max_tv: float = Field(default=0.02, gt=0, lt=1)
    """Largest total-variation error that a kept label may have at the temperatures below, and at any other that it is read at."""
    temperatures: list[float] = Field(default_factory=lambda: [1.0], min_length=1)
    """Temperatures at which the error is computed exactly when a label is written; train.temperature is always among them. A label kept for
    temperature 1 is often too rough at 0.1, and is then asked for again: name both if the store is to serve both."""


class StudentSettings(Section):
    """One student."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    """Its name in files and in the report."""
    network: NetworkSettings
    """Its network."""
    num_head_layers: int = Field(default=0, ge=0, le=3)
    """Layers of the projection head between backbone and classifier; 0 as in the paper. For a student that starts from a checkpoint with
    such layers and is to keep them."""
    initial_weights: str = "random"
    """What it starts from: `random`, `pretrained` (the backbone that this run pretrained), `finetuned` (this run's teacher, whole), or the
    folder of a checkpoint, pretrained or classifier, of the same network."""
    optimizer: OptimizerSettings = OptimizerSettings()
    """Its optimiser and schedule."""

    @model_validator(mode="after")
    def _has_a_head(self) -> Self:
        if self.num_head_layers and self.network.name != "resnet":
            raise ValueError(f"network {self.network.name!r} has no projection head of ours: num_head_layers must be 0")
        return self


class DistillSettings(Section):
    """How students learn from a teacher: the images, the loss, and how the labels are asked for."""

    epochs: int = Field(default=100, ge=1)
    """Passes over the images that the teacher is asked about."""
    images: Literal["unlabelled", "labelled"] = "unlabelled"
    """The images that the teacher is asked about: all of `data.unlabelled`, or only the labelled ones whose labels may be used (an ablation
    of the paper's)."""
    num_views: int = Field(default=50, ge=1)
    """Different crops of each image; epoch e uses view e mod num_views, so later epochs read labels that are already stored."""
    global_batch: int = Field(default=256, ge=2)
    """Images of one step over all workers. Where only labelled images are used and there are fewer, all of them are one step."""
    alpha: float = Field(default=1.0, gt=0, le=1)
    """Share of the distillation loss; 1 - alpha is that of the cross-entropy on the labels (SimCLRv2, equation 3). Below 1 every step also
    draws a batch of labelled images."""
    labelled_batch: int | None = Field(default=None, ge=1)
    """Labelled images of one step over all workers, where alpha is below 1. Default: `global_batch`, at most all there are."""
    min_area: float = Field(default=0.08, gt=0, le=1)
    """Smallest share of an image's area that a crop covers."""
    temperature: float = Field(default=1.0, gt=0, le=100)
    """Distillation temperature of teacher and student. The paper's: 0.1 for self-distillation, 1 from a big to a small network."""
    scale_by_temperature_squared: bool = False
    """Multiply the loss by T squared, which keeps the size of its gradient (Hinton 2015); the paper's formula does not."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Number format of the students' networks: `fp32`, `bf16`, or `auto`, which takes bf16 where the hardware is fast at it."""
    requests_in_flight: int = Field(default=4, ge=1)
    """Batches of one worker that may be waiting for the teacher."""
    teacher_patience_s: float = Field(default=600, gt=0)
    """How long a teacher that gives no answer is waited for before the run stops (resumable)."""
    checkpoint_every_steps: int = Field(default=500, ge=1)
    """Steps between checkpoints; one is written at each evaluation anyway."""
    num_evaluations: int = Field(default=20, ge=1)
    """Evaluations on the test images, at ends of epochs spread evenly over the run; the last epoch's is always one."""


class TrainSettings(DistillSettings):
    """Stage 3: students trained on the teacher's soft labels, all on one stream (SimCLRv2, section 2.3)."""

    students: list[StudentSettings] = Field(min_length=1)
    """The students. Each image is decoded once, asked for once, and trains all of them."""
    control: bool = True
    """Also train each student on the labelled images alone, for as many steps: what distillation is compared with."""

    @model_validator(mode="after")
    def _distinct_names(self) -> Self:
        names = [student.name for student in self.students]
        if len(set(names)) != len(names):
            raise ValueError("every student needs a name of its own")
        return self


class SelfDistillSettings(DistillSettings):
    """The teacher teaches a network like itself, and that one labels for the students (SimCLRv2, section 2.3: a teacher that was distilled
    once is the better teacher)."""

    temperature: float = Field(default=0.1, gt=0, le=100)
    """Distillation temperature of both networks; the paper's for self-distillation."""
    network: NetworkSettings | None = None
    """The network. Default: the teacher's backbone."""
    initial_weights: str = "random"
    """What it starts from; see `train.students.initial_weights`."""
    num_head_layers: int = Field(default=0, ge=0, le=3)
    """Layers of the projection head under its classifier; none, as in the paper, unless it starts from weights that have them, such as
    `finetuned`."""
    optimizer: OptimizerSettings = OptimizerSettings()
    """Its optimiser and schedule."""

    def training(self, network: NetworkSettings) -> TrainSettings:
        """As the training of one student, without a control.

        Args:
            network: `network`, or the teacher's where that is None.
        """
        student = StudentSettings(
            name=SELF_DISTILLED,
            network=network,
            num_head_layers=self.num_head_layers,
            initial_weights=self.initial_weights,
            optimizer=self.optimizer,
        )
        shared = {name: getattr(self, name) for name in DistillSettings.model_fields}
        return TrainSettings(students=[student], control=False, **shared)
