"""The stages of the table, each made once and kept under the hash of its settings and of what it was made from.

They are the product's own stages, run in this process (`LocalWorker`, the teacher embedded): no Ray, no Triton, nothing else differs.

    CACHE/pretrain-3f2a.../    the folder that the stage wrote, and stage.json with its settings and its result
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.cluster.worker import LocalWorker, Row
from distill.data_settings import DataSettings
from distill.devices import best_device
from distill.evaluation import evaluate_on, evaluation_batches, network_logits
from distill.image_sets import open_labelled, open_unlabelled
from distill.label_metrics import score
from distill.models.saved_classifier import load_classifier
from distill.models.settings import NetworkSettings
from distill.progress import RowLine, console
from distill.rejections import RejectionLog
from distill.stages import Stage, plain
from export.settings import TeacherExportSettings
from export.teacher import TEACHER_FILE, export_teacher, publish_teacher
from student_trainer.job import TrainJob
from student_trainer.settings import StoreSettings, TrainSettings
from student_trainer.store import StoreIdentity
from student_trainer.train import keep_students
from student_trainer.worker import train_worker
from teacher_server.address import TeacherAddress
from teacher_trainer.finetune import FinetuneJob, finetune_worker
from teacher_trainer.pretrain import pretrain_result, pretrain_worker
from teacher_trainer.pretrain_job import PretrainJob
from teacher_trainer.settings import FinetuneSettings, PretrainSettings

Result = dict[str, Any]


@dataclass(frozen=True)
class Made:
    """A finished stage."""

    folder: Path
    digest: str
    result: Result


class Stages:
    """The stages of one image set, with one seed.

    Args:
        cache: folder that holds one folder a stage.
        data: the images; `label_fraction` is set anew for each stage.
        images_digest: names the shards (`bench.science.datasets` makes the same bytes each time).
        threads: of the embedded teacher; 0 for as many as cores.
    """

    def __init__(self, cache: Path, data: DataSettings, images_digest: str, seed: int, threads: int = 0) -> None:
        self.cache, self.data, self.images, self.seed, self.threads = cache, data, images_digest, seed, threads

    def pretrain(self, settings: PretrainSettings) -> Made:
        """Stage 1."""

        def work(folder: Path) -> Result:
            job = PretrainJob(data=self.data.absolute(), pretrain=settings, seed=self.seed, rejected_path=str(folder / "rejected.jsonl"))
            with _shown("pretrain") as show:
                pretrain_worker(job.model_dump(mode="json"), LocalWorker(folder, show))
            return pretrain_result(folder / "checkpoint")

        return self._made("pretrain", {"pretrain": plain(settings)}, {}, work)

    def classify(self, network: NetworkSettings, settings: FinetuneSettings, fraction: float, pretrained: Made | None) -> Made:
        """Stage 2, linear evaluation, or (without `pretrained`) the supervised baseline. `result` holds the scores on the test images."""

        def work(folder: Path) -> Result:
            job = FinetuneJob(
                data=self.data.replace(label_fraction=fraction).absolute(),
                finetune=settings,
                network=network,
                pretrained=str(pretrained.folder / "checkpoint") if pretrained else None,
                seed=self.seed,
                class_names=tuple(self.data.class_names or ()),
                rejected_path=str(folder / "rejected.jsonl"),
            )
            with _shown("classify") as show:
                finetune_worker(job.model_dump(mode="json"), LocalWorker(folder, show))
            return {"scores": self._scores(folder / "checkpoint")}

        inputs = {"pretrain": pretrained.digest} if pretrained else {}
        return self._made("classify", {"network": plain(network), "finetune": plain(settings), "fraction": fraction}, inputs, work)

    def serve(self, classifier: Made, student: str | None = None) -> Made:
        """The classifier (or one student of a distillation) through the parity gate into a model repository."""
        origin = classifier.folder / "students" / student if student else classifier.folder / "checkpoint"

        def work(folder: Path) -> Result:
            saved, settings = load_classifier(origin), TeacherExportSettings(name="teacher")
            with RejectionLog(folder / "rejected.jsonl", 0.01) as rejections:
                first = next(evaluation_batches(open_unlabelled(self.data), self.data, rejections))
            crops, card = first.crops_VBHWC[0], saved.card
            info = export_teacher(saved.network, card.preprocessing, card.class_names, crops, first.image_ids, folder, settings)
            publish_teacher(folder, folder / "repository", settings)
            return {"fingerprint": info.fingerprint, "file": TEACHER_FILE}

        return self._made("serve", {"student": student}, {"classifier": classifier.digest}, work)

    def distill(self, teacher: Made, settings: TrainSettings, fraction: float) -> Made:
        """Stage 3. `result` holds the scores of each student on the test images. The soft labels are kept beside the teacher."""

        def work(folder: Path) -> Result:
            data = self.data.replace(label_fraction=fraction)
            job = TrainJob(
                objective="distill",
                data=data.absolute(),
                train=settings,
                epochs=settings.epochs,
                seed=self.seed,
                class_names=tuple(self.data.class_names or ()),
                rejected_path=str(folder / "rejected.jsonl"),
                store=StoreSettings(max_tv=0.02, temperatures=[settings.temperature]),
                teacher=TeacherAddress(
                    model="teacher", repository=str((teacher.folder / "repository").absolute()), num_threads=self.threads
                ),
            )
            identity = StoreIdentity(
                fingerprint=teacher.result["fingerprint"],
                num_classes=len(job.class_names),
                recipe=job.recipe,
                seed=self.seed,
                images=job.open_images().digest(),
            )
            store = teacher.folder / "store" / f"{identity.digest()[:16]}-{settings.temperature:g}"
            job = job.replace(store_identity=identity, store_folder=str(store.absolute()))
            with _shown("distill") as show:
                train_worker(job.model_dump(mode="json"), LocalWorker(folder, show))
            progress = keep_students(folder / "checkpoint" / "students", job, folder)
            scores = {student.name: self._scores(folder / "students" / student.name) for student in settings.students}
            return {"scores": scores, "totals": progress["totals"], "epochs": progress["epochs"]}

        return self._made("distill", {"train": plain(settings), "fraction": fraction}, {"teacher": teacher.digest}, work)

    def _made(self, name: str, settings: dict[str, Any], inputs: dict[str, str], work: Callable[[Path], Result]) -> Made:
        settings = {**settings, "data": plain(self.data.preprocessing), "window_shards": self.data.window_shards, "seed": self.seed}
        inputs = {**inputs, "images": self.images}
        stage = Stage(self.cache, f"{name}-{Stage(self.cache, name, settings, inputs).digest[:16]}", settings, inputs)
        result = stage.result()
        if result is None:
            console.print(f"[bold]{stage.name}[/bold], seed {self.seed}")
            result = stage.finish(work(stage.begin()))
        return Made(stage.folder, stage.digest, result)

    def _scores(self, classifier: Path) -> Result:
        """On all test images."""
        network = load_classifier(classifier).network.to(best_device())
        with RejectionLog(classifier.parent / "rejected-test.jsonl", 0.01) as rejections:
            logits_NK, labels_N = evaluate_on(network_logits(network), open_labelled(self.data.test, self.data), self.data, rejections)
        scores = score(logits_NK, labels_N).model_dump(exclude={"reliability"})
        scores["num_parameters"] = sum(parameter.numel() for parameter in network.parameters())
        return scores


@contextmanager
def _shown(title: str) -> Iterator[Callable[[Row], None]]:
    """A progress line for a worker's rows."""
    line, failed = RowLine(title), True
    try:
        yield line.show
        failed = False
    finally:
        line.close(failed)
