"""The real app over in-process ASGI, with a teacher whose answers a test can compute."""

from __future__ import annotations

import asyncio
import base64
import io
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from distill.errors import RequestRefused, TeacherUnavailable
from distill.wire import CROPS_MEDIA_TYPE, SOFT_LABELS_MEDIA_TYPE, decode_soft_labels, encode_crops
from teacher_server.fake import FakeTeacher, fake_logits
from teacher_server.gateway import create_app
from teacher_server.key_file import new_key
from teacher_server.settings import ServerSettings, TritonSettings

PIXELS = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)
LABELS = "/v1/soft-labels"


def encoded(pixels_HWC: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels_HWC).save(buffer, kind)
    return buffer.getvalue()


def in_json(*files: bytes) -> dict[str, list[str]]:
    return {"images": [base64.b64encode(file).decode() for file in files]}


def ask(*requests: Callable[[httpx.AsyncClient], Any], teacher: FakeTeacher | None = None, **settings: Any) -> list[httpx.Response]:
    """Send requests to a fresh app, one after another."""

    async def scenario() -> list[httpx.Response]:
        transport = httpx.ASGITransport(
            create_app(teacher or FakeTeacher(), ServerSettings(**{"auth": "none", **settings})), raise_app_exceptions=False
        )
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
            return [await request(client) for request in requests]

    return asyncio.run(scenario())


def post(**arguments: Any) -> Callable[[httpx.AsyncClient], Any]:
    return lambda client: client.post(LABELS, **arguments)


def get(path: str) -> Callable[[httpx.AsyncClient], Any]:
    return lambda client: client.get(path)


def post_png(**params: Any) -> Callable[[httpx.AsyncClient], Any]:
    return post(content=encoded(PIXELS[0]), headers={"content-type": "image/png"}, params=params)


def softmax(logits: np.ndarray, temperature: float) -> np.ndarray:
    exp = np.exp(logits.astype(np.float64) / temperature)
    return exp / exp.sum(axis=-1, keepdims=True)


def error_of(answer: httpx.Response) -> tuple[int, str, str]:
    body = answer.json()
    assert set(body) == {"error"}
    assert {"code", "message"} <= set(body["error"]) <= {"code", "message", "retry_after_s", "items"}
    assert ("retry_after_s" in body["error"]) == (answer.status_code in (429, 503)) == ("retry-after" in answer.headers)
    return answer.status_code, body["error"]["code"], body["error"]["message"]


def test_one_png_gets_its_soft_labels() -> None:
    (answer,) = ask(post_png(temperature=4))
    assert answer.status_code == 200
    body = answer.json()
    assert body["model"] == "fake"
    assert body["version"] == 1
    assert body["fingerprint"] == "f" * 64
    assert body["temperature"] == 4
    assert body["kind"] == "probs"
    (item,) = body["items"]
    assert set(item) == {"values"}
    np.testing.assert_allclose(item["values"], softmax(fake_logits(PIXELS[:1], 10)[0], 4), rtol=1e-5)


@pytest.mark.parametrize(("kind", "media_type"), [("JPEG", "image/jpeg"), ("WEBP", "image/webp")])
def test_other_formats_are_decoded(kind: str, media_type: str) -> None:
    grey = np.full((20, 30, 3), 100, np.uint8)  # one colour survives a lossy format
    (answer,) = ask(post(content=encoded(grey, kind), headers={"content-type": media_type}, params={"return": "logits"}))
    expected = fake_logits(np.full((1, 8, 8, 3), 100, np.uint8), 10)[0]
    np.testing.assert_allclose(answer.json()["items"][0]["values"], expected, atol=0.1)


def test_logits_and_log_probs_and_top_k_and_names() -> None:
    logits, log_probs, top = ask(
        post_png(**{"return": "logits"}), post_png(**{"return": "log_probs"}, temperature=2), post_png(top_k=3, names=True)
    )
    truth_K = fake_logits(PIXELS[:1], 10)[0]
    np.testing.assert_allclose(logits.json()["items"][0]["values"], truth_K, rtol=1e-5)
    np.testing.assert_allclose(log_probs.json()["items"][0]["values"], np.log(softmax(truth_K, 2)), rtol=1e-5)
    item = top.json()["items"][0]
    best = sorted(range(10), key=lambda k: -truth_K[k])[:3]
    assert item["class_ids"] == best
    assert item["class_names"] == [f"class {k}" for k in best]
    np.testing.assert_allclose(item["values"], softmax(truth_K, 1)[best], rtol=1e-5)


def test_log_probs_stay_finite_where_probs_are_zero() -> None:
    (answer,) = ask(post_png(**{"return": "log_probs"}, temperature=0.01))
    values = answer.json()["items"][0]["values"]
    assert min(values) < -200
    assert np.isfinite(values).all()


def test_a_bad_image_does_not_spoil_the_others() -> None:
    teacher = FakeTeacher()
    request = in_json(encoded(PIXELS[0]), b"not an image", encoded(PIXELS[2]))
    request["images"].append("***")
    (answer,) = ask(post(json=request, params={"return": "logits"}), teacher=teacher)
    assert answer.status_code == 207, "whoever looks at the status alone must see that some labels are missing"
    items = answer.json()["items"]
    assert [item.get("error", {}).get("code") for item in items] == [None, "bad_image", None, "bad_base64"]
    truth_BK = fake_logits(PIXELS, 10)
    np.testing.assert_allclose(items[0]["values"], truth_BK[0], rtol=1e-5)
    np.testing.assert_allclose(items[2]["values"], truth_BK[2], rtol=1e-5)
    assert teacher.calls == [2]


def test_ready_crops_in_and_binary_out() -> None:
    headers = {"content-type": CROPS_MEDIA_TYPE, "accept": SOFT_LABELS_MEDIA_TYPE}
    dense, top = ask(
        post(content=encode_crops(PIXELS), headers=headers, params={"return": "logits"}),
        post(content=encode_crops(PIXELS), headers=headers, params={"top_k": 2, "temperature": 2}),
    )
    assert dense.headers["content-type"] == SOFT_LABELS_MEDIA_TYPE
    truth_BK = fake_logits(PIXELS, 10)
    np.testing.assert_array_equal(decode_soft_labels(dense.content).values_BR, truth_BK)
    message = decode_soft_labels(top.content)
    assert message.class_ids_BR is not None
    assert message.header.temperature == 2
    np.testing.assert_array_equal(message.class_ids_BR[:, 0], truth_BK.argmax(axis=1))
    np.testing.assert_allclose(message.values_BR[:, 0], softmax(truth_BK, 2).max(axis=1), rtol=1e-5)


def test_binary_answers_mark_failed_images_with_nan() -> None:
    (answer,) = ask(post(json=in_json(b"no image", encoded(PIXELS[1])), headers={"accept": SOFT_LABELS_MEDIA_TYPE}))
    assert answer.status_code == 207
    message = decode_soft_labels(answer.content)
    assert np.isnan(message.values_BR[0]).all()
    assert np.isfinite(message.values_BR[1]).all()
    assert [(error.index, error.code) for error in message.header.errors] == [(0, "bad_image")]


def test_bad_requests_say_what_is_wrong() -> None:
    png = {"content-type": "image/png"}
    cases = [
        (post(content=b"text", headers={"content-type": "text/plain"}), 415, "unsupported_media_type", "text/plain"),
        (post(content=b"text"), 415, "unsupported_media_type", "image/png"),
        (post(content=b"", headers=png), 422, "bad_image", "empty"),
        (post(content=encoded(PIXELS[0])[:60], headers=png), 422, "bad_image", "truncated"),
        (post(content=b"{", headers={"content-type": "application/json"}), 422, "refused", "JSON"),
        (post(json={"images": []}), 422, "refused", "images"),
        (post(json={"pictures": ["x"]}), 422, "refused", "images: Field required"),
        (post(json={"images": ["***"]}), 422, "refused", "none of the 1 images"),
        (post(json=in_json(*[encoded(PIXELS[0])] * 5)), 413, "too_large", "1 to 4 images"),
        (post(content=encode_crops(PIXELS[[0] * 5]), headers={"content-type": CROPS_MEDIA_TYPE}), 413, "too_large", "1 to 4 images"),
        (post(content=b"DCRP", headers={"content-type": CROPS_MEDIA_TYPE}), 422, "refused", "shorter"),
        (post(content=encode_crops(PIXELS[:0]), headers={"content-type": CROPS_MEDIA_TYPE}), 422, "refused", "got 0"),
        (post(content=encode_crops(PIXELS[:, :4]), headers={"content-type": CROPS_MEDIA_TYPE}), 422, "refused", "[B,8,8,3]"),
        (post_png(temperature=0), 422, "bad_query", "temperature"),
        (post_png(temperature=101), 422, "bad_query", "temperature"),
        (post_png(temperature="nan"), 422, "bad_query", "temperature"),
        (post_png(temprature=2), 422, "bad_query", "temprature"),
        (post_png(**{"return": "labels"}), 422, "bad_query", "return"),
        (post_png(top_k=11), 422, "refused", "top_k 11 is over the 10 classes"),
        (post_png(model="other"), 404, "not_found", "'other'"),
        (get("/v1/models/other"), 404, "not_found", "'other'"),
        (get("/nothing"), 404, "not_found", "/nothing"),
        (get(LABELS), 405, "method_not_allowed", LABELS),
    ]
    answers = ask(*(request for request, *_ in cases), max_batch=4)
    for answer, (_, status, code, words) in zip(answers, cases, strict=True):
        assert error_of(answer)[:2] == (status, code), answer.text
        assert words in error_of(answer)[2]


def test_large_images_are_refused_before_they_are_decoded() -> None:
    (answer,) = ask(post(content=encoded(np.zeros((50, 50, 3), np.uint8)), headers={"content-type": "image/png"}), max_image_pixels=2499)
    assert error_of(answer)[:2] == (422, "bad_image")


def test_a_body_over_the_limit_is_not_read_to_its_end() -> None:
    sent = 0

    async def endless() -> Any:
        nonlocal sent
        while sent < 1000:
            sent += 1
            yield b"x" * 512

    headers = {"content-type": "image/png"}
    streamed, announced = ask(post(content=endless(), headers=headers), post(content=b"x" * 2048, headers=headers), max_body_bytes=1024)
    assert error_of(streamed)[:2] == (413, "too_large")
    assert error_of(announced)[:2] == (413, "too_large")


def test_a_teacher_that_is_away_is_503_and_back_is_200() -> None:
    away, back = ask(post_png(), post_png(), teacher=FakeTeacher(unavailable_calls=1))
    assert error_of(away)[:2] == (503, "teacher_unavailable")
    assert int(away.headers["retry-after"]) >= 1
    assert back.status_code == 200


def test_a_nan_from_the_teacher_is_no_label() -> None:
    (answer,) = ask(post_png(), teacher=FakeTeacher(answer_nan=True))
    assert error_of(answer)[:2] == (502, "bad_teacher_answer")


def test_a_slow_teacher_is_504_and_its_work_is_cancelled() -> None:
    teacher = FakeTeacher(delay_s=3600)
    (answer,) = ask(post_png(), teacher=teacher, triton=TritonSettings(request_timeout_s=0.05))
    assert error_of(answer)[:2] == (504, "deadline")
    assert teacher.cancelled == 1


class NoticingTeacher(FakeTeacher):
    """Says when a question has reached it."""

    asked: asyncio.Event

    async def _infer(self, *arguments: Any) -> Any:
        self.asked.set()
        return await super()._infer(*arguments)


def test_a_client_that_hangs_up_cancels_its_work() -> None:
    teacher = NoticingTeacher(delay_s=3600)
    body = encoded(PIXELS[0])

    async def scenario() -> None:
        teacher.asked = asyncio.Event()
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> dict[str, Any]:
            if messages:
                return messages.pop()
            await teacher.asked.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            return None

        scope = {"type": "http", "method": "POST", "path": LABELS, "headers": [(b"content-type", b"image/png")], "query_string": b""}
        await asyncio.wait_for(create_app(teacher, ServerSettings(auth="none"))(scope, receive, send), 10)

    asyncio.run(scenario())
    assert teacher.cancelled == 1


def test_an_unforeseen_error_hides_its_inside() -> None:
    class Broken(FakeTeacher):
        async def info(self) -> Any:
            raise RuntimeError("secret")

    answer, metrics = ask(get("/v1/models"), get("/metrics"), teacher=Broken())
    assert error_of(answer)[:2] == (500, "internal")
    assert "secret" not in answer.text
    assert 'distill_gateway_refusals_total{code="internal",tenant="anybody"} 1.0' in metrics.text


def test_models_and_health() -> None:
    teacher = FakeTeacher(num_classes=3)
    models, model, alive, ready = ask(*map(get, ("/v1/models", "/v1/models/fake", "/healthz", "/readyz")), teacher=teacher)
    card = model.json()
    assert models.json() == {"models": [card]}
    assert card["class_names"] == ["class 0", "class 1", "class 2"]
    assert card["preprocessing"]["image_size"] == 8
    assert alive.status_code == ready.status_code == 200
    away, alive = ask(*map(get, ("/readyz", "/healthz")), teacher=FakeTeacher(unavailable_calls=9))
    assert error_of(away)[:2] == (503, "teacher_unavailable")
    assert alive.status_code == 200


def test_metrics_count_requests_and_images() -> None:
    *_, metrics = ask(
        post_png(),
        post_png(temperature=0),
        post(json=in_json(encoded(PIXELS[0]), b"bad")),
        get("/no/such/path"),
        get("/metrics"),
    )
    lines = dict(line.rsplit(" ", 1) for line in metrics.text.splitlines() if not line.startswith("#"))
    assert lines['distill_gateway_requests_total{route="/v1/soft-labels",status="200"}'] == "1.0"
    assert lines['distill_gateway_requests_total{route="/v1/soft-labels",status="207"}'] == "1.0"
    assert lines['distill_gateway_requests_total{route="/v1/soft-labels",status="422"}'] == "1.0"
    assert lines['distill_gateway_requests_total{route="other",status="404"}'] == "1.0"
    assert lines['distill_gateway_images_total{outcome="labelled",tenant="anybody"}'] == "2.0"
    assert lines['distill_gateway_images_total{outcome="rejected",tenant="anybody"}'] == "1.0"
    assert lines['distill_gateway_refusals_total{code="bad_query",tenant="anybody"}'] == "1.0"
    assert lines['distill_gateway_batch_images_bucket{le="1.0"}'] == "1.0"
    assert lines['distill_gateway_batch_images_bucket{le="2.0"}'] == "2.0"
    for step in ("decode", "queue_wait", "teacher"):
        assert lines[f"distill_gateway_{step}_seconds_count"] == "2.0"
    for gauge in ("queue_images", "queue_requests", "teacher_images"):
        assert lines[f"distill_gateway_{gauge}"] == "0.0"
    assert lines['distill_gateway_latency_seconds_count{route="/v1/soft-labels"}'] == "3.0"
    assert lines["distill_gateway_in_flight"] == "1.0"  # the request for the metrics


def test_the_openapi_document_describes_bodies_and_errors() -> None:
    (answer,) = ask(get("/openapi.json"))
    operation = answer.json()["paths"][LABELS]["post"]
    images = {"image/jpeg", "image/png", "image/webp"}
    assert set(operation["requestBody"]["content"]) == images | {CROPS_MEDIA_TYPE, "application/json", "multipart/form-data"}
    failures = {"401", "403", "404", "406", "408", "413", "415", "422", "429", "500", "502", "503", "504"}
    assert set(operation["responses"]) == failures | {"200", "207"}
    for status in failures:
        schema = operation["responses"][status]["content"]["application/json"]["schema"]
        assert schema["$ref"].endswith("/ErrorBody")
        assert ("Retry-After" in operation["responses"][status].get("headers", {})) == (status in ("429", "503"))
    for status in ("200", "207"):
        assert set(operation["responses"][status]["content"]) == {"application/json", SOFT_LABELS_MEDIA_TYPE}
    assert {parameter["name"] for parameter in operation["parameters"]} == {"temperature", "top_k", "return", "names", "model", "crop"}
    assert not operation.get("security"), "without keys the document asks for none"
    assert "Needs an API key" not in ask(get("/docs"))[0].text


def test_the_gateway_process_has_no_torch() -> None:
    code = "import sys, teacher_server.gateway, teacher_server.serve, teacher_server.triton; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_the_openapi_document_asks_for_keys_where_the_gateway_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTILL_API_KEYS", new_key("alice")[1].as_text())
    paths, docs = ask(get("/openapi.json"), get("/docs"), auth="keys")
    assert {"bearer": []} in paths.json()["paths"][LABELS]["post"]["security"]
    assert paths.json()["paths"]["/healthz"]["get"]["security"] == []
    assert "Needs an API key" in docs.text


def test_images_of_a_request_without_one_usable_image_are_counted_as_rejected() -> None:
    *_, metrics = ask(post(json=in_json(b"bad", b"worse")), post(content=b"bad", headers={"content-type": "image/png"}), get("/metrics"))
    lines = dict(line.rsplit(" ", 1) for line in metrics.text.splitlines() if not line.startswith("#"))
    assert lines['distill_gateway_images_total{outcome="rejected",tenant="anybody"}'] == "3.0"
    assert lines["distill_gateway_batch_images_sum"] == "3.0"


def test_a_parameter_that_is_there_twice_is_refused() -> None:
    png = {"content": encoded(PIXELS[0]), "headers": {"content-type": "image/png"}}
    twice, once = ask(
        lambda client: client.post(f"{LABELS}?temperature=1&temperature=2", **png),
        lambda client: client.post(f"{LABELS}?temperature=1", **png),
    )
    assert error_of(twice)[:2] == (422, "bad_query")
    assert "temperature" in error_of(twice)[2]
    assert once.status_code == 200


class RefusingTeacher(FakeTeacher):
    """Refuses what the gateway has checked, as a Triton does whose calls are restricted."""

    async def _infer(self, *arguments: Any) -> Any:
        raise RequestRefused("model 'x' at 10.1.2.3:8001 restricts this call to holders of a key")


class NoTeacher(FakeTeacher):
    """Another model than a teacher is served."""

    async def _load_info(self) -> Any:
        raise RequestRefused("model 'x' at 10.1.2.3:8001 is no teacher of ours")


class AwayTeacher(FakeTeacher):
    """Not there."""

    async def _load_info(self) -> Any:
        raise TeacherUnavailable("model 'x' at 10.1.2.3:8001 does not answer: ipv4:10.1.2.3:8001")


@pytest.mark.parametrize(("teacher", "status"), [(RefusingTeacher, 502), (NoTeacher, 502), (AwayTeacher, 503)])
def test_what_the_teacher_refuses_is_not_the_clients_fault_and_its_address_is_for_the_log(
    teacher: type[FakeTeacher], status: int, caplog: pytest.LogCaptureFixture
) -> None:
    for answer in ask(post_png(), post_png(), teacher=teacher()):
        assert error_of(answer)[0] == status
        assert "10.1.2.3" not in answer.text
    assert caplog.text.count("at 10.1.2.3:8001") == 1, "said, but not for every request"
