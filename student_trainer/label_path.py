"""The way to a soft label: read it from the store, and only if it is not there ask the teacher, keep the answer, hand it on.

What is handed on is always what the store holds (encoded and decoded again), so a label is the same the first time and every time.

Unit of data: the labels of one `CropBatch`. Shapes: B images, K classes.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from distill.errors import FingerprintMismatch, StoreError, TeacherAnswerError, TeacherUnavailable
from distill.loader import CropBatch
from distill.plan import Rows
from distill.soft_labels import FloatArray, Record, decode, encode
from student_trainer.store import Segment, ShardLabels, SoftLabelStore
from teacher_server.backend import TeacherBackend

logger = logging.getLogger(__name__)

Positions = npt.NDArray[np.int64]
Kept = tuple[str, Record]
"""An image and its label."""

FIRST_PAUSE_S = 0.2
LONGEST_PAUSE_S = 5.0
COMMIT_AT = 8192
"""Labels that may wait in memory before they are committed anyway; as many again may be on their way to the disk."""


@dataclass(frozen=True)
class LabelRules:
    """How exact a kept label must be and how long a silent teacher is waited for."""

    temperature: float
    """Temperature at which the labels are read."""
    temperatures: tuple[float, ...]
    """Temperatures at which a record's error is computed when it is written; `temperature` is one of them."""
    max_tv: float
    patience_s: float
    views_held: int = 16
    """(view, shard) pairs whose labels are held in memory. With fewer than a batch comes from they would be read again and again."""


@dataclass(frozen=True)
class BatchLabels:
    """What is known about the crops of one batch."""

    logits_BK: FloatArray
    """The teacher's logits, each row known up to a constant."""
    tv_B: FloatArray
    """Bound of each label's total-variation error at the job's temperature."""
    num_asked: int
    """How many of the labels came from the teacher; the others were in the store."""

    def fill(self, at: Positions, records: Sequence[Record]) -> None:
        """Put the labels of `records` at these positions."""
        self.logits_BK[at] = decode([r.encoding for r in records], [r.data for r in records], self.logits_BK.shape[1])
        self.tv_B[at] = [r.max_tv for r in records]


class _HeldLabels:
    """The labels of one (view, shard), found by row without a loop over the rows of a batch."""

    def __init__(self, labels: ShardLabels) -> None:
        rows = np.fromiter(labels.rows, dtype=np.int64, count=len(labels.rows))
        self._position_of_row = np.full(rows.max(initial=-1) + 2, -1, dtype=np.int64)  # the last one is for rows beyond
        self._position_of_row[rows] = np.fromiter(labels.rows.values(), dtype=np.int64, count=len(rows))
        self.image_ids = np.array(labels.image_ids, dtype=object)
        self.logits_NK = labels.logits_NK
        self.tv_N = labels.tv_N

    def positions(self, rows: Positions) -> Positions:
        """Where the labels of these rows of the shard are; -1 where there is none."""
        return self._position_of_row[np.minimum(rows, len(self._position_of_row) - 1)]


class LabelPath:
    """Soft labels for batches, read through the store. Everything happens on one event loop; what would hold it up (encoding, writing to
    disk) in threads beside it."""

    def __init__(self, store: SoftLabelStore, teacher: TeacherBackend, rules: LabelRules) -> None:
        self.store = store
        self.teacher = teacher
        self.rules = rules
        self.num_from_store = 0
        self.num_asked = 0
        self.waiting_since: float | None = None
        """When the teacher was last found silent; None while it answers."""
        self._held: OrderedDict[tuple[int, int], _HeldLabels] = OrderedDict()
        self._pending: dict[tuple[int, int], dict[int, Kept]] = {}
        self._writing: dict[tuple[int, int], dict[int, Kept]] = {}
        self._num_pending = 0
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="label store")
        """Writes, one at a time. What is read meanwhile is other shards, or what was committed before."""
        self._aside: asyncio.Task[None] | None = None
        self._failure: StoreError | None = None

    def silent_s(self) -> float:
        """For how long the teacher has given no answer; 0 while it answers."""
        return 0.0 if self.waiting_since is None else time.monotonic() - self.waiting_since

    async def read(self, batch: CropBatch, position: int = 0) -> BatchLabels:
        """The labels of the batch's crops in its view number `position`.

        Raises:
            TeacherUnavailable: no answer for `patience_s`; it says how many labels are there but too rough.
            FingerprintMismatch: the teacher that answers is not the one whose labels the store holds.
            TeacherAnswerError, RequestRefused: see `TeacherBackend`.
            StoreError: labels answered earlier cannot be written.
        """
        view, size = batch.views[position], len(batch.image_ids)
        labels = BatchLabels(np.empty((size, self.store.identity.num_classes), np.float32), np.empty(size, np.float32), 0)
        missing = self._from_store(batch, view, labels)
        self.num_from_store += size - len(missing)
        if not len(missing):
            return labels
        try:
            answered = await self._ask(batch.crops_VBHWC[position][missing])
        except TeacherUnavailable as error:
            raise TeacherUnavailable(f"{error}{self._told_of_rough_labels(view, batch.rows[missing])}") from error
        # A thousand classes take 0.1 s and more: long enough to leave other answers unread.
        records = await asyncio.to_thread(encode, answered, self.rules.temperatures, self.rules.max_tv)
        labels.fill(missing, records)
        self._keep(view, batch.rows[missing], [batch.image_ids[i] for i in missing], records)
        self.num_asked += len(missing)
        if self._num_pending >= COMMIT_AT:
            await self._commit_aside()
        return replace(labels, num_asked=len(missing))

    async def answers_anything(self, batch: CropBatch) -> bool:
        """Whether the teacher has a usable answer for a grey crop; it is waited for as for any other.

        Raises:
            TeacherUnavailable: no answer for `patience_s`.
        """
        try:
            await self._ask(np.full((1, *batch.crops_VBHWC.shape[2:]), 128, dtype=np.uint8))
        except TeacherAnswerError:
            return False
        return True

    def _from_store(self, batch: CropBatch, view: int, labels: BatchLabels) -> Positions:
        """Fill in the rows that the store has or will have; return the positions of the others."""
        is_missing = np.zeros(len(batch.rows), dtype=bool)
        image_ids = np.array(batch.image_ids, dtype=object)
        shards, shard_of_row = np.unique(batch.rows[:, 0], return_inverse=True)
        for index, shard in enumerate(shards.tolist()):
            at = np.flatnonzero(shard_of_row == index)
            for unwritten in (self._pending, self._writing):
                at = self._from_memory(at, batch.rows[at, 1], unwritten.get((view, shard)), labels)
            if not len(at):
                continue
            held = self._shard_labels(view, shard)
            position = held.positions(batch.rows[at, 1])
            is_missing[at[position < 0]] = True
            there, position = at[position >= 0], position[position >= 0]
            changed = np.flatnonzero(held.image_ids[position] != image_ids[there])
            if len(changed):
                raise FingerprintMismatch(
                    f"the label store has image {held.image_ids[position[changed[0]]]!r} where the source has"
                    f" {image_ids[there[changed[0]]]!r}; the images have changed: choose another store.path"
                )
            labels.logits_BK[there] = held.logits_NK[position]
            labels.tv_B[there] = held.tv_N[position]
        return np.flatnonzero(is_missing)

    def _from_memory(self, at: Positions, rows: Positions, kept: dict[int, Kept] | None, labels: BatchLabels) -> Positions:
        """Fill in what was answered and is not yet committed; return the positions of the others."""
        if not kept:
            return at
        found = np.fromiter((row in kept for row in rows.tolist()), dtype=bool, count=len(rows))
        labels.fill(at[found], [kept[row][1] for row in rows[found].tolist()])
        return at[~found]

    def _shard_labels(self, view: int, shard: int) -> _HeldLabels:
        key = (view, shard)
        if key not in self._held:
            self._held[key] = _HeldLabels(self._read_store(view, shard, self.rules.max_tv))
            while len(self._held) > self.rules.views_held:
                self._held.popitem(last=False)
        self._held.move_to_end(key)
        return self._held[key]

    def _read_store(self, view: int, shard: int, max_tv: float) -> ShardLabels:
        return self.store.read(view, shard, self.rules.temperature, max_tv)

    def _told_of_rough_labels(self, view: int, rows: Rows) -> str:
        """What to add where the teacher is away: the labels of these rows that are there, but are too rough to be used."""
        rough = []
        for shard in np.unique(rows[:, 0]).tolist():
            labels = self._read_store(view, shard, 1.0)  # no total variation is over 1
            wanted = rows[rows[:, 0] == shard, 1].tolist()
            rough += [float(labels.tv_N[labels.rows[row]]) for row in wanted if row in labels.rows]
        if not rough:
            return ""
        return (
            f"; {len(rough)} of the {len(rows)} labels wanted are in the store, but only within {max(rough):.2g} at temperature"
            f" {self.rules.temperature:g} (limit store.max_tv={self.rules.max_tv:g}): bring the teacher back, or allow a larger"
            " store.max_tv"
        )

    def _keep(self, view: int, rows: Rows, image_ids: Sequence[str], records: Sequence[Record]) -> None:
        for (shard, row), image_id, record in zip(rows.tolist(), image_ids, records, strict=True):
            kept = self._pending.setdefault((view, shard), {})
            self._num_pending += row not in kept  # two questions about one crop may have been on their way at once
            kept[row] = (image_id, record)

    async def _commit_aside(self) -> None:
        """Begin to write what is pending, and go on. A disk that is slower than the teacher is waited for here."""
        while self._aside is not None and not self._aside.done():
            await asyncio.wait([self._aside])
        self._raise_failure()
        if self._num_pending >= COMMIT_AT:
            self._aside = asyncio.create_task(self._write_aside(sorted(self._pending)))

    async def _write_aside(self, keys: Sequence[tuple[int, int]]) -> None:
        for key in keys:
            if key in self._pending:
                self._writing[key] = self._take(key)
                try:
                    segments = await asyncio.wrap_future(self._disk.submit(self._write, key, self._writing[key]))
                finally:
                    del self._writing[key]
                self._forget(segments)

    def commit(self) -> None:
        """Write every label that is not yet in the store; when this returns, a crash loses none of them.

        Raises:
            StoreError: see `SoftLabelStore.commit`; also what befell a write in the background before.
        """
        for key in sorted(self._pending):
            self._forget(self._disk.submit(self._write, key, self._take(key)).result())
            self._raise_failure()
        self._disk.submit(int).result()  # what was being written aside is written
        self._raise_failure()

    def _take(self, key: tuple[int, int]) -> dict[int, Kept]:
        # Taken out before it is written: after a failure the store knows what it has, and a second try could put a label in twice.
        labels = self._pending.pop(key)
        self._num_pending -= len(labels)
        return labels

    def _write(self, key: tuple[int, int], labels: dict[int, Kept]) -> list[Segment]:
        ids, records = [i for i, _ in labels.values()], [r for _, r in labels.values()]
        try:
            return self.store.commit(*key, list(labels), ids, records, self.rules.temperatures, self.rules.max_tv)
        except Exception as error:  # noqa: BLE001 - nobody reads the task that writes aside; carried to the next commit, raised there
            self._failure = self._failure or self._as_store_error(error)
            return []

    def _as_store_error(self, error: Exception) -> StoreError:
        if isinstance(error, StoreError):
            return error
        said = StoreError(f"labels cannot be written to {self.store.folder}: {type(error).__name__}: {error}")
        said.__cause__ = error
        return said

    def _raise_failure(self) -> None:
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def refresh(self) -> None:
        """Take in what other workers committed."""
        self._forget(self._disk.submit(self.store.refresh).result())

    def _forget(self, segments: Sequence[Segment]) -> None:
        """Read the labels of these segments' shards anew when they are wanted next."""
        for segment in segments:
            self._held.pop((segment.view, segment.shard), None)

    async def close(self) -> None:
        """Write what is pending, let go of the teacher.

        Raises:
            StoreError: as `commit`.
        """
        try:
            self.commit()
        finally:
            if self._aside is not None:
                await asyncio.wait([self._aside])
            self._disk.shutdown()
            await self.teacher.close()

    async def _ask(self, crops_BHWC: npt.NDArray[np.uint8]) -> FloatArray:
        """Ask until an answer comes, with growing pauses of random length, at most `patience_s` long."""
        pause_s = FIRST_PAUSE_S
        asked_at = time.monotonic()
        while True:
            try:
                info = await self.teacher.info()
                if info.fingerprint != self.store.identity.fingerprint:
                    raise FingerprintMismatch(
                        f"the teacher that answers is {info.fingerprint[:12]},"
                        f" the labels wanted are of {self.store.identity.fingerprint[:12]}"
                    )
                logits_BK = await self.teacher.logits(crops_BHWC, fingerprint=info.fingerprint)  # another may take its place in between
            except TeacherUnavailable as error:
                self.waiting_since = self.waiting_since or time.monotonic()
                away_s = time.monotonic() - asked_at
                if away_s > self.rules.patience_s:
                    raise TeacherUnavailable(
                        f"the teacher gave no answer for {away_s:.0f} s (limit train.teacher_patience_s={self.rules.patience_s:g}): {error}"
                    ) from error
                logger.info("teacher away for %.0f s, asking again: %s", away_s, error)
                await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
            else:
                self.waiting_since = None
                return logits_BK
