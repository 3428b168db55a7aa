"""From streams to lessons: what the students of one worker learn from in each step, on their device.

Flow: `LabelledStream` (crops and the teacher's logits), below alpha 1 joined by `labelled_batches` (crops and labels), or `PlainStream`
(the control: crops and labels) -> `Lesson`. Unit of data: one `Lesson`.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext

import numpy as np
import torch

from distill.cluster.ddp import sum_over_workers
from distill.cluster.worker import Worker
from distill.loader import CropBatch, CropLoader
from distill.rejections import RejectionLog
from distill.sources import Source
from student_trainer.job import TrainJob
from student_trainer.labelled_images import labelled_batches
from student_trainer.loss import Lesson
from student_trainer.open_store import open_label_store
from student_trainer.stream import LabelledBatch, LabelledStream, PlainStream, Stream
from student_trainer.weighting import certificate_weights, entropy_weights
from teacher_server.address import open_teacher


class Lessons:
    """One worker's lessons. Made by `open_lessons`."""

    def __init__(self, job: TrainJob, stream: Stream, labelled: Iterator[CropBatch] | None, worker: Worker) -> None:
        self._weighting, self._rules = job.train.weighting, job.rules
        self.stream = stream
        self._labelled = labelled
        self._worker = worker

    def epoch(self, epoch: int, start_step: int) -> Iterator[tuple[LabelledBatch, Lesson]]:
        """The batches of an epoch from `start_step` on, each with its lesson; the first time it must be the step of `open_lessons`.

        Raises:
            what the streams raise, at the batch that it befell.
        """
        for batch in self.stream.epoch(epoch, start_step):
            yield batch, self._lesson(batch, self._next_labelled())

    def _next_labelled(self) -> CropBatch | None:
        if self._labelled is None:
            return None
        asked_at = time.monotonic()
        labelled = next(self._labelled)
        waited_s = time.monotonic() - asked_at
        # The stream takes this time for the training step's.
        self.stream.waits = self.stream.waits.plus("decode", waited_s).plus("student", -waited_s)
        return labelled

    def _lesson(self, batch: LabelledBatch, labelled: CropBatch | None) -> Lesson:
        parts = [batch.crops] if labelled is None else [batch.crops, labelled]
        crops_BHWC = self._put(np.concatenate([part.crops_VBHWC[0] for part in parts]))
        if batch.logits_BK is None:
            own, everyones = self._sums(len(batch.crops.image_ids))
            return Lesson(crops_BHWC, labels_L=self._put(batch.crops.labels_B), labels_share=self._share(own[0], everyones[0]))
        teacher_UK = self._put(batch.logits_BK)
        labels_L = None if labelled is None else self._put(labelled.labels_B)
        weights_U = self._weights(batch, teacher_UK)
        num_labels, weight = 0 if labels_L is None else len(labels_L), 0.0 if weights_U is None else weights_U.sum().item()
        own, (taught, labels, total) = self._sums(len(teacher_UK), num_labels, weight)
        return Lesson(
            crops_BHWC,
            teacher_UK,
            labels_L,
            weights_U=None if weights_U is None else weights_U * (taught / (total or 1.0)),
            teacher_share=self._share(own[0], taught),
            labels_share=self._share(own[1], labels),
        )

    def _weights(self, batch: LabelledBatch, teacher_UK: torch.Tensor) -> torch.Tensor | None:
        """How much each image counts, before the mean is made 1; None where all count alike."""
        if self._weighting == "none":
            return None
        if self._weighting == "entropy":
            return entropy_weights(teacher_UK, self._rules.temperature)
        assert batch.tv_B is not None
        return certificate_weights(self._put(batch.tv_B), self._rules.max_tv)

    def _put(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self._worker.device)

    def _sums(self, *own: float) -> tuple[tuple[float, ...], list[float]]:
        """These numbers of this worker, and their sums over all workers."""
        if self._worker.world == 1:
            return own, list(own)
        return own, sum_over_workers(torch.tensor(own, dtype=torch.float64, device=self._worker.device)).tolist()

    def _share(self, own: float, everyones: float) -> float:
        """World times this worker's share of all images: what makes the average over workers one over images."""
        return own * self._worker.world / max(1, everyones)


@contextmanager
def open_lessons(job: TrainJob, images: Source, rejections: RejectionLog, worker: Worker, epoch: int, step: int) -> Iterator[Lessons]:
    """The lessons of this worker from (epoch, step) on. Leaving the block commits the labels that were asked for.

    Raises:
        what opening the store, the teacher and the labelled images raises.
    """
    with ExitStack() as stack:
        stream = stack.enter_context(_open_stream(job, images, rejections, worker))
        labelled = None
        if job.mixes_labels:
            first_step = epoch * stream.loader.plan(0).num_steps + step
            labelled = stack.enter_context(closing(_open_labelled(job, rejections, worker, first_step)))
        yield Lessons(job, stream, labelled, worker)


def _open_stream(job: TrainJob, images: Source, rejections: RejectionLog, worker: Worker) -> AbstractContextManager[Stream]:
    settings, views = job.loading(images), job.train.num_views
    if job.objective == "labels":
        plain = CropLoader(images, job.plain_recipe, settings, lambda e: (e,), rejections, worker.rank, worker.world)
        return nullcontext(PlainStream(plain))
    assert job.teacher is not None
    address = job.teacher
    loader = CropLoader(images, job.recipe, settings, lambda e: (e % views,), rejections, worker.rank, worker.world)
    store = open_label_store(job)
    return LabelledStream(loader, store, lambda: open_teacher(address), job.rules, job.train.requests_in_flight)


def _open_labelled(job: TrainJob, rejections: RejectionLog, worker: Worker, first_step: int) -> Generator[CropBatch]:
    source = job.open_labelled()
    # As in the control, every pass cuts new crops: nobody is asked about them.
    loader = CropLoader(source, job.plain_recipe, job.labelled_loading(source), lambda e: (e,), rejections, worker.rank, worker.world)
    return labelled_batches(loader, first_step)
