"""The training loop of one Ray Train worker: its part of every global batch, all students on it, a checkpoint now and then.

Resume is exact: a checkpoint names the next (epoch, step) of the plan, and the loop goes on there.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import ray.train
import ray.train.torch
import torch

from distill.errors import DistillError
from distill.evaluation import evaluate_on, network_logits
from distill.image_sets import open_labelled, open_labelled_subset, open_unlabelled
from distill.loader import CropBatch, CropLoader, LoaderSettings
from distill.rejections import RejectionLog
from student_trainer.board import BoardHandle, report_failure
from student_trainer.job import TrainJob
from student_trainer.store import SoftLabelStore
from student_trainer.stream import LabelledBatch, LabelledStream
from student_trainer.students import Student, restore_students, save_students
from student_trainer.waits import Waits
from teacher_server.address import open_teacher

POST_EVERY_S = 0.5


def train_worker(config: dict[str, Any]) -> None:
    """Entry point that Ray Train calls in every worker. A typed error goes to the board and ends the run; others make Ray restart it."""
    board: BoardHandle = config["board"]
    if ray.get(board.failure.remote()) is not None:
        return  # restarted after an error that no restart mends
    try:
        _train(TrainJob.model_validate(config["job"]), board)
    except DistillError as error:
        report_failure(board, error)
        raise


class _HardLabelStream:
    """The control's stream: crops of labelled images, no teacher."""

    def __init__(self, loader: CropLoader) -> None:
        self.loader = loader
        self.waits = Waits()

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[LabelledBatch]:
        for crops in self.loader.epoch(epoch, start_step):
            yield LabelledBatch(crops, None, 0)

    def commit(self) -> None:
        """Nothing is kept."""


Stream = LabelledStream | _HardLabelStream


def _open_stream(job: TrainJob, rejections: RejectionLog, rank: int, world: int) -> AbstractContextManager[Stream]:
    settings = LoaderSettings(job.seed, job.train.global_batch, job.data.window_shards, num_threads=job.data.num_threads)
    if job.objective == "labels":
        source = open_labelled_subset(job.data, job.seed)
        loader = CropLoader(source, job.recipe, settings, lambda epoch: (epoch,), rejections, rank, world)
        return nullcontext(_HardLabelStream(loader))
    assert job.teacher is not None
    assert job.store_folder is not None
    assert job.store_identity is not None
    address = job.teacher
    views = job.train.num_views
    loader = CropLoader(open_unlabelled(job.data), job.recipe, settings, lambda e: (e % views,), rejections, rank, world)
    store = SoftLabelStore(Path(job.store_folder), job.store_identity)
    return LabelledStream(loader, store, lambda: open_teacher(address), job.rules, job.train.requests_in_flight)


def _train(job: TrainJob, board: BoardHandle) -> None:
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        torch.set_num_threads(job.num_threads)
    students = [
        Student(settings, len(job.class_names), job.data.preprocessing, job.seed + number, device)
        for number, settings in enumerate(job.train.students)
    ]
    progress = _resume(students)
    epoch, step = progress["epoch"], progress["step"]
    for student in students:
        student.trained = ray.train.torch.prepare_model(student.network, move_to_device=False) if world > 1 else student.network
    rejections = RejectionLog(Path(job.rejected_path), job.data.max_rejected_share)
    with _open_stream(job, rejections, rank, world) as stream:
        run = _Run(job, board, stream, students, progress, rank, device)
        steps_per_epoch = stream.loader.plan(0).num_steps
        while epoch < job.epochs:
            for batch in stream.epoch(epoch, step):
                run.train_on(batch, epoch * steps_per_epoch + batch.crops.step, job.epochs * steps_per_epoch)
                step = batch.crops.step + 1
                if step % job.train.checkpoint_every_steps == 0 and step < steps_per_epoch:
                    run.checkpoint(epoch, step)
            epoch, step = epoch + 1, 0
            stream.commit()
            if world > 1:
                torch.distributed.barrier()  # all have committed: the next epoch may meet images that another worker asked for
            if is_evaluated(epoch, job.epochs, job.train.num_evaluations):
                run.evaluate(epoch, rejections)
                run.checkpoint(epoch, step)
    rejections.close()


def is_evaluated(epoch: int, num_epochs: int, num_evaluations: int) -> bool:
    """Whether the end of `epoch` (counted from 1) is one of `num_evaluations` that are spread evenly; the last one is."""
    return epoch * num_evaluations // num_epochs > (epoch - 1) * num_evaluations // num_epochs


def _resume(students: list[Student]) -> dict[str, Any]:
    """epoch and step to go on with, the totals and the epochs so far."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return {"epoch": 0, "step": 0, "totals": {}, "epochs": []}
    with checkpoint.as_directory() as folder:
        return restore_students(Path(folder) / "students", students)


class _Run:
    """What the loop does with a batch, at the end of an epoch, and at a checkpoint."""

    def __init__(
        self,
        job: TrainJob,
        board: BoardHandle,
        stream: Stream,
        students: list[Student],
        progress: dict[str, Any],
        rank: int,
        device: torch.device,
    ) -> None:
        self.job, self.board, self.stream, self.students, self.rank, self.device = job, board, stream, students, rank, device
        self.world = ray.train.get_context().get_world_size()
        nothing = {"images": 0.0, "asked": 0.0, "from_store": 0.0, "seconds": 0.0, **dict.fromkeys(Waits.model_fields, 0.0)}
        self.totals: dict[str, float] = {**nothing, **(progress["totals"] if rank == 0 else {})}
        self.epochs: list[dict[str, Any]] = list(progress["epochs"])
        """One row an epoch: mean loss and test top-1 of each student. In the checkpoint, so that no row is lost or doubled."""
        self._before = dict(self.totals)
        self._started = time.monotonic()
        self._posted = 0.0
        self._losses: list[list[float]] = []
        if isinstance(stream, LabelledStream):
            stream.on_silence = self._tell_silence

    def train_on(self, batch: LabelledBatch, step: int, num_steps: int) -> None:
        """One step of every student."""
        size = len(batch.crops.image_ids)
        if size < 2 and self.world > 1:
            raise DistillError(f"worker {self.rank} has {size} usable images in step {step}, and the others cannot go on without it")
        if size < 2:
            return  # batch norm needs two; only a batch of bad images comes here
        crops_BHWC = torch.from_numpy(batch.crops.crops_VBHWC[0]).to(self.device)
        labels_B = torch.from_numpy(batch.crops.labels_B).to(self.device)
        teacher_BK = None if batch.logits_BK is None else torch.from_numpy(batch.logits_BK).to(self.device)
        for student in self.students:
            student.step(crops_BHWC, teacher_BK, labels_B, self.job.train, step, num_steps)
        self._losses.append([student.loss for student in self.students])
        self._count(batch.crops, batch.num_asked)
        if time.monotonic() - self._posted > POST_EVERY_S:
            self._post({"kind": "step", "step": step + 1, "of": num_steps})

    def _count(self, crops: CropBatch, num_asked: int) -> None:
        self.totals["images"] += len(crops.image_ids)
        self.totals["asked"] += num_asked
        if self.job.objective == "distill":
            self.totals["from_store"] += len(crops.image_ids) - num_asked
        self.totals["seconds"] = self._before["seconds"] + time.monotonic() - self._started
        for name, seconds in self.stream.waits:
            self.totals[name] = self._before[name] + seconds

    def evaluate(self, epoch: int, rejections: RejectionLog) -> None:
        """Accuracy on the test images and mean loss since the last evaluation, as a row on the board."""
        means = np.mean(self._losses, axis=0).tolist() if self._losses else [float("nan")] * len(self.students)
        self._losses.clear()
        row: dict[str, Any] = {"kind": "epoch", "epoch": epoch, "loss": {}, "top1": {}}
        if self.rank == 0:
            test = open_labelled(self.job.data.test, self.job.data)
            for student, loss in zip(self.students, means, strict=True):
                logits_NK, labels_N = evaluate_on(network_logits(student.network), test, self.job.data, rejections)
                row["loss"][student.settings.name] = loss
                row["top1"][student.settings.name] = float((logits_NK.argmax(axis=1) == labels_N).mean())
            self.epochs.append(row)
            self._post(row)

    def _totals_of_all(self) -> dict[str, float]:
        """Images and labels summed over the workers; seconds and waits are those of this one."""
        if self.world == 1:
            return self.totals
        everyone: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(everyone, self.totals)
        return {**self.totals, **{name: sum(totals[name] for totals in everyone) for name in ("images", "asked", "from_store")}}

    def _tell_silence(self, seconds: float) -> None:
        if seconds > 0:
            self._post({"kind": "silence", "seconds": seconds})

    def _post(self, row: dict[str, Any]) -> None:
        if self.rank == 0:
            self._posted = time.monotonic()
            losses = {student.settings.name: student.loss for student in self.students}
            self.board.post.remote({"losses": losses, "waits": self.stream.waits.model_dump(), "totals": self.totals, **row})

    def checkpoint(self, epoch: int, step: int) -> None:
        """Commit the labels, then hand Ray a checkpoint that continues with (epoch, step)."""
        self.stream.commit()
        progress: dict[str, Any] = {"epoch": epoch, "step": step, "totals": self._totals_of_all(), "epochs": self.epochs}
        if isinstance(self.stream, LabelledStream):
            progress["store"] = self.stream.path.store.manifest_digest()
        with tempfile.TemporaryDirectory() as folder:
            if self.rank == 0:
                save_students(Path(folder) / "students", self.students, progress)
            handed = ray.train.Checkpoint.from_directory(folder) if self.rank == 0 else None
            ray.train.report({"epoch": epoch, "step": step}, checkpoint=handed)
