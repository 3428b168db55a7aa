"""Crops that the teacher cannot answer for (NaN logits) are left out and listed, so that one of them does not stop a run of millions.

Flow: a batch -> asked whole -> where the answer cannot be used, asked in halves, down to the crops at fault -> the batch without them.
Unit of data: one `CropBatch`.
"""

from __future__ import annotations

import numpy as np

from distill.errors import TeacherAnswerError
from distill.loader import CropBatch
from distill.rejections import RejectionLog
from student_trainer.label_path import BatchLabels, LabelPath

REASON = "the teacher gives no usable answer for its crop"


async def answerable(path: LabelPath, batch: CropBatch, rejections: RejectionLog) -> tuple[CropBatch, BatchLabels]:
    """The batch without the crops that have no usable answer, and the labels of the others. The images left out are rejected.

    Raises:
        TeacherAnswerError: the teacher has no answer for a grey crop either. Then it is at fault, not the images, and none is rejected.
            Else the batch that comes back may be empty.
        what `LabelPath.read` raises.
    """
    try:
        return batch, await path.read(batch)
    except TeacherAnswerError:
        found = await _in_halves(path, batch, np.arange(len(batch.image_ids)))
        if sum(len(positions) for positions, _ in found) < len(batch.image_ids) and not await path.answers_anything(batch):
            raise
    nothing = np.empty(0, dtype=np.int64)
    found.append((nothing, await path.read(batch.take(nothing))))  # so that there is something to join
    kept = np.concatenate([positions for positions, _ in found])
    for position in sorted(set(range(len(batch.image_ids))) - set(kept.tolist())):
        rejections.reject(batch.image_ids[position], REASON)
    labels = [labels for _, labels in found]
    return batch.take(kept), BatchLabels(
        logits_BK=np.concatenate([part.logits_BK for part in labels]),
        tv_B=np.concatenate([part.tv_B for part in labels]),
        num_asked=sum(part.num_asked for part in labels),
    )


async def _in_halves(path: LabelPath, batch: CropBatch, positions: np.ndarray) -> list[tuple[np.ndarray, BatchLabels]]:
    """The parts of `positions` that have answers, in order."""
    if len(positions) == 1:
        return []
    found = []
    for half in np.array_split(positions, 2):
        try:
            found.append((half, await path.read(batch.take(half))))
        except TeacherAnswerError:
            found += await _in_halves(path, batch, half)
    return found
