"""Settings of the soft-label store, the stream, and the students trained on it."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import Field, model_validator

from distill.config import Section
from distill.mixing import MixingRecipe
from distill.models.settings import NetworkSettings
from distill.optimizer_settings import OptimizerSettings

SELF_DISTILLED = "self-distilled"
"""Name of the teacher's own student, in files and in the report."""


class StoreSettings(Section):
    """Where soft labels are kept and how exactly."""

    path: str | None = None
    """Folder of the stores, or the URL of one on an object store such as `s3://bucket/labels`; there is one store in it for each teacher,
    crop recipe and image set. Default: `store` in the run folder."""
    max_tv: float = Field(default=0.02, gt=0, lt=1)
    """Largest total-variation error that a kept label may have at the temperatures below, and at any other that it is read at."""
    temperatures: list[Annotated[float, Field(gt=0, le=100)]] = Field(default_factory=lambda: [1.0], min_length=1)
    """Temperatures at which the error is computed exactly when a label is written; train.temperature is always among them. A label kept for
    temperature 1 is often too rough at 0.1, and is then asked for again: name both if the store is to serve both."""
    cache: str | None = None
    """Folder where segments fetched from an object store are kept on each machine. Default: `~/.cache/distill/labels`."""
    cache_gb: float = Field(default=20.0, ge=0)
    """Largest size of that folder, 10^9 bytes; what was not used for longest goes first. 0 keeps nothing."""
    claim_s: float = Field(default=60.0, ge=1)
    """A labelling job that has given no sign of life for so long is taken for dead, and another job on the same store does its part."""


class StudentSettings(Section):
    """One student."""

    name: str = Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}$")
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
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """Also keep an exponential moving average of its weights, and judge and keep that one: 0.9999 looks back over about 10,000 steps, 0.999
    over 1000. None: the last weights."""

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
    crops_per_decode: int = Field(default=1, ge=1, le=64)
    """Crops of each image that are cut at one decode, each for a batch of its own, one after the other. So many epochs are one pass over
    the images, and decoding costs so many times less. Steps, labels and evaluations stay as many as with 1; `epochs` must be a multiple."""
    mixing: MixingRecipe = MixingRecipe()
    """Mixup and CutMix of two images before the teacher sees them (function matching, Beyer et al. 2022)."""
    mixing_cache_mib: int = Field(default=256, ge=0)
    """Where crops are mixed: memory of one worker for crops that wait to be mixed a second time, in MiB. Half of the crops of
    `data.window_shards` shards fit in 300 MiB at 4000 images of 224 pixels; with too little, images are decoded twice."""
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
    weighting: Literal["none", "certificate", "entropy"] = "none"
    """How much each image counts in the distillation loss: all alike, by how exactly its label is kept (`certificate`: from 1 for an exact
    label to 1/2 for one at `store.max_tv`), or by how sure the teacher is (`entropy`: 1 + exp(-entropy)). The mean over a global batch is
    kept at 1."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Number format of the students' networks: `fp32`, `bf16`, or `auto`, which takes bf16 where the hardware is fast at it."""
    compile_backend: str | None = None
    """Compile the students' networks with this backend of torch.compile, such as `inductor` (needs a C++ compiler): the first steps are
    slow, the others faster. None does not compile. Nothing of it is in a checkpoint."""
    requests_in_flight: int = Field(default=4, ge=1)
    """Batches of one worker that may be waiting for the teacher."""
    teacher_patience_s: float = Field(default=600, gt=0)
    """How long a teacher that gives no answer is waited for before the run stops (resumable)."""
    checkpoint_every_steps: int = Field(default=500, ge=1)
    """Steps of the run between checkpoints, counted over the epochs; one is written at each evaluation and each rung anyway."""
    num_evaluations: int = Field(default=20, ge=1)
    """Evaluations on the test images, at ends of epochs spread evenly over the run; the last epoch's is always one."""

    @model_validator(mode="after")
    def _whole_passes_of_different_crops(self) -> Self:
        if self.epochs % self.crops_per_decode:
            raise ValueError(
                f"epochs {self.epochs} is not a multiple of crops_per_decode {self.crops_per_decode}: so many epochs are one pass"
                " over the images; change one of them"
            )
        if self.crops_per_decode > self.num_views:
            raise ValueError(
                f"crops_per_decode {self.crops_per_decode} is over num_views {self.num_views}, and the same crop would be trained on"
                " twice in a row; change one of them"
            )
        return self


Metric: TypeAlias = Literal["agreement", "loss"]
"""How students are compared on held-out crops: the share whose first class is the teacher's, or the distillation loss."""


class HalvingSettings(Section):
    """Successive halving (Jamieson & Talwalkar 2016, Li et al. 2018): at each rung only the best students go on."""

    eta: float = Field(default=3.0, gt=1)
    """At each rung one student in eta goes on, at least one."""
    rungs: list[Annotated[float, Field(gt=0, lt=1)]] | None = None
    """Shares of all steps after which the rungs are. Default: as many as bring the students down to one, each eta times as far as the one
    before, the last at 1 / eta; 9 students and an eta of 3 have rungs at 1/9 and 1/3."""
    metric: Metric = "agreement"
    """What the students are ranked by, on held-out crops: `agreement` with the teacher's first class, or the distillation `loss`."""


class EarlyStopSettings(Section):
    """A student that gets no better stops, and the others go on."""

    patience: int = Field(default=5, ge=1)
    """Evaluations (`num_evaluations`) without an improvement after which a student stops."""
    min_delta: float = Field(default=0.0, ge=0)
    """What counts as an improvement: more than this over the best so far."""
    metric: Metric = "agreement"
    """What is looked at, on held-out crops: `agreement` with the teacher's first class, or the distillation `loss`."""


class TrainSettings(DistillSettings):
    """Stage 3: students trained on the teacher's soft labels, all on one stream (SimCLRv2, section 2.3)."""

    students: list[StudentSettings] = Field(min_length=1)
    """The students. Each image is decoded once, asked for once, and trains all of them."""
    control: bool = True
    """Also train each student on the labelled images alone, for as many steps as the whole run has, whether or not halving or early stop
    cut it in distillation: what distillation is compared with."""
    halving: HalvingSettings | None = None
    """Let only the best students go on. None: all train to the end."""
    early_stop: EarlyStopSettings | None = None
    """Stop students that get no better. None: all train to the end."""
    held_out_images: int = Field(default=1000, ge=1)
    """Where students are compared or may stop early: unlabelled images of which one more crop, that no student trains on, is labelled for
    it by the teacher. (They fill whole batches of `global_batch`.)"""

    @model_validator(mode="after")
    def _distinct_names(self) -> Self:
        names = [student.name for student in self.students]
        if len(set(names)) != len(names):
            raise ValueError("every student needs a name of its own")
        return self


class SweepSettings(Section):
    """Many variants of the students on one label stream, of which only the best train to the end (`distill sweep`)."""

    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(min_length=1)
    """Field of a student (not `name`) -> its values, such as `optimizer.learning_rate: [0.03, 0.1, 0.3]` or
    `network.width_multiplier: [0.25, 0.5]`. Every student of `train.students` is trained with every combination."""
    epochs: int | None = Field(default=None, ge=1)
    """Passes over the images of those that are never cut. Default: `train.epochs`."""
    halving: HalvingSettings = HalvingSettings()
    """When the others are cut."""
    max_students: int = Field(default=64, ge=1)
    """A larger grid is refused: all students are in memory at once."""


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
    optimizer: OptimizerSettings = OptimizerSettings(learning_rate=0.01)
    """Its optimiser and schedule. A rate that does well at temperature 1 is 1 / temperature too large for plain SGD (docs/training.md)."""
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """Average its weights over the steps; see `train.students.ema_decay`."""

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
            ema_decay=self.ema_decay,
        )
        shared = {name: getattr(self, name) for name in DistillSettings.model_fields}
        return TrainSettings(students=[student], control=False, **shared)
