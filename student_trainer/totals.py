"""What a run did so far, over restarts and over workers: images, labels, seconds.

Counts are summed over the workers; seconds are the mean of theirs, so that images by seconds is the rate of the whole group and the waits
add up to the time that passed.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from distill.cluster.worker import Worker
from student_trainer.stream import LabelledBatch
from student_trainer.waits import Waits

COUNTS = ("images", "asked", "from_store")
"""Crops that trained every student; labels that the teacher was asked for; labels read from the store."""
SECONDS = ("seconds", *Waits.model_fields)


class Totals:
    """The totals of one worker in this process, on top of what all workers had done `before` it."""

    def __init__(self, before: dict[str, float]) -> None:
        self._before = {**dict.fromkeys((*COUNTS, *SECONDS), 0.0), **before}
        self._own = dict.fromkeys((*COUNTS, *SECONDS), 0.0)
        self._started = time.monotonic()

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
        return {name: self._before[name] + own for name, own in self._own.items()}

    def of_all_workers(self, worker: Worker) -> dict[str, float]:
        """Counts summed, seconds averaged. All workers call it together."""
        if worker.world == 1:
            return self.of_this_worker()
        everyone: list[Any] = [None] * worker.world
        torch.distributed.all_gather_object(everyone, self._own)
        summed = {name: sum(own[name] for own in everyone) for name in self._own}
        return {name: self._before[name] + (value / worker.world if name in SECONDS else value) for name, value in summed.items()}
