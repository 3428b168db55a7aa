"""What the workers of stage 3 are told: one job, as plain data; and which images it is about."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from distill.config import Section
from distill.crops import CropRecipe
from distill.data_settings import DataSettings
from distill.image_sets import open_labelled_subset, open_unlabelled
from distill.loader import LoaderSettings
from distill.sources import Source
from student_trainer.label_path import LabelRules
from student_trainer.settings import StoreSettings, TrainSettings
from student_trainer.store import StoreIdentity
from teacher_server.address import TeacherAddress


class TrainJob(Section):
    """Everything a worker needs to know; plain data, sent to it by Ray."""

    objective: Literal["distill", "labels"]
    """The teacher's soft labels (and below alpha 1 labels too), or (the control) the labels of the labelled images alone."""
    data: DataSettings
    """The images."""
    train: TrainSettings
    """The students."""
    epochs: int
    """Passes over the images of this objective."""
    seed: int
    """Seed of plan, crops and initial weights."""
    class_names: tuple[str, ...]
    """Names of the K classes."""
    rejected_path: str
    """Where unusable images are listed."""
    teacher: TeacherAddress | None = None
    """Where the teacher is asked."""
    store_folder: str | None = None
    """Folder of the soft-label store."""
    store_identity: StoreIdentity | None = None
    """Whose labels it must hold."""
    store: StoreSettings = StoreSettings()
    """How exactly labels are kept."""
    initial_checkpoints: dict[str, str] = Field(default_factory=dict)
    """Student -> folder of the checkpoint that it starts from; those not named start with random weights."""

    @model_validator(mode="after")
    def _known_students(self) -> Self:
        unknown = sorted(self.initial_checkpoints.keys() - {student.name for student in self.train.students})
        if unknown:
            raise ValueError(f"initial_checkpoints names {', '.join(unknown)}, which is no student of this job")
        return self

    @property
    def recipe(self) -> CropRecipe:
        """How the crops that the teacher is asked about are cut and mixed."""
        return self.plain_recipe.replace(mixing=self.train.mixing) if self.train.mixing.mixes else self.plain_recipe

    @property
    def plain_recipe(self) -> CropRecipe:
        """How the crops of labelled images are cut: a class id says nothing about a mixture."""
        data = self.data
        return CropRecipe(kind="random_resized", image_size=data.image_size, min_area=self.train.min_area, interpolation=data.interpolation)

    @property
    def rules(self) -> LabelRules:
        """How labels are read and kept."""
        temperatures = tuple(sorted({*self.store.temperatures, self.train.temperature}))
        # Batches come from the window's shards and, at its end, from those of the next.
        views_held = 2 * self.data.window_shards * self.train.crops_per_decode
        return LabelRules(self.train.temperature, temperatures, self.store.max_tv, self.train.teacher_patience_s, views_held)

    @property
    def mixes_labels(self) -> bool:
        """Whether every step also draws a batch of labelled images."""
        return self.objective == "distill" and self.train.alpha < 1

    def open_images(self) -> Source:
        """The images that an epoch goes through: those that the teacher is asked about, or (the control) those with a label.

        Raises:
            SourceError: see `open_unlabelled` and `open_labelled_subset`.
        """
        if self._only_labelled:
            return self.open_labelled()
        return open_unlabelled(self.data)

    def open_labelled(self) -> Source:
        """The images whose labels may be used.

        Raises:
            SourceError: see `open_labelled_subset`.
        """
        return open_labelled_subset(self.data, self.seed)

    def loading(self, images: Source) -> LoaderSettings:
        """How `images`, from `open_images`, are cut into batches."""
        batch = self.batch_of(images.num_images)
        return LoaderSettings(
            self.seed,
            batch,
            self.data.window_shards,
            num_threads=self.data.num_threads,
            crops_per_decode=1 if self.objective == "labels" else self.train.crops_per_decode,
            mixing_cache_bytes=self.train.mixing_cache_mib * 2**20,
        )

    def batch_of(self, num_images: int) -> int:
        """The global batch of so many images. Few labelled ones, where they are all there is, are one batch."""
        return min(self.train.global_batch, num_images) if self._only_labelled else self.train.global_batch

    def steps_per_epoch(self) -> int:
        """Steps of one pass over `open_images`.

        Raises:
            SourceError: see `open_images`.
        """
        images = self.open_images()
        return images.num_images // self.loading(images).global_batch

    def labelled_loading(self, labelled: Source) -> LoaderSettings:
        """How the labelled images beside them are cut into batches."""
        batch = min(self.train.labelled_batch or self.train.global_batch, labelled.num_images)
        return LoaderSettings(self.seed, batch, self.data.window_shards, num_threads=self.data.num_threads)

    @property
    def _only_labelled(self) -> bool:
        return self.objective == "labels" or self.train.images == "labelled"
