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
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from distill.errors import FingerprintMismatch, TeacherUnavailable
from distill.loader import CropBatch
from distill.soft_labels import FloatArray, Record, decode, encode
from student_trainer.store import Segment, ShardLabels, SoftLabelStore
from teacher_server.backend import TeacherBackend

logger = logging.getLogger(__name__)

FIRST_PAUSE_S = 0.2
LONGEST_PAUSE_S = 5.0
COMMIT_AT = 8192
"""Labels that may wait in memory before they are committed anyway."""


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
    """(view, shard) pairs whose labels are held in memory."""


class LabelPath:
    """Soft labels for batches, read through the store. Everything happens on one event loop."""

    def __init__(self, store: SoftLabelStore, teacher: TeacherBackend, rules: LabelRules) -> None:
        self.store = store
        self.teacher = teacher
        self.rules = rules
        self.num_from_store = 0
        self.num_asked = 0
        self.waiting_since: float | None = None
        """When the teacher was last found silent; None while it answers."""
        self._held: OrderedDict[tuple[int, int], ShardLabels] = OrderedDict()
        self._pending: dict[tuple[int, int], dict[int, tuple[str, Record]]] = {}
        self._num_pending = 0

    def silent_s(self) -> float:
        """For how long the teacher has given no answer; 0 while it answers."""
        return 0.0 if self.waiting_since is None else time.monotonic() - self.waiting_since

    async def labels(self, batch: CropBatch, position: int = 0) -> tuple[FloatArray, int]:
        """Logits float32 [B,K] of the batch's crops in its view number `position`, and how many of them the teacher was asked for.

        Raises:
            TeacherUnavailable: no answer for `patience_s`.
            FingerprintMismatch: the teacher that answers is not the one whose labels the store holds.
            TeacherAnswerError, RequestRefused: see `TeacherBackend`.
        """
        view = batch.views[position]
        logits_BK = np.empty((len(batch.image_ids), self.store.identity.num_classes), dtype=np.float32)
        missing = self._from_store(batch, view, logits_BK)
        self.num_from_store += len(batch.image_ids) - len(missing)
        if len(missing):
            answered = await self._ask(batch.crops_VBHWC[position][missing])
            records = encode(answered, self.rules.temperatures, self.rules.max_tv)
            logits_BK[missing] = decode([r.encoding for r in records], [r.data for r in records], answered.shape[1])
            self._keep(view, batch.rows[missing], [batch.image_ids[i] for i in missing], records)
            self.num_asked += len(missing)
        return logits_BK, len(missing)

    def _from_store(self, batch: CropBatch, view: int, logits_BK: FloatArray) -> npt.NDArray[np.int64]:
        """Fill in the rows that the store has; return the positions of the others."""
        missing = []
        for at, (shard, row) in enumerate(batch.rows):
            kept = self._pending.get((view, int(shard)), {}).get(int(row))
            if kept is not None:
                record = kept[1]
                logits_BK[at] = decode([record.encoding], [record.data], logits_BK.shape[1])[0]
                continue
            labels = self._shard_labels(view, int(shard))
            position = labels.rows.get(int(row))
            if position is None:
                missing.append(at)
            elif labels.image_ids[position] != batch.image_ids[at]:
                raise FingerprintMismatch(
                    f"the label store has image {labels.image_ids[position]!r} where the source has {batch.image_ids[at]!r};"
                    " the images have changed: choose another store.path"
                )
            else:
                logits_BK[at] = labels.logits_NK[position]
        return np.array(missing, dtype=np.int64)

    def _shard_labels(self, view: int, shard: int) -> ShardLabels:
        key = (view, shard)
        if key not in self._held:
            self._held[key] = self.store.read(view, shard, self.rules.temperature, self.rules.max_tv)
            while len(self._held) > self.rules.views_held:
                self._held.popitem(last=False)
        self._held.move_to_end(key)
        return self._held[key]

    def _keep(self, view: int, rows: npt.NDArray[np.int64], image_ids: Sequence[str], records: Sequence[Record]) -> None:
        for (shard, row), image_id, record in zip(rows, image_ids, records, strict=True):
            self._pending.setdefault((view, int(shard)), {})[int(row)] = (image_id, record)
        self._num_pending += len(records)
        if self._num_pending >= COMMIT_AT:
            self.commit()

    def commit(self) -> None:
        """Write every label that is not yet in the store; when this returns, a crash loses none of them.

        Raises:
            StoreError: see `SoftLabelStore.commit`.
        """
        for view, shard in sorted(self._pending):
            # Taken out first: after a failure the store knows what it has, and a second try could put a label in twice.
            labels = self._pending.pop((view, shard))
            self._num_pending -= len(labels)
            ids, records = [i for i, _ in labels.values()], [r for _, r in labels.values()]
            self._forget(self.store.commit(view, shard, list(labels), ids, records, self.rules.temperatures))

    def refresh(self) -> None:
        """Take in what other workers committed."""
        self._forget(self.store.refresh())

    def _forget(self, segments: Sequence[Segment]) -> None:
        """Read the labels of these segments' shards anew when they are wanted next."""
        for segment in segments:
            self._held.pop((segment.view, segment.shard), None)

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
