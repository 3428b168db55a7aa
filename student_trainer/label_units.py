"""The work of labelling, without Ray: one (view, shard) after another through the label path into the store, each under a claim.

Several jobs may fill one store: each takes the units that nobody else has claimed, begins at another place, and at the end waits for what
the others are at; when one of them dies, its units are taken over. Unit of data: one (view, shard).
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from distill.errors import StoreError
from distill.loader import CropLoader
from distill.rejections import RejectionLog
from student_trainer.label_path import LabelPath, LabelRules
from student_trainer.store import SoftLabelStore
from student_trainer.store_claims import LEASE_S, Claims
from student_trainer.store_segments import ROUNDING, readable_rows
from student_trainer.unanswerable import answerable

LOOK_AGAIN_S = 1.0
"""Pause between two looks at units that others have claimed."""

Unit = tuple[int, int]


@dataclass(frozen=True)
class UnitDone:
    """What became of one unit."""

    images: int
    """Images of it that have a label now; 0 where another job has claimed it."""
    asked: int
    """Of these, labels that the teacher was asked for."""
    is_others: bool = False
    """Another job is at it."""
    seen: int = 0
    """Images that its actor tried here for the first time."""
    rejected: int = 0
    """Images that its actor refused here for the first time."""


class UnitLabeller:
    """Labels units, several requests of a unit in flight.

    Args:
        batch: images of one question to the teacher.
        in_flight: questions at once.
    """

    def __init__(self, loader: CropLoader, path: LabelPath, claims: Claims, rejections: RejectionLog, batch: int, in_flight: int) -> None:
        self._loader = loader
        self._path = path
        self._claims = claims
        self._rejections = rejections
        self._batch = batch
        self._in_flight = in_flight

    async def label(self, view: int, shard: int) -> UnitDone:
        """Label one unit and commit it, unless another job is at it.

        Raises:
            what the loader and the label path raise; what was answered is kept, the claim is given back.
        """
        try:
            if not self._claims.take(view, shard):
                return UnitDone(0, 0, is_others=True)
        except OSError as error:
            raise StoreError(f"no claim can be written to {self._path.store.folder}: {error.strerror or error}") from error
        try:
            self._path.store.refresh(view)  # another job may have done it between our look and our claim
            return await self._label(view, shard)
        finally:
            self._claims.release(view, shard)

    async def _label(self, view: int, shard: int) -> UnitDone:
        rows = self._loader.rows_of_shard(shard)
        seen, rejected = self._rejections.num_seen, self._rejections.num_rejected
        limit = asyncio.Semaphore(self._in_flight)

        async def label(part: npt.NDArray[np.int64]) -> tuple[int, int]:
            async with limit:
                batch = await asyncio.to_thread(self._loader.make, view, 0, (view,), part)
                batch, labels = await answerable(self._path, batch, self._rejections)
                return len(batch.image_ids), labels.num_asked

        try:
            counts = await asyncio.gather(*(label(rows[at : at + self._batch]) for at in range(0, len(rows), self._batch)))
        finally:
            self._path.commit()
        self._rejections.check()
        return UnitDone(
            images=sum(images for images, _ in counts),
            asked=sum(asked for _, asked in counts),
            seen=self._rejections.num_seen - seen,
            rejected=self._rejections.num_rejected - rejected,
        )


def units_left(store: SoftLabelStore, sizes: list[int], num_views: int, rules: LabelRules) -> list[Unit]:
    """The units with labels missing, as far as the store was read. A label that is too rough for `rules` is missing.

    Raises:
        StoreError: the store cannot be read.
    """
    return [(v, s) for v in range(num_views) for s, size in enumerate(sizes) if not _is_whole(store, (v, s), size, rules)]


def _is_whole(store: SoftLabelStore, unit: Unit, size: int, rules: LabelRules) -> bool:
    """Whether every row has a label that a read by these rules accepts. From the manifest alone where it says enough."""
    segments = store.manifest.of(*unit)
    if sum(segment.num_labels for segment in segments) < size:
        return False
    for segment in segments:
        is_exact = segment.worst_tv is not None and segment.worst_tv <= rules.max_tv * ROUNDING
        if segment.num_labels >= size and is_exact and rules.temperature in segment.temperatures:
            return True
    tables = store.tables(*unit, ("row", "max_tv", "max_logit_error"))
    rows = [readable_rows(segment, table, rules.temperature, rules.max_tv) for segment, table in tables]
    return len(np.unique(np.concatenate([np.empty(0, np.int32), *rows]))) >= size


def from_own_start(units: list[Unit], owner: str) -> list[Unit]:
    """The units in order, from a place that depends on who asks, so that jobs that start together do not meet at every unit."""
    if not units:
        return units
    start = int.from_bytes(hashlib.blake2b(owner.encode(), digest_size=8).digest(), "big") % len(units)
    return units[start:] + units[:start]


def label_left(
    store: SoftLabelStore,
    sizes: list[int],
    left: list[Unit],
    rules: LabelRules,
    owner: str,
    run: Callable[[list[Unit], Mapping[str, bytes]], Iterable[tuple[Unit, UnitDone]]],
    claim_s: float = LEASE_S,
    pause: Callable[[float], None] = time.sleep,
) -> Iterable[tuple[Unit, UnitDone]]:
    """Run the units that are left, again and again until every one is done by this job or another.

    Args:
        sizes: records of each image shard.
        left: see `units_left`.
        rules: how exact a label must be.
        owner: anything that is this job's own.
        run: labels units and tells of each. It is given the claims that are over (`Claims.over`): whoever first sees them would have to
            watch them as long again.
        claim_s: see `store.claim_s`.

    Yields:
        what became of each unit, once; a unit that another job did counts nothing asked.

    Raises:
        StoreError: the store cannot be read.
    """
    with Claims(store.files, claim_s) as claims:  # only looks
        free = left
        while left:
            others = []
            for unit, done in run(from_own_start(free, owner), claims.over):
                if done.is_others:
                    others.append(unit)
                else:
                    yield unit, done
            waiting = set(others) | (set(left) - set(free))
            left = [unit for unit in left if unit in waiting]
            free = []
            while left and not free:
                pause(LOOK_AGAIN_S)
                store.refresh()
                missing = {unit for unit in left if not _is_whole(store, unit, sizes[unit[1]], rules)}
                for unit in [unit for unit in left if unit not in missing]:
                    yield unit, UnitDone(sizes[unit[1]], 0)
                left = [unit for unit in left if unit in missing]
                free = [unit for unit in left if claims.is_free(*unit)]
