"""`distill label`: fills the soft-label store ahead of training, as a Ray Data job over (view, shard) units of work.

Each unit is claimed, read, cropped and asked for by one actor and committed as one segment; units that are already in the store are not
read at all. Killed at any moment and started again, the job goes on with the units that are left; several jobs on one store share them.

Unit of data: one (view, shard). The work on it is in `label_units`.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
import ray.data
import ray.exceptions

from distill.cluster.board import BoardHandle, raise_failure, report_failure, start_board
from distill.cluster.session import ray_session
from distill.cluster.settings import RaySettings
from distill.cluster.worker import Row
from distill.errors import DistillError, TooManyRejected
from distill.loader import CropLoader
from distill.progress import RowLine
from distill.rejections import RejectionLog
from student_trainer.job import TrainJob
from student_trainer.label_path import LabelPath
from student_trainer.label_units import Unit, UnitDone, UnitLabeller, label_left, units_left
from student_trainer.open_store import open_label_store
from student_trainer.store_claims import Claims
from teacher_server.address import open_teacher

COUNTS = ("images", "asked", "is_others", "seen", "rejected")
"""What an actor answers about a unit: fields of `UnitDone`."""


class LabelUnits:
    """The actor: labels one unit after another.

    Args:
        over: others' claims that the job has found over (`Claims.over`).
    """

    def __init__(self, job: dict[str, Any], board: BoardHandle, over: Mapping[str, bytes]) -> None:
        self._job = TrainJob.model_validate(job)
        self._board = board
        self._runner = asyncio.Runner()
        train = self._job.train
        rejections = RejectionLog(Path(self._job.rejected_path), self._job.data.max_rejected_share)
        path = self._runner.run(self._open())
        images = self._job.open_images()
        loading = replace(self._job.loading(images), drop_last=False, shuffle=False)
        loader = CropLoader(images, self._job.recipe, loading, lambda epoch: (epoch,), rejections)
        claims = Claims(path.store.files, self._job.store.claim_s, over)
        self._labeller = UnitLabeller(loader, path, claims, rejections, train.global_batch, train.requests_in_flight)

    async def _open(self) -> LabelPath:
        assert self._job.teacher is not None
        return LabelPath(open_label_store(self._job), open_teacher(self._job.teacher), self._job.rules)

    def __call__(self, units: dict[str, npt.NDArray[np.int64]]) -> dict[str, npt.NDArray[np.int64]]:
        """Label every (view, shard) given; the answer counts images and labels asked for, and says which units are another job's."""
        try:
            done = [self._runner.run(self._labeller.label(int(v), int(s))) for v, s in zip(units["view"], units["shard"], strict=True)]
        except DistillError as error:
            report_failure(self._board, error)
            raise
        counts = {name: np.array([getattr(unit, name) for unit in done], dtype=np.int64) for name in COUNTS}
        return {**units, **counts}


def label_images(job: TrainJob, settings: RaySettings) -> dict[str, Any]:
    """Ask the teacher for every label of views 0 to num_views - 1 that the store does not hold. Other jobs may be at the same store.

    Returns:
        Plain data: images looked at, labels asked for, and what the store holds at the end.

    Raises:
        DistillError: what an actor met, as the class it was there. What was committed stays.
        TooManyRejected: of the images that all actors tried, or that had labels in every view, more than `data.max_rejected_share` are bad.
    """
    store = open_label_store(job)
    sizes = [shard.num_records for shard in job.open_images().shards]
    num_views = job.train.num_views
    left = units_left(store, sizes, num_views, job.rules)
    skipped = sum(sizes) * num_views - sum(sizes[shard] for _, shard in left)
    shards_left = {shard for _, shard in left}
    # Images whose labels are all there count as tried: what an earlier run left over would look all bad.
    num_seen, num_rejected = sum(size for shard, size in enumerate(sizes) if shard not in shards_left), 0
    totals = {"images": skipped, "asked": 0, "from_store": skipped}
    with RowLine("label", exact=True) as line:
        line.show(_row(totals, sum(sizes) * num_views))
        if left:
            with ray_session(settings):
                run = partial(_run_units, job, settings)
                for _, done in label_left(store, sizes, left, job.rules, uuid.uuid4().hex, run, job.store.claim_s):
                    totals = {
                        "images": totals["images"] + done.images,
                        "asked": totals["asked"] + done.asked,
                        "from_store": totals["from_store"] + done.images - done.asked,
                    }
                    num_seen, num_rejected = num_seen + done.seen, num_rejected + done.rejected
                    line.show(_row(totals, sum(sizes) * num_views))
    _refuse_if_over(job, num_seen, num_rejected)
    store.refresh()
    return {"totals": totals, "store": store.stats().model_dump()}


def _refuse_if_over(job: TrainJob, num_seen: int, num_rejected: int) -> None:
    """The last look, however few the images: an actor stops by itself only after it has tried some number of them."""
    if num_rejected > job.data.max_rejected_share * num_seen:
        raise TooManyRejected(
            f"{num_rejected} of {num_seen} images ({num_rejected / max(num_seen, 1):.2%}) cannot be used, over the limit of"
            f" {job.data.max_rejected_share:.2%} (data.max_rejected_share); they are listed in {job.rejected_path}: mend or remove them, or"
            " raise the limit. The labels of the others are kept"
        )


def _row(totals: dict[str, int], num_labels: int) -> Row:
    """How far it is, as a training loop would say it: one label a step."""
    note = f"{totals['asked']} asked for, {totals['from_store']} from the store"
    return {
        "kind": "step", "time": time.time(), "step": totals["images"], "of": num_labels, "images": 1, "totals": totals, "note": note,
    }  # fmt: skip


def _run_units(job: TrainJob, settings: RaySettings, units: list[Unit], over: Mapping[str, bytes]) -> Iterator[tuple[Unit, UnitDone]]:
    # Our own line shows the progress; Ray Data's would be written between its parts.
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    board = start_board()
    rows = [{"view": view, "shard": shard} for view, shard in units]
    dataset = ray.data.from_items(rows, override_num_blocks=min(len(rows), 1000)).map_batches(
        LabelUnits,
        fn_constructor_kwargs={"job": job.model_dump(mode="json"), "board": board, "over": dict(over)},
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=settings.num_workers),
        num_cpus=settings.cpus_per_worker,
    )
    try:
        for row in dataset.iter_rows():
            yield (
                (int(row["view"]), int(row["shard"])),
                UnitDone(int(row["images"]), int(row["asked"]), bool(row["is_others"]), int(row["seen"]), int(row["rejected"])),
            )
    except ray.exceptions.RayError as error:
        raise_failure(board)
        raise DistillError(f"labelling stopped: {type(error).__name__}; run it again to go on with what is left") from error
