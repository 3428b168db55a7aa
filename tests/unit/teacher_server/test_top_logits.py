"""The largest logits of a teacher that gives them: carried as such, or picked out of all of them, and never a wrong class."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from distill.errors import RequestRefused, TeacherAnswerError, TeacherChanged
from distill.teacher_info import METADATA_KEY
from distill.wire import TOP_IDS, TOP_LOGITS
from export.top_outputs import add_top_outputs
from teacher_server.backend import Crops, Floats, check_top
from teacher_server.embedded import EmbeddedTeacher, Engine
from teacher_server.fake import FakeTeacher, fake_logits
from teacher_server.model_repository import served_model

CROPS = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), np.uint8)


class TopTeacher(FakeTeacher):
    """The fake teacher with its 3 largest logits; `spoil` changes the answer."""

    carries_top_outputs = True

    def __init__(self, num_top: int | None = 3, spoil: Any = None) -> None:
        super().__init__()
        self._served = self._served.replace(top_outputs=num_top)
        self.spoil = spoil or (lambda ids, logits: (ids, logits))

    async def _infer(self, crops_BHWC: Crops, temperature_B1: Floats, names: tuple[str, ...]) -> dict[str, Any]:
        assert names == (TOP_IDS, TOP_LOGITS)
        logits_BK = fake_logits(crops_BHWC, 10)
        ids_BR = np.argsort(-logits_BK, axis=1)[:, :3].astype(np.int32)
        ids, logits = self.spoil(ids_BR, np.take_along_axis(logits_BK, ids_BR, axis=1))
        return {TOP_IDS: ids, TOP_LOGITS: logits}


class WholeTeacher(FakeTeacher):
    """As a client over REST: it carries all logits or none."""

    def __init__(self) -> None:
        super().__init__()
        self._served = self._served.replace(top_outputs=3)


@pytest.mark.parametrize("teacher", [TopTeacher(), WholeTeacher()], ids=["carried", "picked here"])
def test_they_are_the_sorted_logits(teacher: FakeTeacher) -> None:
    ids_BR, logits_BR = asyncio.run(teacher.top_logits(CROPS))
    logits_BK = fake_logits(CROPS, 10)
    assert (ids_BR.dtype, logits_BR.dtype) == (np.int32, np.float32)
    np.testing.assert_array_equal(ids_BR, np.argsort(-logits_BK, axis=1)[:, :3])
    np.testing.assert_array_equal(logits_BR, -np.sort(-logits_BK, axis=1)[:, :3])


@pytest.mark.parametrize("teacher", [TopTeacher(), WholeTeacher()], ids=["carried", "picked here"])
def test_no_crops_ask_nobody(teacher: FakeTeacher) -> None:
    ids_BR, logits_BR = asyncio.run(teacher.top_logits(CROPS[:0]))
    assert (ids_BR.shape, logits_BR.shape, ids_BR.dtype) == ((0, 3), (0, 3), np.int32)
    assert teacher.calls == []


def test_a_teacher_without_them_refuses_by_name() -> None:
    with pytest.raises(RequestRefused, match=r"teacher fake gives no top outputs: export it with teacher.top_outputs"):
        asyncio.run(TopTeacher(None).top_logits(CROPS))
    with pytest.raises(RequestRefused, match=r"uint8 \[B,8,8,3\]"):
        asyncio.run(TopTeacher().top_logits(CROPS[:, :7]))
    with pytest.raises(TeacherChanged):
        asyncio.run(TopTeacher().top_logits(CROPS, fingerprint="0" * 64))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda ids, logits: (ids[:, :2], logits), r"top_ids as int32 \[5, 2\] where int32 \[5,3\] was due"),
        (lambda ids, logits: (ids, logits[:, :2]), r"top_logits as float32 \[5, 2\]"),
        (lambda ids, logits: (ids.astype(np.float32), logits), "top_ids as float32"),
        (lambda ids, logits: (np.where(ids == ids[0, 0], 10, ids), logits), "not 3 different classes of 10"),
        (lambda ids, logits: (np.where(ids == ids[0, 0], -1, ids), logits), "not 3 different classes"),
        (lambda ids, logits: (np.repeat(ids[:, :1], 3, axis=1), logits), "not 3 different classes"),
        (lambda ids, logits: (ids[:, ::-1], logits[:, ::-1]), "not in order"),
        (lambda ids, logits: (ids, np.where(ids == ids[0, 0], np.float32(np.nan), logits)), "NaN or infinity"),
    ],
)
def test_answers_that_cannot_be_are_refused(spoil: Any, said: str) -> None:
    with pytest.raises(TeacherAnswerError, match=said):
        asyncio.run(TopTeacher(spoil=spoil).top_logits(CROPS))


def test_all_classes_are_their_own_top() -> None:
    info = TopTeacher()._served.replace(top_outputs=10)
    check_top(np.tile(np.arange(10, dtype=np.int32), (2, 1)), np.zeros((2, 10), np.float32), 2, info)


def test_the_embedded_engine_gives_them(tiny_teacher: Any, tmp_path: Path) -> None:
    path = with_top_outputs(tiny_teacher, 4, tmp_path / "model.onnx")
    engine = Engine(path, max_batch_size=2)  # answers are put together of parts
    teacher = EmbeddedTeacher(engine)
    ids_BR, logits_BR = asyncio.run(teacher.top_logits(CROPS))
    asyncio.run(teacher.close())
    expected = tiny_teacher.logits(CROPS)
    np.testing.assert_array_equal(ids_BR, np.argsort(-expected, axis=1)[:, :4])
    np.testing.assert_allclose(logits_BR, -np.sort(-expected, axis=1)[:, :4], atol=1e-5)
    plain = EmbeddedTeacher.from_repository(tiny_teacher.repository, "tiny")
    with pytest.raises(RequestRefused, match="teacher tiny gives no top outputs"):
        asyncio.run(plain.top_logits(CROPS))
    asyncio.run(plain.close())


def test_a_file_that_only_says_so_is_refused(tiny_teacher: Any, tmp_path: Path) -> None:
    model = onnx.load(served_model(tiny_teacher.repository, "tiny"))
    onnx.helper.set_model_props(model, {METADATA_KEY: tiny_teacher.info.replace(top_outputs=4).model_dump_json()})
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(RequestRefused, match="says that it gives 4 top outputs, but its outputs are"):
        Engine(tmp_path / "model.onnx")


def with_top_outputs(tiny_teacher: Any, num_top: int, path: Path) -> Path:
    model = onnx.load(served_model(tiny_teacher.repository, "tiny"))
    add_top_outputs(model, num_top)
    onnx.helper.set_model_props(model, {METADATA_KEY: tiny_teacher.info.replace(top_outputs=num_top).model_dump_json()})
    onnx.save(model, path)
    return path
