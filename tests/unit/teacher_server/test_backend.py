"""What is asked of a teacher and what it answers is checked, whichever way it runs."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from distill.errors import RequestRefused, TeacherAnswerError, TeacherUnavailable
from teacher_server.backend import CheckedTeacher, Crops, Floats, check_probs, parse_info
from teacher_server.fake import FakeTeacher, fake_logits

CROPS = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)
ONES = np.ones((3, 1), np.float32)


def test_soft_labels_are_the_softmax_of_the_logits_at_each_temperature() -> None:
    temperature_B1 = np.array([[1], [2], [4]], np.float32)
    logits_BK, probs_BK = asyncio.run(FakeTeacher().soft_labels(CROPS, temperature_B1, with_logits=True))
    assert logits_BK is not None
    for logits_K, temperature, probs_K in zip(logits_BK.astype(float), (1, 2, 4), probs_BK, strict=True):
        exp_K = np.exp(logits_K / temperature)
        np.testing.assert_allclose(probs_K, exp_K / exp_K.sum(), rtol=1e-5)


def test_only_what_was_asked_for_comes_back() -> None:
    logits_BK, _ = asyncio.run(FakeTeacher().soft_labels(CROPS, ONES))
    assert logits_BK is None
    np.testing.assert_array_equal(asyncio.run(FakeTeacher().logits(CROPS)), fake_logits(CROPS, 10))


def test_no_crops_give_no_labels_and_ask_nobody() -> None:
    teacher = FakeTeacher(num_classes=4)
    assert asyncio.run(teacher.logits(CROPS[:0])).shape == (0, 4)
    assert teacher.calls == []


@pytest.mark.parametrize("crops", [CROPS.astype(np.float32), CROPS[0], CROPS[:, :7], np.zeros((1, 3, 8, 8), np.uint8)])
def test_crops_of_another_form_are_refused_by_name(crops: np.ndarray) -> None:
    with pytest.raises(RequestRefused, match=r"uint8 \[B,8,8,3\], got"):
        asyncio.run(FakeTeacher().logits(crops))


@pytest.mark.parametrize("bad", [0.0, -1.0, np.nan, np.inf, 100.1])
def test_impossible_temperatures_are_refused(bad: float) -> None:
    temperature_B1 = ONES.copy()
    temperature_B1[1] = bad
    with pytest.raises(RequestRefused, match="above 0 and at most 100, got"):
        asyncio.run(FakeTeacher().soft_labels(CROPS, temperature_B1))
    with pytest.raises(RequestRefused, match=r"float32 \[3,1\]"):
        asyncio.run(FakeTeacher().soft_labels(CROPS, ONES[:, 0]))


def test_nan_never_passes_for_a_label() -> None:
    with pytest.raises(TeacherAnswerError, match="NaN or infinity for 1 of 3 crops, first at 0"):
        asyncio.run(FakeTeacher(answer_nan=True).logits(CROPS))


def test_a_row_that_is_no_distribution_is_refused() -> None:
    with pytest.raises(TeacherAnswerError, match=r"crop 1 sum to 0\.5"):
        check_probs(np.array([[0.5, 0.5], [0.25, 0.25]], np.float32))
    with pytest.raises(TeacherAnswerError):
        check_probs(np.array([[1.5, -0.5]], np.float32))


def test_an_answer_of_another_shape_is_refused() -> None:
    class ShortTeacher(FakeTeacher):
        async def _infer(self, crops_BHWC: Crops, temperature_B1: Floats, names: tuple[str, ...]) -> dict[str, Floats]:
            tensors = await super()._infer(crops_BHWC, temperature_B1, names)
            return {name: tensor[:-1] for name, tensor in tensors.items()}

    with pytest.raises(TeacherAnswerError, match=r"\[2, 10\] where float32 \[3,10\] was due"):
        asyncio.run(ShortTeacher().logits(CROPS))


def test_ready_means_that_a_label_comes_out() -> None:
    async def scenario() -> list[bool]:
        teacher = FakeTeacher(unavailable_calls=1)
        answers = [await teacher.ready(), await teacher.ready()]
        teacher.answer_nan = True
        return [*answers, await teacher.ready()]

    assert asyncio.run(scenario()) == [False, True, False]
    with pytest.raises(TeacherUnavailable):
        asyncio.run(FakeTeacher(unavailable_calls=1).ask_canary())


def test_a_foreign_description_is_refused_by_name() -> None:
    with pytest.raises(RequestRefused, match="a file"):
        parse_info('{"name": "x"}', "a file")
    with pytest.raises(RequestRefused, match="a file"):
        parse_info("not JSON", "a file")


def test_every_back_end_is_checked() -> None:
    from teacher_server.embedded import EmbeddedTeacher
    from teacher_server.triton import TritonTeacher

    assert issubclass(EmbeddedTeacher, CheckedTeacher)
    assert issubclass(TritonTeacher, CheckedTeacher)


def test_a_teacher_that_was_away_says_anew_who_it_is() -> None:
    async def ask() -> list[str]:
        teacher = FakeTeacher(unavailable_calls=1)
        said = [(await teacher.info()).fingerprint]
        teacher._served = teacher._served.replace(fingerprint="a" * 64)
        said.append((await teacher.info()).fingerprint)
        with pytest.raises(TeacherUnavailable):
            await teacher.logits(CROPS)
        return [*said, (await teacher.info()).fingerprint]

    assert asyncio.run(ask()) == ["f" * 64, "f" * 64, "a" * 64]
