"""What Ray workers are told: one job, as plain data."""

from __future__ import annotations

from typing import Literal

from distill.config import Section
from distill.crops import CropRecipe
from distill.data_settings import DataSettings
from student_trainer.label_path import LabelRules
from student_trainer.settings import StoreSettings, TrainSettings
from student_trainer.store import StoreIdentity
from teacher_server.address import TeacherAddress


class TrainJob(Section):
    """Everything a worker needs to know; plain data, sent to it by Ray."""

    objective: Literal["distill", "labels"]
    """The teacher's soft labels on the unlabelled images, or (the control) the labels of the labelled ones."""
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
    num_threads: int
    """Threads that torch uses in each worker on a CPU."""
    teacher: TeacherAddress | None = None
    """Where the teacher is asked."""
    store_folder: str | None = None
    """Folder of the soft-label store."""
    store_identity: StoreIdentity | None = None
    """Whose labels it must hold."""
    store: StoreSettings = StoreSettings()
    """How exactly labels are kept."""

    @property
    def recipe(self) -> CropRecipe:
        """How training crops are cut."""
        return CropRecipe(kind="random_resized", image_size=self.data.image_size, min_area=self.train.min_area)

    @property
    def rules(self) -> LabelRules:
        """How labels are read and kept."""
        temperatures = tuple(sorted({*self.store.temperatures, self.train.temperature}))
        return LabelRules(self.train.temperature, temperatures, self.store.max_tv, self.train.teacher_patience_s)
