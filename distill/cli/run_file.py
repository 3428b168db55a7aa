"""The run file: every setting of a run, one section for each stage. `docs/run_file.md` is made from these classes."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import ConfigDict, Field, model_validator

from distill.cluster.settings import RaySettings
from distill.config import Section, load_run_file
from distill.data_settings import DataSettings
from distill.monitor_settings import MonitorSettings
from export.settings import ImportSettings, StudentExportSettings, TeacherExportSettings
from student_trainer.settings import SelfDistillSettings, StoreSettings, SweepSettings, TrainSettings
from teacher_server.settings import ServerSettings
from teacher_trainer.settings import FinetuneSettings, PretrainSettings


class RunFile(Section):
    """One run, from images to edge students."""

    model_config = ConfigDict(**{**Section.model_config, "populate_by_name": True})

    run_dir: str
    """Folder of everything that the run makes. Relative to where `distill` is started."""
    seed: int = Field(default=0, ge=0)
    """Seed of crops, order, label choice and initial weights."""
    data: DataSettings
    """The images."""
    pretrain: PretrainSettings = PretrainSettings()
    """Stage 1: contrastive pretraining of the teacher, without labels."""
    finetune: FinetuneSettings = FinetuneSettings()
    """Stage 2: fine-tuning of the teacher on few labels."""
    import_: ImportSettings | None = Field(default=None, alias="import")
    """A teacher that was trained elsewhere; stages 1 and 2 are then left out. If it has no classes yet, only stage 1 is."""
    teacher: TeacherExportSettings = TeacherExportSettings()
    """Export of the teacher: parity gate and model repository."""
    server: ServerSettings = ServerSettings()
    """The served teacher and its REST gateway."""
    store: StoreSettings = StoreSettings()
    """The soft-label store."""
    ray: RaySettings = RaySettings()
    """The Ray cluster."""
    self_distill: SelfDistillSettings | None = None
    """Between teacher and students: the teacher teaches a network like itself, which then labels for the students. None leaves it out."""
    train: TrainSettings
    """Stage 3: the students."""
    sweep: SweepSettings | None = None
    """Variants of the students to choose among, for `distill sweep`."""
    monitor: MonitorSettings = MonitorSettings()
    """Who else may watch the students being trained."""
    edge: StudentExportSettings = StudentExportSettings()
    """Export of the students."""

    @model_validator(mode="after")
    def _stages_fit(self) -> Self:
        """What a worker would find out otherwise, after all of pretraining."""
        if self.import_ is not None:
            return self
        if self.pretrain.network.name != "resnet":
            raise ValueError(f"pretrain.network.name {self.pretrain.network.name!r}: only our own networks (resnet) are pretrained")
        kept, layers = self.finetune.kept_head_layers, self.pretrain.num_head_layers
        if kept >= layers:
            why = "the last layer of the head makes the embedding"
            raise ValueError(f"finetune.num_head_layers {kept} must be below pretrain.num_head_layers {layers}: {why}")
        return self


def read_run_file(path: Path, overrides: list[str]) -> RunFile:
    """The run file with the overrides applied.

    Raises:
        ConfigError: see `load_run_file`.
    """
    return load_run_file(RunFile, path, overrides)
