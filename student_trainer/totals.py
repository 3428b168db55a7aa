"""What a run did so far, over restarts and over workers: images, labels, seconds; and what each student had of it.

Counts are summed over the workers; seconds are the mean of theirs, so that images by seconds is the rate of the whole group and the waits
add up to the time that passed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from distill.cluster.worker import Worker
from student_trainer.stream import LabelledBatch
from student_trainer.waits import Waits

COUNTS = ("images", "asked", "from_store")
"""Crops that trained every student; labels that the teacher was asked for; labels read from the store."""
SECONDS = ("seconds", *Waits.model_fields)
IMAGES_OF, SECONDS_OF = "images of ", "seconds of "
"""Before a student's name: crops that trained this one; seconds that its steps took (on a GPU roughly: see `Totals.step_of`)."""


class Totals:
    """The totals of one worker in this process, on top of what all workers had done `before` it."""

    def __init__(self, before: dict[str, float]) -> None:
        self._before = {**dict.fromkeys((*COUNTS, *SECONDS), 0.0), **before}
        self._own = dict.fromkeys(self._before, 0.0)
        self._started = time.monotonic()

    @contextmanager
    def step_of(self, student: str, num_images: int) -> Iterator[None]:
        """Around one step of one student: counts it and its time. What raises does not count.

        On an accelerator the step must read a number from the device (the loss), or the time is that of starting its kernels. What it
        starts after that, the update of the weights and of their average, is waited for by who reads next: the next student, or the next
        step. Between students that share a device the seconds are therefore near, not exact; their sum is.
        """
        started = time.monotonic()
        yield
        for name, value in ((IMAGES_OF, num_images), (SECONDS_OF, time.monotonic() - started)):
            self._own[name + student] = self._own.get(name + student, 0.0) + value

    def count(self, batch: LabelledBatch, waits: Waits) -> None:
        """One batch was trained on; `waits` are the stream's so far."""
        size = len(batch.crops.image_ids)
        self._own["images"] += size
        self._own["asked"] += batch.num_asked
        if batch.logits_BK is not None:
            self._own["from_store"] += size - batch.num_asked
        self._own |= {"seconds": time.monotonic() - self._started, **waits.model_dump()}

    def reuse(self) -> float:
        """Share of this worker's labels that came from the store."""
        totals = self.of_this_worker()
        return totals["from_store"] / max(1.0, totals["asked"] + totals["from_store"])

    def of_this_worker(self) -> dict[str, float]:
        """With what all had done before."""
        return self._on_top(self._own)

    def estimate(self, num_workers: int) -> dict[str, float]:
        """Of all workers, as far as one of them can tell: each has an equal part of every batch. Exact with one worker."""
        return self._on_top({name: value if _is_seconds(name) else value * num_workers for name, value in self._own.items()})

    def of_all_workers(self, worker: Worker) -> dict[str, float]:
        """Counts summed, seconds averaged. All workers call it together."""
        if worker.world == 1:
            return self.of_this_worker()
        everyone: list[Any] = [None] * worker.world
        torch.distributed.all_gather_object(everyone, self._own)
        summed = {name: sum(own.get(name, 0.0) for own in everyone) for name in self._own}
        return self._on_top({name: value / worker.world if _is_seconds(name) else value for name, value in summed.items()})

    def _on_top(self, own: dict[str, float]) -> dict[str, float]:
        return {name: self._before.get(name, 0.0) + value for name, value in own.items()}


def _is_seconds(name: str) -> bool:
    return name in SECONDS or name.startswith(SECONDS_OF)


def of_each_student(totals: dict[str, float]) -> dict[str, dict[str, float]]:
    """Student -> its `images` and `seconds`, of the totals of a run that counted them (`Totals.step_of`)."""
    names = [name.removeprefix(IMAGES_OF) for name in totals if name.startswith(IMAGES_OF)]
    return {name: {"images": totals[IMAGES_OF + name], "seconds": totals[SECONDS_OF + name]} for name in names}
