"""The REST client against the real gateway app, inside this process: crops and files in, the teacher's own labels out."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from distill.errors import RequestRefused, TeacherAnswerError, TeacherChanged, TeacherUnavailable
from distill.teacher_info import Preprocessing
from teacher_server.async_client import AsyncTeacherClient
from teacher_server.client import FileLabels, FileRefused, FileResult
from teacher_server.fake import FakeTeacher, fake_logits
from teacher_server.file_labels import parts_of
from teacher_server.gateway import create_app
from teacher_server.key_file import KeyFile, new_key, write_keys
from teacher_server.rest import RestTeacher
from teacher_server.retries import Patience, RetryPolicy
from teacher_server.settings import ServerSettings

CROPS = np.random.default_rng(0).integers(0, 256, (7, 8, 8, 3), np.uint8)


def run(
    question: Callable[[AsyncTeacherClient], Awaitable[Any]],
    teacher: FakeTeacher | None = None,
    *,
    message_bytes: int = 10**6,
    api_key: str | None = None,
    max_attempts: int | None = 5,
    **settings: Any,
) -> Any:
    """What a question to a fresh gateway gives; no wait takes real time."""

    async def sleep(seconds: float) -> None:
        await asyncio.sleep(0)

    async def scenario() -> Any:
        app = create_app(teacher or FakeTeacher(), ServerSettings(**{"auth": "none", **settings}))
        backend = RestTeacher(
            "http://gateway",
            api_key=api_key,
            transport=httpx.ASGITransport(app, raise_app_exceptions=False),
            patience=Patience(RetryPolicy(max_attempts=max_attempts), 30, sleep=sleep),
        )
        backend._message_bytes = message_bytes
        async with AsyncTeacherClient(backend) as client:
            return await question(client)

    return asyncio.run(scenario())


def png(pixels_HWC: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels_HWC).save(buffer, "PNG")
    return buffer.getvalue()


def softmax(logits_BK: np.ndarray, temperature: float) -> np.ndarray:
    exp_BK = np.exp(logits_BK.astype(np.float64) / temperature)
    return exp_BK / exp_BK.sum(axis=1, keepdims=True)


def test_crops_get_the_labels_that_the_teacher_itself_gives() -> None:
    teacher = FakeTeacher()

    async def question(client: AsyncTeacherClient) -> None:
        assert await client.ready()
        assert await client.info() == await teacher.info()
        np.testing.assert_array_equal(await client.logits(CROPS), await teacher.logits(CROPS))
        temperature_B1 = np.full((7, 1), 3.3, np.float32)
        np.testing.assert_array_equal(await client.soft_labels(CROPS, 3.3), (await teacher.soft_labels(CROPS, temperature_B1))[1])
        assert (await client.logits(CROPS[:0])).shape == (0, 10)

    run(question, teacher, message_bytes=2 * CROPS[0].nbytes)
    assert max(teacher.calls[1:]) == 7, "asked directly"
    assert 1 <= min(teacher.calls) <= 2, "asked in messages"


def test_the_back_end_goes_wherever_a_back_end_goes() -> None:
    async def question(client: AsyncTeacherClient) -> None:
        temperature_B1 = np.linspace(1, 7, 7, dtype=np.float32)[:, None]
        logits_BK, probs_BK = await client.backend.soft_labels(CROPS, temperature_B1, with_logits=True)
        assert logits_BK is not None
        np.testing.assert_array_equal(logits_BK, fake_logits(CROPS, 10))
        exp_BK = np.exp(logits_BK.astype(np.float64) / temperature_B1)
        np.testing.assert_allclose(probs_BK, exp_BK / exp_BK.sum(axis=1, keepdims=True), rtol=1e-6)

    run(question)


@pytest.mark.parametrize("message_bytes", [10**6, 400, 1])
def test_files_get_labels_and_bad_ones_a_reason_in_their_place(tmp_path: Path, message_bytes: int) -> None:
    on_disk = tmp_path / "image.png"
    on_disk.write_bytes(png(CROPS[1]))
    files = [png(CROPS[0]), b"not an image", on_disk, tmp_path / "missing.png", png(CROPS[2])[:60], png(CROPS[3])]

    async def question(client: AsyncTeacherClient) -> list[FileResult]:
        return await client.soft_labels_of(files, 2.0)

    results = run(question, message_bytes=message_bytes)
    assert [getattr(result, "code", "labels") for result in results] == [
        "labels",
        "bad_image",
        "labels",
        "unreadable_file",
        "bad_image",
        "labels",
    ]
    for position, crop in ((0, 0), (2, 1), (5, 3)):
        assert isinstance(results[position], FileLabels)
        np.testing.assert_allclose(results[position].probs_R, softmax(fake_logits(CROPS[crop : crop + 1], 10), 2)[0], rtol=1e-5)
    assert isinstance(results[3], FileRefused)
    assert "missing.png" in results[3].message


def test_files_are_put_together_up_to_the_limits() -> None:
    assert parts_of([], 10, 3) == []
    assert parts_of([4, 4, 4, 1], 9, 3) == [range(0, 2), range(2, 4)]
    assert parts_of([1, 1, 1, 1], 9, 3) == [range(0, 3), range(3, 4)]
    assert parts_of([99, 1, 99], 9, 3) == [range(0, 1), range(1, 2), range(2, 3)], "one over the limit goes alone"


def test_not_one_usable_file_is_a_result_too() -> None:
    results = run(lambda client: client.soft_labels_of([b"a", b"b"]))
    assert [type(result) for result in results] == [FileRefused, FileRefused]
    assert run(lambda client: client.soft_labels_of([])) == []


def test_files_with_top_k_and_files_that_are_crops_already() -> None:
    top, whole = run(lambda client: client.soft_labels_of([png(CROPS[0])], 1.0, 3)), fake_logits(CROPS[:1], 10)[0]
    assert top[0].class_ids_R.tolist() == sorted(range(10), key=lambda k: -whole[k])[:3]
    np.testing.assert_allclose(top[0].probs_R, np.sort(softmax(whole[None], 1)[0])[::-1][:3], rtol=1e-5)
    as_is = run(lambda client: client.soft_labels_of([png(CROPS[0]), png(np.zeros((9, 8, 3), np.uint8))], crop="as-is"))
    assert isinstance(as_is[0], FileLabels)
    assert isinstance(as_is[1], FileRefused)
    assert as_is[1].code == "wrong_size"


def test_a_file_too_large_for_the_gateway_is_refused_alone() -> None:
    noise = png(np.random.default_rng(0).integers(0, 256, (30, 30, 3), np.uint8))
    assert len(noise) > 2000
    results = run(lambda client: client.soft_labels_of([png(CROPS[0]), noise, png(CROPS[1])]), max_body_bytes=2000)
    assert [getattr(result, "code", "labels") for result in results] == ["labels", "too_large", "labels"]


def test_what_is_wrong_with_the_question_is_no_result_of_a_file() -> None:
    for arguments in ({"top_k": 11}, {"temperature": 0.0}, {"temperature": float("nan")}, {"crop": "sideways"}):
        with pytest.raises(RequestRefused):
            run(lambda client, arguments=arguments: client.soft_labels_of([png(CROPS[0])], **arguments))


def test_a_body_limit_is_found_and_kept_to() -> None:
    np.testing.assert_array_equal(
        run(lambda client: client.logits(CROPS), max_body_bytes=1024, max_image_bytes=1024), fake_logits(CROPS, 10)
    )


def test_a_teacher_that_is_away_for_a_while_is_waited_for() -> None:
    teacher = FakeTeacher(unavailable_calls=3)
    np.testing.assert_array_equal(run(lambda client: client.logits(CROPS), teacher), fake_logits(CROPS, 10))
    assert teacher.calls == [7] * 4
    with pytest.raises(TeacherUnavailable, match=r"503 teacher_unavailable.*after 5 attempts"):
        run(lambda client: client.logits(CROPS), FakeTeacher(unavailable_calls=100))


def test_nan_labels_are_an_error_here_too() -> None:
    teacher = FakeTeacher(answer_nan=True)
    with pytest.raises(TeacherAnswerError, match="502 bad_teacher_answer"):
        run(lambda client: client.logits(CROPS), teacher)
    assert len(teacher.calls) == 2, "asked again once"


def test_a_cancelled_call_is_given_up_by_the_gateway() -> None:
    teacher = FakeTeacher(delay_s=3600)

    async def question(client: AsyncTeacherClient) -> None:
        call = asyncio.ensure_future(client.logits(CROPS))
        while not teacher.calls:  # noqa: ASYNC110 - the teacher has no event to wait for
            await asyncio.sleep(0)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call

    run(question, teacher)
    assert teacher.cancelled == 1


def test_a_key_opens_a_gateway_that_wants_keys(tmp_path: Path) -> None:
    key, entry = new_key("alice")
    write_keys(tmp_path / "keys.yaml", KeyFile(keys=(entry,)))
    settings = {"auth": "keys", "keys_file": str(tmp_path / "keys.yaml")}
    np.testing.assert_array_equal(run(lambda client: client.logits(CROPS), api_key=key, **settings), fake_logits(CROPS, 10))
    for wrong in (None, key[:-1] + ("a" if key[-1] != "a" else "b")):
        with pytest.raises(RequestRefused, match="401 unauthorized") as caught:
            run(lambda client: client.logits(CROPS), api_key=wrong, **settings)
        assert key[:-1] not in str(caught.value)


def test_a_quota_is_waited_for() -> None:
    teacher = FakeTeacher()

    async def question(client: AsyncTeacherClient) -> Any:
        return await asyncio.gather(*[client.logits(CROPS) for _ in range(4)])

    for logits_BK in run(question, teacher, max_attempts=None, quota={"max_concurrent": 1}):
        np.testing.assert_array_equal(logits_BK, fake_logits(CROPS, 10))


def test_a_gateway_that_takes_fewer_images_gets_fewer() -> None:
    teacher = FakeTeacher()
    np.testing.assert_array_equal(run(lambda client: client.logits(CROPS), teacher, max_batch=3), fake_logits(CROPS, 10))
    assert max(teacher.calls) <= 3
    results = run(lambda client: client.soft_labels_of([png(crop) for crop in CROPS]), max_batch=3)
    assert [type(result) for result in results] == [FileLabels] * 7


def test_files_that_are_crops_of_the_teacher_before_are_told_apart_from_wrong_ones() -> None:
    teacher = FakeTeacher()

    async def question(client: AsyncTeacherClient) -> None:
        await client.info()
        teacher._served = teacher._served.replace(version=2, fingerprint="e" * 64, preprocessing=Preprocessing(image_size=12))
        teacher._info = None
        with pytest.raises(TeacherChanged):
            await client.soft_labels_of([png(CROPS[0])], crop="as-is", fingerprint="f" * 64)
        (wrong,) = await client.soft_labels_of([png(CROPS[0])], crop="as-is")
        assert isinstance(wrong, FileRefused)
        assert wrong.code == "wrong_size"
        (right,) = await client.soft_labels_of([png(np.zeros((12, 12, 3), np.uint8))], crop="as-is")
        assert isinstance(right, FileLabels)

    run(question, teacher)
