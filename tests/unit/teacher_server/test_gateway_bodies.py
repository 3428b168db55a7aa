"""Every kind of body over in-process ASGI: forms with many files, crop policies, sizes, names, numbers that survive JSON."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import tempfile
import threading
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from distill.crops import center_crop
from distill.teacher_info import Preprocessing
from distill.wire import CROPS_MEDIA_TYPE, SOFT_LABELS_MEDIA_TYPE, decode_soft_labels, encode_crops
from teacher_server.fake import FakeTeacher, fake_logits
from teacher_server.gateway import create_app
from teacher_server.schemas import ImagesRequest
from teacher_server.settings import ServerSettings

LABELS = "/v1/soft-labels"
PIXELS = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)
LARGE = np.random.default_rng(1).integers(0, 256, (30, 20, 3), np.uint8)


def png(pixels_HWC: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels_HWC).save(buffer, "PNG")
    return buffer.getvalue()


def post(*, teacher: FakeTeacher | None = None, limits: dict[str, Any] | None = None, **arguments: Any) -> httpx.Response:
    """One request to a fresh app."""

    async def scenario() -> httpx.Response:
        app = create_app(teacher or FakeTeacher(), ServerSettings(auth="none", **(limits or {})))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as client:
            return await client.post(LABELS, **arguments)

    return asyncio.run(scenario())


def form(*files: bytes) -> list[tuple[str, tuple[str, bytes, str]]]:
    return [("images", (f"{number}.png", file, "image/png")) for number, file in enumerate(files)]


def refusal(answer: httpx.Response, status: int, code: str) -> str:
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (status, code), answer.text
    return error["message"]


def test_a_form_with_many_files_is_answered_in_their_order() -> None:
    teacher = FakeTeacher()
    files = [png(PIXELS[i % 3]) for i in range(20)]
    answer = post(files=form(*files), params={"return": "logits"}, teacher=teacher)
    assert answer.status_code == 200
    assert teacher.calls == [20], "decoded in chunks, asked at once"
    truth_BK = fake_logits(PIXELS, 10)
    for i, item in enumerate(answer.json()["items"]):
        np.testing.assert_allclose(item["values"], truth_BK[i % 3], rtol=1e-5)


def test_a_form_with_one_bad_file_answers_the_others() -> None:
    answer = post(files=form(png(PIXELS[0]), b"GIF89a....", png(PIXELS[1])), params={"return": "logits"})
    assert answer.status_code == 207
    items = answer.json()["items"]
    assert items[1] == {"error": {"code": "bad_image", "message": "unsupported format GIF"}}
    np.testing.assert_allclose([items[0]["values"], items[2]["values"]], fake_logits(PIXELS[:2], 10), rtol=1e-5)


def test_a_form_without_one_usable_file_says_what_is_wrong_with_each() -> None:
    answer = post(files=form(b"", b"GIF89a...."))
    assert "none of the 2 images" in refusal(answer, 422, "refused")
    assert answer.json()["error"]["items"] == [
        {"index": 0, "code": "bad_image", "message": "empty file"},
        {"index": 1, "code": "bad_image", "message": "unsupported format GIF"},
    ]


def test_forms_have_limits_and_hold_files_only() -> None:
    assert "1 to 2 images" in refusal(post(files=form(*[png(PIXELS[0])] * 3), limits={"max_batch": 2}), 413, "too_large")
    # A temperature that nobody reads would give other labels than were meant.
    assert "'temperature'" in refusal(post(files=form(png(PIXELS[0])), data={"temperature": "4"}), 422, "refused")
    assert "multipart" in refusal(post(files=form(png(PIXELS[0])), data={"x": "y" * 5000}), 422, "refused")
    assert "server.max_body_bytes" in refusal(post(files=form(b"x" * 3000), limits={"max_body_bytes": 2048}), 413, "too_large")
    headers = {"content-type": "multipart/form-data; boundary=b"}
    for content in (b"", b"--b\r\n\r\n", b"nonsense", b"--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n--b--", b"--b--\r\n"):
        refusal(post(content=content, headers=headers), 422, "refused")
    refusal(post(content=b"--b--", headers={"content-type": "multipart/form-data"}), 422, "refused")


def test_a_large_file_of_a_form_is_not_written_to_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def rollover(self: Any) -> None:
        raise AssertionError("spooled")

    monkeypatch.setattr(tempfile.SpooledTemporaryFile, "rollover", rollover)
    noise = np.random.default_rng(2).integers(0, 256, (900, 900, 3), np.uint8)
    file = png(noise)
    assert len(file) > 2 * 2**20
    answer = post(files=form(file), params={"return": "logits"})
    np.testing.assert_allclose(answer.json()["items"][0]["values"], fake_logits(center_crop(noise, 8)[None], 10)[0], rtol=1e-5)


class ZoomedTeacher(FakeTeacher):
    """Its evaluation crop shows the middle half of the image, through a bicubic filter."""

    def __init__(self) -> None:
        super().__init__()
        self._served = self._served.replace(preprocessing=Preprocessing(image_size=8, crop_ratio=0.5, interpolation="bicubic"))


def test_by_default_the_teachers_own_crop_is_cut_and_the_answer_says_so() -> None:
    for params in ({}, {"crop": "teacher"}):
        answer = post(
            content=png(LARGE), headers={"content-type": "image/png"}, params={"return": "logits", **params}, teacher=ZoomedTeacher()
        )
        assert answer.json()["crop"] == "teacher"
        expected = fake_logits(center_crop(LARGE, 8, 0.5, "bicubic")[None], 10)[0]
        np.testing.assert_allclose(answer.json()["items"][0]["values"], expected, rtol=1e-5)


def test_images_of_the_right_size_are_taken_as_they_are() -> None:
    zoomed = ZoomedTeacher()
    answer = post(
        content=png(PIXELS[0]), headers={"content-type": "image/png"}, params={"return": "logits", "crop": "as-is"}, teacher=zoomed
    )
    assert answer.json()["crop"] == "as-is"
    np.testing.assert_allclose(answer.json()["items"][0]["values"], fake_logits(PIXELS[:1], 10)[0], rtol=1e-5)


def test_as_is_names_both_sizes_of_an_image_that_is_no_crop() -> None:
    answer = post(files=form(png(PIXELS[0]), png(LARGE)), params={"crop": "as-is"})
    assert answer.status_code == 207
    error = answer.json()["items"][1]["error"]
    assert error["code"] == "wrong_size"
    assert "30 x 20" in error["message"]
    assert "8 x 8" in error["message"]
    alone = post(content=png(LARGE), headers={"content-type": "image/png"}, params={"crop": "as-is"})
    assert "30 x 20" in refusal(alone, 422, "wrong_size")


def test_ready_crops_are_as_they_are() -> None:
    headers = {"content-type": CROPS_MEDIA_TYPE, "accept": SOFT_LABELS_MEDIA_TYPE}
    message = decode_soft_labels(post(content=encode_crops(PIXELS), headers=headers).content)
    assert message.header.crop == "as-is"
    answer = post(content=encode_crops(PIXELS), headers=headers, params={"crop": "teacher"})
    assert "crop=teacher" in refusal(answer, 422, "refused")
    refusal(post(content=encode_crops(PIXELS), headers=headers, params={"crop": "center"}), 422, "bad_query")


def test_one_image_too_many_bytes() -> None:
    limits = {"max_image_bytes": 1000}
    body = {"images": [base64.b64encode(file).decode() for file in (png(PIXELS[0]), b"x" * 1001)]}
    answer = post(json=body, limits=limits)
    assert answer.status_code == 207
    assert answer.json()["items"][1]["error"]["code"] == "too_large"
    alone = post(content=b"x" * 1001, headers={"content-type": "image/png"}, limits=limits)
    assert "server.max_image_bytes" in refusal(alone, 413, "too_large")


def test_all_bodies_together_have_a_limit_and_give_their_memory_back() -> None:
    async def scenario() -> tuple[httpx.Response, httpx.Response, httpx.Response]:
        app = create_app(FakeTeacher(delay_s=0.05), ServerSettings(auth="none", max_buffered_bytes=1200))
        arguments: dict[str, Any] = {"content": encode_crops(PIXELS), "headers": {"content-type": CROPS_MEDIA_TYPE}}  # 596 bytes
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as client:
            *_, third = await asyncio.gather(*(client.post(LABELS, **arguments) for _ in range(3)))
            return _[0], third, await client.post(LABELS, **arguments)

    first, third, later = asyncio.run(scenario())
    assert first.status_code == later.status_code == 200
    assert "server.max_buffered_bytes" in refusal(third, 503, "overloaded")
    assert third.headers["retry-after"] == "1"


def test_a_bomb_is_refused_from_its_header(monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(*arguments: Any) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr("distill.decoding._decode_with_pillow", decode)
    bomb = png(np.zeros((8, 8, 3), np.uint8))
    bomb = bomb[:16] + (100_000).to_bytes(4, "big") * 2 + bomb[24:]
    assert "more than 50000000 pixels" in refusal(post(content=bomb, headers={"content-type": "image/png"}), 422, "bad_image")


def test_names_come_in_both_forms() -> None:
    headers = {"content-type": CROPS_MEDIA_TYPE, "accept": SOFT_LABELS_MEDIA_TYPE}
    header = decode_soft_labels(post(content=encode_crops(PIXELS), headers=headers, params={"names": True, "top_k": 2}).content).header
    assert header.class_names == tuple(f"class {k}" for k in range(10))
    item = post(content=encode_crops(PIXELS), headers={"content-type": CROPS_MEDIA_TYPE}, params={"names": True}).json()["items"][0]
    assert item["class_names"] == [f"class {k}" for k in range(10)]
    assert "class_ids" not in item


class ExtremeTeacher(FakeTeacher):
    """Answers what is hard to write as text."""

    async def _infer(self, crops_BHWC: Any, temperature_B1: Any, names: tuple[str, ...]) -> Any:
        row = np.array([3e38, -3e38, 1e-45, -0.0, 1.0, 1234567.8, 0.1, 1 / 3, 16777217, -1e-30], np.float32)
        return dict.fromkeys(names, np.tile(row, (len(crops_BHWC), 1)))


def test_json_keeps_seven_digits_of_any_float() -> None:
    headers = {"content-type": CROPS_MEDIA_TYPE}
    values = post(content=encode_crops(PIXELS), headers=headers, params={"return": "logits"}, teacher=ExtremeTeacher()).json()["items"][2]
    row = np.array([3e38, -3e38, 1e-45, -0.0, 1.0, 1234567.8, 0.1, 1 / 3, 16777217, -1e-30], np.float32).astype(np.float64)
    np.testing.assert_allclose(values["values"], row, rtol=5e-7)


def test_the_lowest_temperature_gives_hard_labels_and_a_lower_one_is_the_clients_fault() -> None:
    arguments: dict[str, Any] = {"content": encode_crops(PIXELS), "headers": {"content-type": CROPS_MEDIA_TYPE}}
    best_B = fake_logits(PIXELS, 10).argmax(axis=1)
    for item, best in zip(post(params={"temperature": 1e-6}, **arguments).json()["items"], best_B, strict=True):
        assert item["values"] == [float(k == best) for k in range(10)]
    logs = post(params={"temperature": 1e-6, "return": "log_probs"}, **arguments).json()["items"]
    assert np.isfinite([item["values"] for item in logs]).all()
    for temperature in ("1e-7", "1e-45", "1e-400", "-0.0", "inf", "nan"):
        refusal(post(params={"temperature": temperature}, **arguments), 422, "bad_query")


def test_two_accept_headers_are_one() -> None:
    headers = [("content-type", CROPS_MEDIA_TYPE), ("accept", "application/json;q=0.5"), ("accept", SOFT_LABELS_MEDIA_TYPE)]
    assert post(content=encode_crops(PIXELS), headers=headers).headers["content-type"] == SOFT_LABELS_MEDIA_TYPE


def test_malformed_forms_write_no_line_into_the_log(caplog: pytest.LogCaptureFixture) -> None:
    headers = {"content-type": "multipart/form-data; boundary=b"}
    for content in (b"--x", b"--b\r\nCon\x00tent", b"--b\rx"):
        refusal(post(content=content, headers=headers), 422, "refused")
    assert [record for record in caplog.records if "multipart" in record.name] == []


@pytest.mark.parametrize("accept", ["text/html", "application/json;q=0"])
def test_an_answer_that_nobody_takes_is_refused_before_the_body_is_read(accept: str) -> None:
    async def unread() -> Any:
        raise AssertionError("read")
        yield b""

    refusal(post(content=unread(), headers={"content-type": "image/png", "accept": accept}), 406, "not_acceptable")


def test_a_long_list_in_json_is_refused_before_it_is_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    def parse(body: bytes) -> None:
        raise AssertionError("parsed")

    monkeypatch.setattr(ImagesRequest, "model_validate_json", parse)
    body = b'{"images":[' + b"1," * 300_000 + b"1]}"
    message = refusal(post(content=body, headers={"content-type": "application/json"}), 413, "too_large")
    assert "1 to 1024 images" in message


def test_one_bad_item_of_a_list_makes_one_error() -> None:
    with pytest.raises(ValidationError) as caught:
        ImagesRequest.model_validate_json('{"images": [1, 2, 3]}')
    assert caught.value.error_count() == 1


def test_images_that_are_decoded_at_once_have_together_no_more_pixels_than_the_largest(monkeypatch: pytest.MonkeyPatch) -> None:
    together, under_way = threading.Barrier(2), []
    peak = 0

    def decode(data: bytes, max_pixels: int) -> Any:
        nonlocal peak
        under_way.append(data)
        peak = max(peak, len(under_way))
        with contextlib.suppress(threading.BrokenBarrierError):
            together.wait(0.3)  # breaks, for all that follow, unless two are here at once
        under_way.pop()
        return PIXELS[0]

    monkeypatch.setattr("teacher_server.intake.decode_image", decode)
    monkeypatch.setattr("teacher_server.decoding_pool.os.cpu_count", lambda: 4)
    assert post(files=form(*[png(PIXELS[0])] * 16), limits={"max_image_pixels": 100}).status_code == 200  # 64 pixels each
    assert peak == 1
    together.reset()
    assert post(files=form(*[png(PIXELS[0])] * 16), limits={"max_image_pixels": 1000}).status_code == 200
    assert peak > 1
