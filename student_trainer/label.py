"""`distill label`: fills the soft-label store ahead of training, as a Ray Data job over (view, shard) units of work.

Each unit is read, cropped and asked for by one actor and committed as one segment; units that are already in the store are not read at
all. Killed at any moment and started again, the job goes on with the units that are left.

Unit of data: one (view, shard).
"""

from __future__ import annotations

import asyncio
import logging
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
from distill.errors import DistillError
from distill.loader import CropLoader, LoaderSettings
from distill.progress import ProgressLine
from distill.rejections import RejectionLog
from student_trainer.job import TrainJob
from student_trainer.label_path import LabelPath
from student_trainer.store import SoftLabelStore
from teacher_server.address import open_teacher


class LabelUnits:
    """The actor: labels one unit after another, several requests of a unit in flight."""

    def __init__(self, job: dict[str, Any], board: BoardHandle) -> None:
        self._job = TrainJob.model_validate(job)
        self._board = board
        self._runner = asyncio.Runner()
        self._rejections = RejectionLog(Path(self._job.rejected_path), self._job.data.max_rejected_share)
        self._path = self._runner.run(self._open())
        train, data = self._job.train, self._job.data
        loading = LoaderSettings(self._job.seed, train.global_batch, drop_last=False, shuffle=False, num_threads=data.num_threads)
        self._loader = CropLoader(self._job.open_images(), self._job.recipe, loading, lambda epoch: (epoch,), self._rejections)
        self._seen: set[int] = set()
        """Shards whose images count as tried: once, not once a view."""

    async def _open(self) -> LabelPath:
        assert self._job.teacher is not None
        assert self._job.store_folder is not None
        assert self._job.store_identity is not None
        store = SoftLabelStore(Path(self._job.store_folder), self._job.store_identity)
        return LabelPath(store, open_teacher(self._job.teacher), self._job.rules)

    def __call__(self, units: dict[str, npt.NDArray[np.int64]]) -> dict[str, npt.NDArray[np.int64]]:
        """Label every (view, shard) given; the answer counts images, labels asked for and labels found."""
        try:
            counts = [self._runner.run(self._label(int(v), int(s))) for v, s in zip(units["view"], units["shard"], strict=True)]
        except DistillError as error:
            report_failure(self._board, error)
            raise
        images, asked = np.array(counts, dtype=np.int64).reshape(-1, 2).T
        return {"images": images, "asked": asked}

    async def _label(self, view: int, shard: int) -> tuple[int, int]:
        rows = self._loader.rows_of_shard(shard)
        if shard not in self._seen:
            self._seen.add(shard)
            self._rejections.saw(len(rows))
        size = self._job.train.global_batch
        limit = asyncio.Semaphore(self._job.train.requests_in_flight)

        async def label(part: npt.NDArray[np.int64]) -> tuple[int, int]:
            async with limit:
                batch = await asyncio.to_thread(self._loader.make, view, 0, (view,), part)
                _, num_asked = await self._path.labels(batch)
                return len(batch.image_ids), num_asked

        counts = await asyncio.gather(*(label(rows[at : at + size]) for at in range(0, len(rows), size)))
        self._path.commit()
        self._rejections.check()
        return sum(images for images, _ in counts), sum(asked for _, asked in counts)


def label_images(job: TrainJob, settings: RaySettings) -> dict[str, Any]:
    """Ask the teacher for every label of views 0 to num_views - 1 that the store does not hold.

    Returns:
        Plain data: images looked at, labels asked for, and what the store holds at the end.

    Raises:
        DistillError: what an actor met, as the class it was there. What was committed stays.
    """
    assert job.store_folder is not None
    assert job.store_identity is not None
    store = SoftLabelStore(Path(job.store_folder), job.store_identity)
    sizes = [shard.num_records for shard in job.open_images().shards]
    units, skipped = _units_left(store, sizes, job.train.num_views)
    totals = {"images": skipped, "asked": 0, "from_store": skipped}
    with ProgressLine("label", sum(sizes) * job.train.num_views) as line:
        line.skip(skipped)
        if units:
            with ray_session(settings):
                for row in _label_units(job, settings, units):
                    totals = {
                        "images": totals["images"] + int(row["images"]),
                        "asked": totals["asked"] + int(row["asked"]),
                        "from_store": totals["from_store"] + int(row["images"] - row["asked"]),
                    }
                    line.update(int(row["images"]), f"{totals['asked']} asked for, {totals['from_store']} from the store")
    store.refresh()
    return {"totals": totals, "store": store.stats().model_dump()}


def _units_left(store: SoftLabelStore, sizes: list[int], num_views: int) -> tuple[list[dict[str, int]], int]:
    """(units with labels missing, images of the others)."""
    have: dict[tuple[int, int], int] = {}
    for segment in store.segments:
        key = (segment.view, segment.shard)
        have[key] = have.get(key, 0) + segment.num_labels
    left = [(v, s) for v in range(num_views) for s, size in enumerate(sizes) if have.get((v, s), 0) < size]
    skipped = sum(sizes) * num_views - sum(sizes[s] for _, s in left)
    return [{"view": v, "shard": s} for v, s in left], skipped


def _label_units(job: TrainJob, settings: RaySettings, units: list[dict[str, int]]) -> Any:
    # Our own line shows the progress; Ray Data's would be written between its parts.
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    board = start_board()
    dataset = ray.data.from_items(units, override_num_blocks=min(len(units), 1000)).map_batches(
        LabelUnits,
        fn_constructor_kwargs={"job": job.model_dump(mode="json"), "board": board},
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=settings.num_workers),
        num_cpus=settings.cpus_per_worker,
    )
    try:
        yield from dataset.iter_rows()
    except ray.exceptions.RayError as error:
        raise_failure(board)
        raise DistillError(f"labelling stopped: {type(error).__name__}; run it again to go on with what is left") from error
