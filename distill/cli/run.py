"""One run: its folder, its stages, and what each stage depends on.

The stages form a chain of digests: the digest of a stage covers its settings and the digests of what it reads, so a changed setting makes
its own stage and those after it anew, and nothing else.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from distill.checkpoint import MANIFEST, file_sha256, read_manifest
from distill.cli.run_file import RunFile
from distill.cli.teacher_import import teacher_digest
from distill.config import digest_of, validate
from distill.errors import CheckpointError, ConfigError, StageMissing
from distill.image_sets import class_names_of, open_labelled, open_unlabelled
from distill.mixing import MixingRecipe
from distill.models.saved_classifier import read_card
from distill.models.settings import NetworkSettings
from distill.rejections import RejectionLog
from distill.sources import read_ids
from distill.stages import Stage, plain, prepare_run_dir
from distill.teacher_info import CROPPING
from export.settings import TeacherExportSettings
from student_trainer.job import TrainJob
from student_trainer.open_store import folder_of_stores
from student_trainer.settings import SELF_DISTILLED, TrainSettings
from student_trainer.store import StoreIdentity
from student_trainer.sweep import expanded
from teacher_server.address import TeacherAddress

NO_EFFECT = {
    "requests_in_flight": 1,
    "teacher_patience_s": 1,
    "checkpoint_every_steps": 1,
    "mixing_cache_mib": 0,
    "control": True,
    "compile_backend": None,
}
"""Settings of training that change how it is done and not what comes out; their values here name the stage."""

NO_EFFECT_ON_CONTROL = {
    "halving": None,
    "early_stop": None,
    "alpha": 1,
    "labelled_batch": None,
    "num_views": 1,
    "crops_per_decode": 1,
    "mixing": MixingRecipe(),
    "temperature": 1,
    "scale_by_temperature_squared": False,
    "weighting": "none",
}
"""And those that only steer what is learnt from a teacher."""


def what_comes_out(train: TrainSettings, **changes: Any) -> dict[str, Any]:
    """The settings of a training that its result depends on, as plain data; the others have a value that is always the same.

    Args:
        changes: made before.
    """
    train = train.replace(**NO_EFFECT, **changes)
    if train.early_stop is None:  # it counts evaluations
        train = train.replace(num_evaluations=1)
    if train.early_stop is None and train.halving is None:
        train = train.replace(held_out_images=1)
    return plain(train)


class Run:
    """A run file, opened."""

    STAGES = (
        "pretrain",
        "finetune",
        "import",
        "export-teacher",
        "self-distill",
        "export-self-distilled",
        "sweep",
        "train",
        "control",
        "evaluate",
        "export-student",
    )
    """Folders of all stages that a run can have."""

    def __init__(self, file: RunFile) -> None:
        self.class_names = class_names_of(file.data)
        self.file = file.replace(data=file.data.replace(class_names=list(self.class_names)))
        self.folder = Path(file.run_dir)
        prepare_run_dir(self.folder)
        self._image_digests: dict[str, str] = {}

    @property
    def rejected_path(self) -> str:
        """Where unusable images are listed, absolute: `rejected.jsonl` in the run folder."""
        return str((self.folder / "rejected.jsonl").absolute())

    def rejections(self) -> RejectionLog:
        """The list of unusable images."""
        return RejectionLog(Path(self.rejected_path), self.file.data.max_rejected_share)

    def images(self, name: Literal["unlabelled", "labelled", "test"]) -> str:
        """Digest of one set of images; opened once."""
        if name not in self._image_digests:
            data = self.file.data
            source = open_unlabelled(data) if name == "unlabelled" else open_labelled(getattr(data, name), data)
            self._image_digests[name] = source.digest()
        return self._image_digests[name]

    @cached_property
    def _crops(self) -> dict[str, Any]:
        """What of `data` changes the pixels that networks see, or their first layer."""
        return {**plain(self.file.data.preprocessing), "window_shards": self.file.data.window_shards, "seed": self.file.seed}

    @cached_property
    def _labels(self) -> dict[str, Any]:
        """Which labels may be used, and which class each of them is."""
        data = self.file.data
        ids = digest_of(sorted(read_ids(Path(data.labelled_ids)))) if data.labelled_ids else None
        return {"label_fraction": data.label_fraction, "labelled_ids": ids, "class_names": list(self.class_names)}

    @property
    def pretrain(self) -> Stage:
        """Stage 1."""
        settings = plain(self.file.pretrain.replace(checkpoint_every_s=1, checkpoint_blocks=False))  # neither changes what comes out
        crops = {name: value for name, value in self._crops.items() if name not in CROPPING}
        return Stage(self.folder, "pretrain", {"pretrain": settings, "crops": crops}, {"images": self.images("unlabelled")})

    @property
    def pretrained(self) -> Path:
        """The checkpoint that fine-tuning starts from: this run's, or an imported one."""
        return self.imported.folder / "pretrained" if self.file.import_ else self.pretrain.folder / "checkpoint"

    @property
    def finetune(self) -> Stage:
        """Stage 2."""
        settings = {"finetune": plain(self.file.finetune.replace(checkpoint_every_s=1)), "crops": self._crops, **self._labels}
        origin = self.imported if self.file.import_ else self.pretrain
        inputs = {origin.name: origin.digest, "images": self.images("labelled"), "test": self.images("test")}
        return Stage(self.folder, "finetune", settings, inputs)

    @property
    def imported(self) -> Stage:
        """The teacher from elsewhere.

        Raises:
            ConfigError, CheckpointError: the run file has no `import` section, or nothing lies where it points.
        """
        if self.file.import_ is None:
            raise ConfigError("the run file has no `import` section; see docs/run_file.md")
        chosen = plain(self.file.import_)
        if self.file.import_.take == "auto":
            del chosen["take"]  # says nothing that the file does not
        settings = {
            "import": chosen,
            "crops": self._crops,
            "teacher": plain(self.file.teacher),
            "class_names": list(self.class_names),
        }
        return Stage(self.folder, "import", settings, {"file": teacher_digest(self.file.import_)})

    @property
    def origin(self) -> Stage:
        """The stage whose classifier becomes the teacher: fine-tuning, or the import of a teacher that has its classes already.

        Raises:
            StageMissing: the import is not finished, so that nobody knows what it brings.
        """
        return self.imported if self.file.import_ and self.imported.require()["made"] != "pretrained" else self.finetune

    @property
    def first_teacher(self) -> Stage:
        """The teacher, exported."""
        return Stage(self.folder, "export-teacher", {"teacher": plain(self.file.teacher)}, {self.origin.name: self.origin.digest})

    @property
    def self_distill(self) -> Stage:
        """The teacher's own student."""
        settings = {"train": what_comes_out(self.self_training), **self._learning}
        inputs = {"teacher": self.first_teacher.digest, "images": self.images("unlabelled"), **self._labelled(self.self_training)}
        return Stage(self.folder, "self-distill", settings, inputs)

    @property
    def second_teacher(self) -> Stage:
        """The self-distilled teacher, exported."""
        settings = {"teacher": plain(self.second_name)}
        return Stage(self.folder, "export-self-distilled", settings, {"self-distill": self.self_distill.digest}, verb="self-distill")

    @property
    def teacher(self) -> Stage:
        """The teacher that labels for the students."""
        return self.second_teacher if self.file.self_distill else self.first_teacher

    @property
    def teacher_settings(self) -> TeacherExportSettings:
        """How it is served."""
        return self.second_name if self.file.self_distill else self.file.teacher

    @property
    def second_name(self) -> TeacherExportSettings:
        """The export of the self-distilled teacher: like the first one's, under a name of its own.

        Raises:
            ConfigError: the first one's name is so long that this one is too long.
        """
        given = self.file.teacher.model_dump(mode="json", exclude_unset=True)  # what is left open must stay open: tuning decides it
        renamed = {**given, "name": f"{self.file.teacher.name}-{SELF_DISTILLED}"}
        return validate(TeacherExportSettings, renamed, origin="the self-distilled teacher")

    @cached_property
    def self_training(self) -> TrainSettings:
        """How the teacher teaches a network like itself.

        Raises:
            ConfigError: the run file has no `self_distill` section, or names no network where the teacher is none of ours.
        """
        if self.file.self_distill is None:
            raise ConfigError("the run file has no `self_distill` section; see docs/run_file.md")
        return self.file.self_distill.training(self.file.self_distill.network or self._teacher_network())

    @property
    def backbone(self) -> NetworkSettings:
        """The pretrained backbone."""
        if self.file.import_ is None:
            return self.file.pretrain.network
        return NetworkSettings.model_validate(read_manifest(self.pretrained)["network"])

    def _teacher_network(self) -> NetworkSettings:
        if self.origin.name == "finetune":
            return self.backbone
        try:
            return read_card(self.origin.folder / "checkpoint").network
        except CheckpointError as error:
            raise ConfigError("the imported teacher is no network of ours: name one in self_distill.network") from error

    @property
    def _learning(self) -> dict[str, Any]:
        """What distillation depends on beside its own settings."""
        # Not the number of workers: they do together what one does, and a run may go on with as many as there are then.
        return {"crops": self._crops, "max_tv": self.file.store.max_tv}

    def _labelled(self, train: TrainSettings) -> dict[str, str]:
        """The labelled images and the checkpoints as inputs of training, where it uses them."""
        inputs = {"labelled": digest_of([self.images("labelled"), self._labels])} if train.alpha < 1 or train.images == "labelled" else {}
        return {**inputs, **self._initial_weights(train)}

    def _initial_weights(self, train: TrainSettings) -> dict[str, str]:
        """The checkpoints that students start from, as inputs of training."""
        folders = self.initial_checkpoints(train)
        return {f"initial weights of {student}": file_sha256(Path(folder) / MANIFEST) for student, folder in folders.items()}

    def initial_checkpoints(self, train: TrainSettings) -> dict[str, str]:
        """Student -> folder of the checkpoint that it starts from.

        Raises:
            StageMissing: it starts from a stage of this run that is not finished.
            ConfigError: no checkpoint in the folder that is named, or no stage of this run makes such weights.
        """
        found = {}
        for student in train.students:
            if student.initial_weights == "random":
                continue
            if student.initial_weights == "pretrained":
                (self.imported if self.file.import_ else self.pretrain).require()
                folder = self.pretrained
            elif student.initial_weights == "finetuned":
                self.origin.require()
                folder = self.origin.folder / "checkpoint"
            else:
                folder = Path(student.initial_weights)
            if not (folder / MANIFEST).is_file():
                raise ConfigError(
                    f"student {student.name}: initial_weights {student.initial_weights}: no checkpoint in {folder};"
                    " give random, pretrained, finetuned, or the folder of a checkpoint"
                )
            found[student.name] = str(folder.absolute())
        return found

    @property
    def sweep(self) -> Stage:
        """The choice among variants of the students."""
        training, _ = self.sweep_training
        settings = {"train": what_comes_out(training), **self._learning}
        inputs = {"teacher": self.teacher.digest, "images": self.images("unlabelled"), **self._labelled(training)}
        return Stage(self.folder, "sweep", settings, inputs)

    @cached_property
    def sweep_training(self) -> tuple[TrainSettings, dict[str, dict[str, Any]]]:
        """How all variants are trained, and what each has of the grid.

        Raises:
            ConfigError: the run file has no `sweep` section; see also `expanded`.
        """
        if self.file.sweep is None:
            raise ConfigError("the run file has no `sweep` section; see docs/run_file.md")
        return expanded(self.file.train, self.file.sweep)

    @property
    def train(self) -> Stage:
        """Stage 3."""
        settings = {"train": what_comes_out(self.file.train), **self._learning}
        inputs = {"teacher": self.teacher.digest, "images": self.images("unlabelled"), **self._labelled(self.file.train)}
        return Stage(self.folder, "train", settings, inputs)

    @property
    def control(self) -> Stage:
        """The students trained on labels alone."""
        train = self.file.train
        settings = {
            "train": what_comes_out(train, **NO_EFFECT_ON_CONTROL),
            "crops": self._crops,
            **self._labels,
        }
        # As many steps as distillation makes: the number of its images counts.
        inputs = {"images": self.images("labelled"), "unlabelled": self.images("unlabelled"), **self._initial_weights(train)}
        return Stage(self.folder, "control", settings, inputs, verb="evaluate")

    @property
    def evaluate(self) -> Stage:
        """Everyone on the test images."""
        inputs = {"train": self.train.digest, "test": self.images("test"), "teacher": self.teacher.digest}
        if self.file.train.control:
            inputs["control"] = self.control.digest
        return Stage(self.folder, "evaluate", {}, inputs)

    @property
    def finished(self) -> bool:
        """Whether everything up to the evaluation is done with these settings."""
        try:
            return self.evaluate.result() is not None
        except StageMissing:
            return False  # what an unfinished stage brings is part of the settings of later ones

    @property
    def edge(self) -> Stage:
        """The students' files, measured on the test images."""
        inputs = {"train": self.train.digest, "test": self.images("test")}
        return Stage(self.folder, "export-student", {"edge": plain(self.file.edge)}, inputs)

    @property
    def repository(self) -> Path:
        """Triton's model repository."""
        return self.folder / "model_repository"

    def job(self, objective: str, train: TrainSettings, **more: Any) -> TrainJob:
        """What Ray workers are told."""
        return TrainJob.model_validate(
            {
                "objective": objective,
                "data": self.file.data.absolute(),
                "train": train,
                "epochs": train.epochs,
                "seed": self.file.seed,
                "class_names": self.class_names,
                "rejected_path": self.rejected_path,
                "store": self.file.store,
                "initial_checkpoints": self.initial_checkpoints(train),
                **more,
            }
        )

    def distill_job(self, address: TeacherAddress, teacher: Stage, train: TrainSettings) -> TrainJob:
        """The job that reads the labels of `teacher` through the store."""
        job = self.job("distill", train)
        identity = StoreIdentity(
            fingerprint=teacher.require()["fingerprint"],
            num_classes=len(self.class_names),
            recipe=job.recipe,
            seed=self.file.seed,
            images=job.open_images().digest(),
        )
        where = folder_of_stores(self.stores, identity.digest()[:16])
        return job.replace(teacher=address, store_folder=where, store_identity=identity)

    @property
    def stores(self) -> str:
        """Folder or URL of this run's stores."""
        return self.file.store.path or str(self.folder / "store")

    @property
    def teachers(self) -> list[Stage]:
        """The stages that make the teacher, each after those that it needs."""
        if self.file.import_:
            stages = [self.imported]
            brought = self.imported.result()
            if brought is None:
                return stages
            if brought["made"] == "pretrained":
                stages.append(self.finetune)
        else:
            stages = [self.pretrain, self.finetune]
        stages.append(self.first_teacher)
        return [*stages, self.self_distill, self.second_teacher] if self.file.self_distill else stages
