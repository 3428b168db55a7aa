"""One run: its folder, its stages, and what each stage depends on.

The stages form a chain of digests: the digest of a stage covers its settings and the digests of what it reads, so a changed setting makes
its own stage and those after it anew, and nothing else.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from distill.checkpoint import file_sha256
from distill.cli.run_file import RunFile
from distill.errors import ConfigError
from distill.image_sets import class_names_of, open_labelled, open_unlabelled
from distill.rejections import RejectionLog
from distill.stages import Stage, plain, prepare_run_dir
from student_trainer.job import TrainJob
from student_trainer.store import StoreIdentity
from teacher_server.address import TeacherAddress

NO_EFFECT = {"requests_in_flight": 1, "teacher_patience_s": 1, "checkpoint_every_steps": 1, "num_evaluations": 1, "control": True}
"""Settings of training that change how it is done and not what comes out; their values here name the stage."""


class Run:
    """A run file, opened."""

    def __init__(self, file: RunFile) -> None:
        self.class_names = class_names_of(file.data)
        self.file = file.replace(data=file.data.replace(class_names=list(self.class_names)))
        self.folder = Path(file.run_dir)
        prepare_run_dir(self.folder)
        self._image_digests: dict[str, str] = {}

    def rejections(self) -> RejectionLog:
        """The list of unusable images, `rejected.jsonl` in the run folder."""
        return RejectionLog(self.folder / "rejected.jsonl", self.file.data.max_rejected_share)

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

    @property
    def pretrain(self) -> Stage:
        """Stage 1."""
        settings = plain(self.file.pretrain.replace(checkpoint_every_s=1))  # how often it is saved changes nothing
        return Stage(self.folder, "pretrain", {"pretrain": settings, "crops": self._crops}, {"images": self.images("unlabelled")})

    @property
    def finetune(self) -> Stage:
        """Stage 2."""
        settings = {"finetune": plain(self.file.finetune), "crops": self._crops, "label_fraction": self.file.data.label_fraction}
        return Stage(self.folder, "finetune", settings, {"pretrain": self.pretrain.digest, "images": self.images("labelled")})

    @property
    def imported(self) -> Stage:
        """The teacher from elsewhere.

        Raises:
            ConfigError: the run file has no `import` section, or its file does not exist.
        """
        if self.file.import_ is None:
            raise ConfigError("the run file has no `import` section; see docs/run_file.md")
        path = Path(self.file.import_.path)
        if not path.is_file():
            raise ConfigError(f"import.path {path} does not exist")
        settings = {"import": plain(self.file.import_), "crops": self._crops, "teacher": plain(self.file.teacher)}
        return Stage(self.folder, "import", settings, {"file": file_sha256(path)})

    @property
    def teacher(self) -> Stage:
        """The exported teacher."""
        origin = self.imported if self.file.import_ else self.finetune
        return Stage(self.folder, "export-teacher", {"teacher": plain(self.file.teacher)}, {origin.name: origin.digest})

    @property
    def train(self) -> Stage:
        """Stage 3."""
        settings = {
            "train": plain(self.file.train.replace(**NO_EFFECT)),
            "crops": self._crops,
            "max_tv": self.file.store.max_tv,
            "num_workers": self.file.ray.num_workers,
        }
        inputs = {"teacher": self.teacher.digest, "images": self.images("unlabelled")}
        return Stage(self.folder, "train", settings, inputs)

    @property
    def control(self) -> Stage:
        """The students trained on labels alone."""
        settings = {"label_fraction": self.file.data.label_fraction, **self.train.settings}
        return Stage(self.folder, "control", settings, {"images": self.images("labelled")})

    @property
    def evaluate(self) -> Stage:
        """Everyone on the test images."""
        inputs = {"train": self.train.digest, "test": self.images("test"), "teacher": self.teacher.digest}
        if self.file.train.control:
            inputs["control"] = self.control.digest
        return Stage(self.folder, "evaluate", {}, inputs)

    @property
    def edge(self) -> Stage:
        """The students' files."""
        return Stage(self.folder, "export-student", {"edge": plain(self.file.edge)}, {"train": self.train.digest})

    @property
    def repository(self) -> Path:
        """Triton's model repository."""
        return self.folder / "model_repository"

    def store_identity(self, fingerprint: str) -> StoreIdentity:
        """Whose labels this run's store holds."""
        return StoreIdentity(
            fingerprint=fingerprint,
            num_classes=len(self.class_names),
            recipe=self.job("labels", 1).recipe,
            seed=self.file.seed,
            images=self.images("unlabelled"),
        )

    def store_folder(self, identity: StoreIdentity) -> Path:
        """Where the labels are kept."""
        return Path(self.file.store.path) if self.file.store.path else self.folder / "store" / identity.digest()[:16]

    def job(self, objective: str, epochs: int, **more: Any) -> TrainJob:
        """What Ray workers are told."""
        return TrainJob.model_validate(
            {
                "objective": objective,
                "data": self.file.data.absolute(),
                "train": self.file.train,
                "epochs": epochs,
                "seed": self.file.seed,
                "class_names": self.class_names,
                "rejected_path": str((self.folder / "rejected.jsonl").absolute()),
                "num_threads": self.file.ray.threads,
                "store": self.file.store,
                **more,
            }
        )

    def distill_job(self, teacher: TeacherAddress) -> TrainJob:
        """The job that reads the teacher's labels through the store."""
        identity = self.store_identity(self.teacher.require()["fingerprint"])
        folder = str(self.store_folder(identity).absolute())
        return self.job("distill", self.file.train.epochs, teacher=teacher, store_folder=folder, store_identity=identity)
