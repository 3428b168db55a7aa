"""The training loop of stage 3 in one worker: its part of every global batch, all students on it, a checkpoint now and then.

Resume is exact: a checkpoint names the next (epoch, step) of the plan, and the loop goes on there, on as many workers as there are then.
A student whose loss is no number is stopped, and the others go on.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from distill.checkpoint import Write
from distill.cluster.ddp import sum_over_workers
from distill.cluster.worker import Worker, settling
from distill.errors import DistillError, TeacherUnavailable, TrainingDiverged
from distill.evaluation import evaluate_on, network_logits
from distill.image_sets import has_labels, open_labelled
from distill.loader import UNLABELLED
from distill.rejections import RejectionLog
from student_trainer.halving import HeldOut, Scores, Selection
from student_trainer.initial_weights import load_initial_weights
from student_trainer.job import TrainJob
from student_trainer.lessons import Lessons, open_lessons
from student_trainer.loss import Lesson
from student_trainer.settings import Metric
from student_trainer.step_rows import StepRows
from student_trainer.stream import LabelledBatch, LabelledStream
from student_trainer.students import Stopped, Student, new_students, prepare_students, restore_students
from student_trainer.totals import Totals

logger = logging.getLogger(__name__)

POST_EVERY_S = 0.5


def train_worker(config: dict[str, Any], worker: Worker) -> None:
    """Train the students of a `TrainJob` to the end, from the last checkpoint of the group if there is one.

    Asked to stop, it ends with a checkpoint that goes on with the next step; so does a worker that is alone when its patience with a silent
    teacher ends.

    Raises:
        DistillError: what the images, the store, the teacher or the training itself raise.
        TrainingDiverged: every student has.
    """
    job = TrainJob.model_validate(config)
    images = job.open_images()
    students = new_students(job, worker.device, job.loading(images).global_batch)
    progress = _start(job, students, worker)
    for student in students:
        student.join(worker, job.train.compile_backend)
    with settling(worker), RejectionLog(Path(job.rejected_path), job.data.max_rejected_share) as rejections:
        with open_lessons(job, images, rejections, worker, progress["epoch"], progress["step"]) as lessons:
            run = _Run(job, worker, lessons, students, progress, rejections)
            try:
                run.train()
            except _StopWanted:
                run.checkpoint()


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


class _StopWanted(Exception):
    """Somebody wants the loop to end; all workers know at the same step."""


@dataclass
class _Mean:
    """A mean that can be gone on with."""

    total: float = 0.0
    count: int = 0

    def add(self, value: float) -> None:
        self.total, self.count = self.total + value, self.count + 1


class _Run:
    """The loop, and what it does with a batch, at the end of an epoch, and at a checkpoint."""

    def __init__(
        self,
        job: TrainJob,
        worker: Worker,
        lessons: Lessons,
        students: list[Student],
        progress: dict[str, Any],
        rejections: RejectionLog,
    ) -> None:
        self.job, self.worker, self.lessons, self.students, self.rejections = job, worker, lessons, students, rejections
        self.epoch: int = progress["epoch"]
        self.step: int = progress["step"]
        """What comes next: this step of this epoch."""
        self.totals = Totals(progress["totals"])
        self.epochs: list[dict[str, Any]] = list(progress["epochs"])
        """One row an epoch: mean loss and test top-1 of each student. In the checkpoint, so that no row is lost or doubled."""
        self._rows = StepRows(students, lessons.stream, self.totals, worker.world)
        self._posted = 0.0
        self._losses = {name: _Mean(*loss) for name, loss in progress.get("losses", {}).items()}
        """Student -> loss since the last evaluation; in the checkpoint as well."""
        self._steps_per_epoch = lessons.stream.loader.plan(0).num_steps
        self._held_out: HeldOut | None = None
        # The control has no teacher to compare with, and every student needs its control.
        train = job.train if job.objective == "distill" else job.train.replace(halving=None, early_stop=None)
        self.selection = Selection(train, job.epochs * self._steps_per_epoch, progress.get("selection"))
        if isinstance(lessons.stream, LabelledStream):
            lessons.stream.on_silence = self._tell_silence

    def train(self) -> None:
        """The steps that are left.

        Raises:
            _StopWanted: before a step.
        """
        for student in self.students:
            if student.stopped:  # before this process: who watches the run does not know it
                self._post_stopped(student, student.stopped)
        while self.epoch < self.job.epochs and self._active:
            is_due = False
            for batch, lesson in self._lessons_left():
                if self.worker.should_stop():
                    raise _StopWanted
                self.train_on(batch, lesson)
                self.step = batch.crops.step + 1
                is_due = self._pass_rung() or self._done % self.job.train.checkpoint_every_steps == 0
                if not self._active:
                    return self.checkpoint()
                if is_due and self.step < self._steps_per_epoch:
                    self.checkpoint()
            self._end_epoch(is_due)

    def _lessons_left(self) -> Iterator[tuple[LabelledBatch, Lesson]]:
        """Of this epoch. Where the patience with a silent teacher ends between two steps, what is trained is kept; several workers do not
        all wait at the same step."""
        try:
            yield from self.lessons.epoch(self.epoch, self.step)
        except TeacherUnavailable:
            if self.worker.world == 1:
                self.checkpoint()
            raise

    @property
    def _active(self) -> list[Student]:
        return [student for student in self.students if not student.stopped]

    def _end_epoch(self, is_due: bool) -> None:
        """Evaluate where that is planned; a checkpoint there, and where one `is_due` after the last step."""
        self.epoch, self.step = self.epoch + 1, 0
        self.lessons.stream.commit()
        self.worker.barrier()  # all have committed: the next epoch may meet images that another worker asked for
        evaluated = is_evaluated(self.epoch, self.job.epochs, self.job.train.num_evaluations)
        if evaluated:
            self.evaluate()
            if self.selection.early_stop and self.epoch < self.job.epochs:
                self._stop(self.selection.follow(self._scores(self.selection.early_stop.metric), self._done))
            if self.selection.halving and self.epoch == self.job.epochs:
                self.selection.finish(self._scores(self.selection.halving.metric))
        if evaluated or is_due:
            self.checkpoint()

    @property
    def _done(self) -> int:
        """Steps of the run that are behind."""
        return self.epoch * self._steps_per_epoch + self.step

    def _pass_rung(self) -> bool:
        if self.selection.halving is None or not self.selection.is_rung(self._done):
            return False
        scores = self._scores(self.selection.halving.metric)
        self._stop(self.selection.cut(scores, self._done))
        self.worker.post({"kind": "rung", "number": len(self.selection.rungs), **self.selection.rungs[-1]})
        return True

    def _scores(self, metric: Metric) -> Scores:
        """Of every student that trains, on the held-out crops; worker 0 looks, and all workers know."""
        active = self._active
        scores = torch.zeros(len(active), dtype=torch.float64, device=self.worker.device)
        if self.worker.rank == 0:
            assert isinstance(self.lessons.stream, LabelledStream)
            self._held_out = self._held_out or HeldOut(self.lessons.stream, self.job.train, self.job.epochs)
            found = [self._held_out.score(network_logits(student.judged), metric) for student in active]
            scores = torch.tensor(found, dtype=torch.float64, device=self.worker.device)
        if self.worker.world > 1:
            scores = sum_over_workers(scores)
        return {student.settings.name: score for student, score in zip(active, scores.tolist(), strict=True)}

    def _stop(self, stopped: dict[str, Stopped]) -> None:
        for student in self._active:
            if student.settings.name in stopped:
                student.stop(stopped[student.settings.name])
                self._tell_stopped(student, stopped[student.settings.name])

    def train_on(self, batch: LabelledBatch, lesson: Lesson) -> None:
        """One step of every student that is not stopped."""
        step, num_steps = self.epoch * self._steps_per_epoch + batch.crops.step, self.job.epochs * self._steps_per_epoch
        size = len(batch.crops.image_ids)
        if size < 2 and self.worker.world > 1:
            raise DistillError(
                f"worker {self.worker.rank} has {size} usable images in step {step}, and the others cannot go on without it: mend the"
                f" images in {self.job.rejected_path}, or take a larger train.global_batch or fewer workers (ray.num_workers)"
            )
        if size < 2:
            return  # batch norm needs two; only a batch of bad images comes here
        for student in self._active:
            with self.totals.step_of(student.settings.name, size):
                student.step(lesson, self.job.train, step, num_steps)
            if student.stopped:
                self._tell_stopped(student, student.stopped)
            else:
                self._losses.setdefault(student.settings.name, _Mean()).add(student.loss)
        self.totals.count(batch, self.lessons.stream.waits)
        if time.monotonic() - self._posted > POST_EVERY_S:
            self._post_step(step + 1, num_steps)

    def _post_step(self, step: int, num_steps: int) -> None:
        self._posted = time.monotonic()
        epoch = (step - 1) // (num_steps // self.job.epochs)
        self.worker.post(self._rows.row(step, num_steps, epoch))

    def _tell_silence(self, seconds: float) -> None:
        if seconds > 0:
            self.worker.post({"kind": "silence", "seconds": seconds})
        if self.worker.world == 1 and self.worker.should_stop():  # several could not agree: they do not all wait at the same step
            raise _StopWanted

    def _tell_stopped(self, student: Student, stopped: Stopped) -> None:
        """Say that a student trains no more.

        Raises:
            TrainingDiverged: it was the last, and none has anything to keep. The last checkpoint stays.
        """
        self._post_stopped(student, stopped)
        logger.warning("student %s is stopped: %s", student.settings.name, stopped.detail)
        if all(s.stopped and s.stopped.why == "diverged" for s in self.students):
            said = "; ".join(f"student {s.settings.name}: {s.stopped.detail}" for s in self.students if s.stopped)
            raise TrainingDiverged(f"no student is left: {said}")

    def _post_stopped(self, student: Student, stopped: Stopped) -> None:
        self.worker.post({"kind": "stopped", "student": student.settings.name, **stopped.model_dump(mode="json")})

    def evaluate(self) -> None:
        """Accuracy on the test images, if all have labels, and mean loss (of worker 0's images) since the last time, for the journal."""
        means = {name: loss.total / loss.count for name, loss in self._losses.items()}
        self._losses.clear()
        if self.worker.rank != 0:
            return
        epoch = self.epoch
        row: dict[str, Any] = {"kind": "epoch", "epoch": epoch, "step": epoch * self._steps_per_epoch, "loss": {}, "top1": {}}
        test = open_labelled(self.job.data.test, self.job.data)
        may_be_scored = has_labels(test, num_shards=1)
        for student in self._active:
            name = student.settings.name
            if name in means:
                row["loss"][name] = means[name]
            if may_be_scored:
                logits_NK, labels_N = evaluate_on(network_logits(student.judged), test, self.job.data, self.rejections)
                if not (labels_N == UNLABELLED).any():
                    row["top1"][name] = float((logits_NK.argmax(axis=1) == labels_N).mean())
        self.epochs.append(row)
        self.worker.post({**row, "time": time.time(), "totals": self.totals.estimate(self.worker.world)})

    def checkpoint(self) -> None:
        """Commit the labels, then keep a checkpoint that continues with the next step."""
        stream = self.lessons.stream
        stream.commit()
        totals = self.totals.of_all_workers(self.worker)
        progress: dict[str, Any] = {"epoch": self.epoch, "step": self.step, "totals": totals, "epochs": self.epochs}
        progress["selection"] = self.selection.state()
        progress["losses"] = {name: [loss.total, loss.count] for name, loss in self._losses.items()}
        if isinstance(stream, LabelledStream):
            progress["store"] = stream.path.store.manifest_digest()

        def prepare() -> Write:
            write = prepare_students(self.students, progress)
            return lambda folder: write(folder / "students")

        self.worker.checkpoint(prepare)
        self.worker.post({"kind": "checkpoint", "time": time.time(), "step": self._done, "epoch": self.epoch})
