"""One crop that the teacher answers with NaN costs that image, not the run; a teacher that answers nothing else stops it."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import numpy as np
import pytest

from distill.errors import TeacherAnswerError
from distill.loader import CropBatch
from student_trainer.label_path import LabelPath, LabelRules
from student_trainer.store import SoftLabelStore
from student_trainer.unanswerable import REASON, answerable
from teacher_server.fake import FakeTeacher, fake_logits

RULES = LabelRules(temperature=1.0, temperatures=(1.0,), max_tv=0.02, patience_s=60)


class Choking(FakeTeacher):
    """Answers NaN for some crops."""

    def __init__(self, spoilt: list[np.ndarray]) -> None:
        super().__init__()
        self._spoilt = spoilt

    async def _infer(self, crops_BHWC: Any, temperature_B1: Any, names: tuple[str, ...]) -> dict[str, Any]:
        tensors = await super()._infer(crops_BHWC, temperature_B1, names)
        bad = [any(np.array_equal(crop, other) for other in self._spoilt) for crop in crops_BHWC]
        for tensor_BK in tensors.values():
            tensor_BK[bad] = np.nan
        return tensors


@pytest.fixture
def batch(loader_of: Any) -> CropBatch:
    (batch,) = list(loader_of(global_batch=24).epoch(0))
    return batch


@pytest.mark.parametrize("spoilt", [[0], [23], [3, 4, 17], list(range(1, 24))])
def test_the_crops_at_fault_are_listed_and_the_others_labelled(
    batch: CropBatch, store: SoftLabelStore, loader_of: Any, spoilt: list[int], held_by: Any
) -> None:
    rejections = loader_of().rejections
    teacher = Choking([batch.crops_VBHWC[0][at] for at in spoilt])
    path = LabelPath(store, teacher, RULES)
    kept, labels = asyncio.run(answerable(path, batch, rejections))
    good = [at for at in range(24) if at not in spoilt]
    assert kept.image_ids == [batch.image_ids[at] for at in good]
    np.testing.assert_array_equal(kept.crops_VBHWC, batch.crops_VBHWC[:, good])
    np.testing.assert_array_equal(kept.rows, batch.rows[good])
    expected = fake_logits(batch.crops_VBHWC[0][good], 10)
    np.testing.assert_array_equal(labels.logits_BK.argmax(axis=1), expected.argmax(axis=1))
    assert (len(labels.tv_B), labels.num_asked) == (len(good), len(good))
    path.commit()
    assert sorted(held_by(store).values()) == [1] * len(good)
    listed = [json.loads(line) for line in rejections.path.read_text().splitlines()]
    assert listed == [{"image_id": batch.image_ids[at], "reason": REASON} for at in spoilt]


def test_few_questions_find_one_bad_crop(batch: CropBatch, store: SoftLabelStore, loader_of: Any) -> None:
    teacher = Choking([batch.crops_VBHWC[0][5]])
    asyncio.run(answerable(LabelPath(store, teacher, RULES), batch, loader_of().rejections))
    assert len(teacher.calls) <= 1 + 2 * 5 + 1  # 24 images: five halvings, and a grey crop


@pytest.mark.parametrize("size", [1, 5])
@pytest.mark.parametrize("asked_before", [True, False])
def test_a_batch_of_bad_images_alone_is_rejected_where_the_teacher_answers_others(
    batch: CropBatch, store: SoftLabelStore, loader_of: Any, size: int, asked_before: bool
) -> None:
    rejections = loader_of().rejections
    path = LabelPath(store, Choking(list(batch.crops_VBHWC[0][:size])), RULES)

    async def ask() -> tuple[CropBatch, Any]:
        if asked_before:
            await answerable(path, batch.take(np.arange(size, 24)), rejections)
        return await answerable(path, batch.take(np.arange(size)), rejections)

    kept, labels = asyncio.run(ask())
    assert (kept.image_ids, kept.crops_VBHWC.shape[1], labels.logits_BK.shape, labels.num_asked) == ([], 0, (0, 10), 0)
    listed = [json.loads(line) for line in rejections.path.read_text().splitlines()]
    assert listed == [{"image_id": batch.image_ids[at], "reason": REASON} for at in range(size)]


class Broken(FakeTeacher):
    """Answers questions of these numbers, and NaN, or one class too few, to all others."""

    def __init__(self, answered: set[int], how: str) -> None:
        super().__init__()
        self._answered, self._how = answered, how

    async def _infer(self, crops_BHWC: Any, temperature_B1: Any, names: tuple[str, ...]) -> dict[str, Any]:
        number = len(self.calls)
        tensors = await super()._infer(crops_BHWC, temperature_B1, names)
        if number in self._answered:
            return tensors
        return {name: np.full_like(tensor, np.nan) if self._how == "NaN" else tensor[:, :-1] for name, tensor in tensors.items()}


@pytest.mark.parametrize("how", ["NaN", "9"])
@pytest.mark.parametrize(("answered", "kept"), [(set(), 0), ({0}, 8), ({1}, 12)], ids=["from the start", "after a batch", "inside a batch"])
def test_a_teacher_that_answers_nothing_any_more_is_at_fault_itself(
    batch: CropBatch, store: SoftLabelStore, loader_of: Any, held_by: Any, answered: set[int], kept: int, how: str
) -> None:
    """Also where some labels of the batch are there already; what it answered stays."""
    rejections = loader_of().rejections
    path = LabelPath(store, Broken(answered, how), RULES)

    async def ask() -> None:
        if answered == {0}:
            await answerable(path, batch.take(np.arange(8)), rejections)
        await answerable(path, batch, rejections)

    with pytest.raises(TeacherAnswerError, match=how):
        asyncio.run(ask())
    assert rejections.num_rejected == 0
    path.commit()
    assert sorted(held_by(store).values()) == [1] * kept
