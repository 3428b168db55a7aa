"""The training loop of stage 3 in one worker: its part of every global batch, all students on it, a checkpoint now and then.

Resume is exact: a checkpoint names the next (epoch, step) of the plan, and the loop goes on there.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from distill.cluster.worker import Worker
from distill.errors import DistillError
from distill.evaluation import evaluate_on, network_logits
from distill.image_sets import open_labelled
from distill.rejections import RejectionLog
from student_trainer.initial_weights import load_initial_weights
from student_trainer.job import TrainJob
from student_trainer.lessons import Lessons, open_lessons
from student_trainer.loss import Lesson
from student_trainer.stream import LabelledBatch, LabelledStream
from student_trainer.students import Student, new_students, restore_students, save_students
from student_trainer.totals import Totals

POST_EVERY_S = 0.5


def train_worker(config: dict[str, Any], worker: Worker) -> None:
    """Train the students of a `TrainJob` to the end, from the last checkpoint of the group if there is one.

    Raises:
        DistillError: what the images, the store, the teacher or the training itself raise.
    """
    job = TrainJob.model_validate(config)
    images = job.open_images()
    students = new_students(job, worker.device, job.loading(images).global_batch)
    progress = _start(job, students, worker)
    epoch, step = progress["epoch"], progress["step"]
    for student in students:
        student.join(worker)
    rejections = RejectionLog(Path(job.rejected_path), job.data.max_rejected_share)
    with open_lessons(job, images, rejections, worker, epoch, step) as lessons:
        run = _Run(job, worker, lessons, students, progress)
        steps_per_epoch = lessons.stream.loader.plan(0).num_steps
        while epoch < job.epochs:
            for batch, lesson in lessons.epoch(epoch, step):
                run.train_on(batch, lesson, epoch * steps_per_epoch + batch.crops.step, job.epochs * steps_per_epoch)
                step = batch.crops.step + 1
                if step % job.train.checkpoint_every_steps == 0 and step < steps_per_epoch:
                    run.checkpoint(epoch, step)
            epoch, step = epoch + 1, 0
            lessons.stream.commit()
            worker.barrier()  # all have committed: the next epoch may meet images that another worker asked for
            if is_evaluated(epoch, job.epochs, job.train.num_evaluations):
                run.evaluate(epoch, rejections)
                run.checkpoint(epoch, step)
    rejections.close()


def is_evaluated(epoch: int, num_epochs: int, num_evaluations: int) -> bool:
    """Whether the end of `epoch` (counted from 1) is one of `num_evaluations` that are spread evenly; the last one is."""
    return epoch * num_evaluations // num_epochs > (epoch - 1) * num_evaluations // num_epochs


def _start(job: TrainJob, students: list[Student], worker: Worker) -> dict[str, Any]:
    """epoch and step to go on with, the totals and the epochs so far; the students have the weights that belong to them."""
    with worker.resume() as folder:
        if folder is not None:
            return restore_students(folder / "students", students)
    for student in students:
        initial = job.initial_checkpoints.get(student.settings.name)
        if initial is not None:
            load_initial_weights(student.network, student.settings, job.class_names, Path(initial))
    return {"epoch": 0, "step": 0, "totals": {}, "epochs": []}


class _Run:
    """What the loop does with a batch, at the end of an epoch, and at a checkpoint."""

    def __init__(self, job: TrainJob, worker: Worker, lessons: Lessons, students: list[Student], progress: dict[str, Any]) -> None:
        self.job, self.worker, self.lessons, self.students = job, worker, lessons, students
        self.totals = Totals(progress["totals"])
        self.epochs: list[dict[str, Any]] = list(progress["epochs"])
        """One row an epoch: mean loss and test top-1 of each student. In the checkpoint, so that no row is lost or doubled."""
        self._posted = 0.0
        self._losses: list[list[float]] = []
        if isinstance(lessons.stream, LabelledStream):
            lessons.stream.on_silence = self._tell_silence

    def train_on(self, batch: LabelledBatch, lesson: Lesson, step: int, num_steps: int) -> None:
        """One step of every student."""
        size = len(batch.crops.image_ids)
        if size < 2 and self.worker.world > 1:
            raise DistillError(f"worker {self.worker.rank} has {size} usable images in step {step}, and the others cannot go on without it")
        if size < 2:
            return  # batch norm needs two; only a batch of bad images comes here
        for student in self.students:
            student.step(lesson, self.job.train, step, num_steps)
        self._losses.append([student.loss for student in self.students])
        self.totals.count(batch, self.lessons.stream.waits)
        if time.monotonic() - self._posted > POST_EVERY_S:
            self._post_step(step + 1, num_steps)

    def _post_step(self, step: int, num_steps: int) -> None:
        self._posted = time.monotonic()
        losses = {student.settings.name: student.loss for student in self.students}
        said = [", ".join(f"{name} {loss:.3f}" for name, loss in losses.items())]
        if self.job.objective == "distill":
            said += [f"{self.totals.reuse():.0%} of labels from the store", self.lessons.stream.waits.describe()]
        self.worker.post(
            {
                "kind": "step",
                "step": step,
                "of": num_steps,
                "images": self.lessons.stream.loader.settings.global_batch,
                "note": f"loss {', '.join(said)}",
                "losses": losses,
                "waits": self.lessons.stream.waits.model_dump(),
                "totals": self.totals.of_this_worker(),
            }
        )

    def _tell_silence(self, seconds: float) -> None:
        if seconds > 0:
            self.worker.post({"kind": "silence", "seconds": seconds})

    def evaluate(self, epoch: int, rejections: RejectionLog) -> None:
        """Accuracy on the test images and mean loss (of worker 0's images) since the last evaluation, as a row for the journal."""
        means = np.mean(self._losses, axis=0).tolist() if self._losses else [float("nan")] * len(self.students)
        self._losses.clear()
        if self.worker.rank != 0:
            return
        row: dict[str, Any] = {"kind": "epoch", "epoch": epoch, "loss": {}, "top1": {}}
        test = open_labelled(self.job.data.test, self.job.data)
        for student, loss in zip(self.students, means, strict=True):
            logits_NK, labels_N = evaluate_on(network_logits(student.network), test, self.job.data, rejections)
            row["loss"][student.settings.name] = loss
            row["top1"][student.settings.name] = float((logits_NK.argmax(axis=1) == labels_N).mean())
        self.epochs.append(row)
        self.worker.post({**row, "totals": self.totals.of_this_worker()})

    def checkpoint(self, epoch: int, step: int) -> None:
        """Commit the labels, then keep a checkpoint that continues with (epoch, step)."""
        stream = self.lessons.stream
        stream.commit()
        totals = self.totals.of_all_workers(self.worker)
        progress: dict[str, Any] = {"epoch": epoch, "step": step, "totals": totals, "epochs": self.epochs}
        if isinstance(stream, LabelledStream):
            progress["store"] = stream.path.store.manifest_digest()
        self.worker.checkpoint(lambda folder: save_students(folder / "students", self.students, progress))
