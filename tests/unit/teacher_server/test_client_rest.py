"""The REST client over scripted transports: when it asks again and when not, what each failure is, and in which order labels come back."""

from __future__ import annotations

import asyncio
import email.utils
import ssl
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import numpy as np
import pytest

from distill.errors import DistillError, RequestRefused, TeacherAnswerError, TeacherChanged, TeacherUnavailable
from distill.teacher_info import Preprocessing, TeacherInfo
from distill.wire import SoftLabelsHeader, SoftLabelsMessage, decode_crops, encode_soft_labels
from teacher_server.async_client import AsyncTeacherClient, open_async_client
from teacher_server.fake import fake_logits
from teacher_server.rest import RestTeacher
from teacher_server.retries import Patience, RetryPolicy

CROPS = np.random.default_rng(0).integers(0, 256, (10, 8, 8, 3), np.uint8)
INFO = TeacherInfo(
    name="fake",
    version=3,
    fingerprint="f" * 64,
    class_names=tuple("abcde"),
    preprocessing=Preprocessing(image_size=8),
    default_temperature=2.0,
)
Handler = Callable[[httpx.Request], Awaitable[httpx.Response]]


class FakeTime:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.sleeps: list[float] = []

    async def sleep(self, seconds: float) -> None:
        self.sleeps.append(seconds)
        self.now += seconds


def labels(request: httpx.Request, **changes: Any) -> httpx.Response:
    """The right answer to a request with crops, by a teacher that may be changed."""
    crops = decode_crops(request.content)
    kind = request.url.params["return"]
    temperature = float(request.url.params.get("temperature", 1))
    values = fake_logits(crops, 5)
    if kind == "probs":
        values = softmax(values, temperature)
    fields = {"model": "fake", "version": 3, "fingerprint": "f" * 64, "temperature": temperature, "kind": kind, "num_images": len(crops)}
    header = SoftLabelsHeader(**{**fields, "num_classes": 5, **changes})
    return httpx.Response(200, content=encode_soft_labels(SoftLabelsMessage(header, values)))


def softmax(logits_BK: np.ndarray, temperature: Any) -> np.ndarray:
    exp_BK = np.exp(logits_BK.astype(np.float64) / temperature)
    return (exp_BK / exp_BK.sum(axis=1, keepdims=True)).astype(np.float32)


def refusal(status: int, code: str, headers: dict[str, str] | None = None, **more: Any) -> httpx.Response:
    return httpx.Response(status, json={"error": {"code": code, "message": "because", **more}}, headers=headers)


class Script:
    """Answers questions for labels one after another (then rightly), and notes them. An exception is raised."""

    def __init__(self, *answers: httpx.Response | Exception) -> None:
        self.answers = list(answers)
        self.requests: list[httpx.Request] = []
        self.info = INFO

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.method == "GET":
            return httpx.Response(200, json={"models": [self.info.model_dump(mode="json")]})
        self.requests.append(request)
        answer = self.answers.pop(0) if self.answers else labels(request)
        if isinstance(answer, Exception):
            raise answer
        return answer


def teacher_over(handler: Handler, time: FakeTime | None = None, *, timeout_s: float = 30.0, **options: Any) -> RestTeacher:
    time = time or FakeTime()
    policy = options.pop("retry", RetryPolicy())
    patience = Patience(policy, timeout_s, clock=lambda: time.now, sleep=time.sleep, random_share=lambda: 0.5)
    return RestTeacher("http://gateway", transport=httpx.MockTransport(handler), patience=patience, **options)


def ask(handler: Handler, time: FakeTime | None = None, **options: Any) -> np.ndarray:
    async def scenario() -> np.ndarray:
        teacher = teacher_over(handler, time, **options)
        try:
            return await teacher.logits(CROPS)
        finally:
            await teacher.close()

    return asyncio.run(scenario())


def test_503_is_asked_again_after_retry_after_and_jitter() -> None:
    script, time = (
        Script(refusal(503, "teacher_unavailable", {"Retry-After": "7"}), refusal(429, "queue_full", {"Retry-After": "2"})),
        FakeTime(),
    )
    np.testing.assert_array_equal(ask(script, time), fake_logits(CROPS, 5))
    assert time.sleeps == [7 + 0.5 * 0.1, 2 + 0.5 * 0.2]
    assert len({request.content for request in script.requests}) == 1


def test_the_body_says_finer_than_the_header_when_to_come_back() -> None:
    script, time = Script(refusal(429, "too_many_images", {"Retry-After": "1"}, retry_after_s=0.25)), FakeTime()
    ask(script, time)
    assert time.sleeps == [0.25 + 0.05]


@pytest.mark.parametrize("header", ["Thu, 01 Jan 2015 00:00:00 GMT", "soon", ""])
def test_a_retry_after_of_the_past_or_without_a_meaning_is_no_wait(header: str) -> None:
    time = FakeTime()
    ask(Script(refusal(503, "x", {"Retry-After": header})), time)
    assert time.sleeps == [0.05]


def test_a_retry_after_beyond_the_budget_ends_the_call_at_once() -> None:
    date = email.utils.formatdate(4e9, usegmt=True)
    for header in ("60", date):
        script, time = Script(refusal(503, "teacher_unavailable", {"Retry-After": header})), FakeTime()
        with pytest.raises(TeacherUnavailable, match=r"because; given up after 1 attempt \(timeout_s is 30, which asks for"):
            ask(script, time)
        assert time.sleeps == []


def test_a_broken_connection_is_asked_again_with_growing_waits() -> None:
    script, time = (
        Script(httpx.ConnectError("refused"), httpx.ReadError(""), httpx.RemoteProtocolError("cut"), httpx.ConnectTimeout("")),
        FakeTime(),
    )
    np.testing.assert_array_equal(ask(script, time), fake_logits(CROPS, 5))
    assert time.sleeps == pytest.approx([0.05, 0.1, 0.2, 0.4])


@pytest.mark.parametrize("status", [400, 401, 403, 404, 405, 413, 415, 422])
def test_a_refused_request_is_never_asked_again(status: int) -> None:
    script, time = Script(refusal(status, "some_code")), FakeTime()

    async def one_crop() -> None:
        teacher = teacher_over(script, time)
        with pytest.raises(RequestRefused, match=f"{status} some_code: because"):
            await teacher.logits(CROPS[:1])
        await teacher.close()

    asyncio.run(one_crop())
    assert len(script.requests) == 1
    assert time.sleeps == []


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (lambda: refusal(502, "bad_teacher_answer"), TeacherAnswerError),
        (lambda: httpx.Response(502, html="<h1>Bad gateway</h1>"), TeacherUnavailable),
        (lambda: refusal(504, "deadline"), TeacherUnavailable),
    ],
)
def test_502_and_504_are_asked_again_once(answer: Callable[[], httpx.Response], kind: type[DistillError]) -> None:
    np.testing.assert_array_equal(ask(Script(answer())), fake_logits(CROPS, 5))
    script = Script(answer(), answer(), answer())
    with pytest.raises(kind) as caught:
        ask(script)
    assert type(caught.value) is kind
    assert len(script.requests) == 2


def test_500_is_final() -> None:
    script = Script(refusal(500, "internal"))
    with pytest.raises(TeacherAnswerError, match="500 internal"):
        ask(script)
    assert len(script.requests) == 1


def test_the_budget_ends_the_asking() -> None:
    script, time = Script(*[refusal(503, "teacher_unavailable")] * 100), FakeTime()
    with pytest.raises(TeacherUnavailable, match=r"503 teacher_unavailable: because; given up after \d+ attempts \(timeout_s is 10\)"):
        ask(script, time, timeout_s=10)
    assert 5 < len(script.requests) < 100
    assert 7 < time.now - 1000 < 10, "waits as long as it may and no longer"


def test_the_policy_ends_the_asking() -> None:
    script = Script(*[httpx.ConnectError("refused")] * 9)
    with pytest.raises(TeacherUnavailable, match=r"ConnectError refused; given up after 2 attempts$"):
        ask(script, retry=RetryPolicy(max_attempts=2))
    assert len(script.requests) == 2


def test_a_gateway_that_does_not_answer_is_left_when_the_time_is_over() -> None:
    cancelled = []

    async def silent(request: httpx.Request) -> httpx.Response:
        if request.method == "GET":
            return httpx.Response(200, json={"models": [INFO.model_dump(mode="json")]})
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(request)
            raise
        raise AssertionError

    with pytest.raises(TeacherUnavailable, match=r"gave no answer within 0\.05 s"):
        ask(silent, timeout_s=0.05)
    assert len(cancelled) == 1


def test_a_certificate_that_does_not_verify_is_no_question_of_time() -> None:
    error = httpx.ConnectError("certificate")
    error.__cause__ = ssl.SSLCertVerificationError("self-signed certificate")
    script = Script(error)
    with pytest.raises(RequestRefused, match="certificate"):
        ask(script)
    assert len(script.requests) == 1


def test_a_large_batch_goes_in_parts_several_at_once_and_comes_back_in_order() -> None:
    sizes: list[int] = []
    under_way, most = 0, 0

    async def later_parts_answer_first(request: httpx.Request) -> httpx.Response:
        nonlocal under_way, most
        if request.method == "GET":
            return httpx.Response(200, json={"models": [INFO.model_dump(mode="json")]})
        sizes.append(len(decode_crops(request.content)))
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0.01 / len(sizes))
        under_way -= 1
        return labels(request)

    async def scenario() -> np.ndarray:
        teacher = teacher_over(later_parts_answer_first, max_in_flight=3)
        teacher._message_bytes = 2 * CROPS[0].nbytes
        return await teacher.logits(CROPS)

    logits_BK = asyncio.run(scenario())
    np.testing.assert_array_equal(logits_BK, fake_logits(CROPS, 5))
    logits_BK[:] = 0  # belongs to the caller
    assert sizes == [2] * 5
    assert most == 3


def test_one_failed_part_fails_the_call_and_cancels_the_others() -> None:
    cancelled = 0

    async def refuse_the_second(request: httpx.Request) -> httpx.Response:
        nonlocal cancelled
        if request.method == "GET":
            return httpx.Response(200, json={"models": [INFO.model_dump(mode="json")]})
        if np.array_equal(decode_crops(request.content), CROPS[2:4]):
            return refusal(422, "refused")
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled += 1
            raise
        raise AssertionError

    async def scenario() -> None:
        teacher = teacher_over(refuse_the_second)
        teacher._message_bytes = 2 * CROPS[0].nbytes
        with pytest.raises(RequestRefused):
            await teacher.logits(CROPS)
        assert cancelled == 4

    asyncio.run(scenario())


def test_a_gateway_that_takes_less_gets_smaller_requests_from_then_on() -> None:
    refused: list[int] = []

    async def small(request: httpx.Request) -> httpx.Response:
        if request.method == "GET":
            return httpx.Response(200, json={"models": [INFO.model_dump(mode="json")]})
        if len(request.content) > 3 * CROPS[0].nbytes + 100:
            refused.append(len(decode_crops(request.content)))
            return httpx.Response(413, html="a proxy says so")
        return labels(request)

    async def scenario() -> None:
        teacher = teacher_over(small)
        for _ in range(2):
            np.testing.assert_array_equal(await teacher.logits(CROPS), fake_logits(CROPS, 5))
        assert refused == [10, 5, 5]

    asyncio.run(scenario())


def test_labels_of_two_teachers_never_mix() -> None:
    class Swapped(Script):
        """From the third question on, another teacher answers."""

        async def __call__(self, request: httpx.Request) -> httpx.Response:
            if request.method == "GET":
                return await super().__call__(request)
            self.requests.append(request)
            if len(self.requests) < 3:
                return labels(request)
            self.info = INFO.replace(fingerprint="e" * 64, version=4)
            return labels(request, fingerprint="e" * 64, version=4)

    async def scenario(fingerprint: str | None) -> int:
        script = Swapped()
        teacher = teacher_over(script)
        teacher._message_bytes = 2 * CROPS[0].nbytes
        try:
            np.testing.assert_array_equal(await teacher.logits(CROPS, fingerprint=fingerprint), fake_logits(CROPS, 5))
        finally:
            assert (await teacher.info()).version == 4
        return len(script.requests)

    assert asyncio.run(scenario(None)) == 5 + 5, "the whole batch is asked of the new teacher"
    with pytest.raises(TeacherChanged):
        asyncio.run(scenario("f" * 64))


def test_temperatures_one_goes_to_the_gateway_and_several_are_applied_here() -> None:
    script = Script()

    async def scenario() -> None:
        client = AsyncTeacherClient(teacher_over(script))
        one = await client.soft_labels(CROPS, 0.1)
        own = await client.soft_labels(CROPS)
        np.testing.assert_array_equal(one, softmax(fake_logits(CROPS, 5), np.float64(np.float32(0.1))))
        np.testing.assert_array_equal(own, softmax(fake_logits(CROPS, 5), 2))
        mixed_B = np.linspace(0.5, 4, 10).astype(np.float32)
        for given in (mixed_B, mixed_B[:, None]):
            np.testing.assert_allclose(await client.soft_labels(CROPS, given), softmax(fake_logits(CROPS, 5), mixed_B[:, None]), rtol=1e-6)
        assert [request.url.params["return"] for request in script.requests] == ["probs", "probs", "logits", "logits"]
        assert np.float32(script.requests[0].url.params["temperature"]) == np.float32(0.1)
        await client.close()

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("changes", "content"),
    [
        ({"kind": "probs"}, None),
        ({"errors": ({"index": 0, "code": "bad", "message": "bad"},)}, None),
        ({}, b"{}"),
        ({}, b"DSLB\x01\x00\x00\x00\x04\x00\x00\x00null"),
    ],
)
def test_an_answer_of_another_form_is_no_label(changes: dict[str, Any], content: bytes | None) -> None:
    async def wrong(request: httpx.Request) -> httpx.Response:
        if request.method == "GET":
            return httpx.Response(200, json={"models": [INFO.model_dump(mode="json")]})
        return labels(request, **changes) if content is None else httpx.Response(200, content=content)

    with pytest.raises(TeacherAnswerError):
        ask(wrong)


@pytest.mark.parametrize("models", [[], [INFO, INFO.replace(name="other")]])
def test_a_gateway_with_several_models_wants_to_know_which(models: list[TeacherInfo]) -> None:
    async def list_them(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, json={"models": [info.model_dump(mode="json") for info in models]})

    with pytest.raises(RequestRefused, match=f"serves {len(models)} models.*model="):
        ask(list_them)


def test_something_else_than_a_gateway_is_told_apart() -> None:
    async def shop(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, html="<h1>Shop</h1>")

    with pytest.raises(TeacherAnswerError, match="not answer /v1/models like a gateway"):
        ask(shop)


def test_a_later_gateway_may_say_more_of_its_model() -> None:
    async def verbose(request: httpx.Request) -> httpx.Response:
        if request.method == "GET":
            assert request.url.path == "/v1/models/fake"
            return httpx.Response(200, json={**INFO.model_dump(mode="json"), "news": 1})
        assert request.url.params["model"] == "fake"
        return labels(request)

    np.testing.assert_array_equal(ask(verbose, model="fake"), fake_logits(CROPS, 5))


def test_the_key_travels_in_its_header_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    async def strict(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers.get("authorization"))
        assert "secret" not in str(request.url)
        return refusal(401, "unauthorized")

    with pytest.raises(RequestRefused, match="401 unauthorized") as caught:
        ask(strict, api_key="secret-1")
    assert "secret" not in str(caught.value)
    with pytest.raises(RequestRefused, match="unauthorized"):
        ask(strict)
    assert seen == ["Bearer secret-1", None]
    with pytest.raises(RequestRefused, match="API key") as caught:
        RestTeacher("http://gateway", api_key="secret\nX: 1")
    assert "secret" not in str(caught.value)
    monkeypatch.setenv("DISTILL_API_KEY", "secret-2")
    for given, sent in ((None, "secret-2"), ("secret-3", "secret-3")):
        client = open_async_client("http://gateway", api_key=given)
        assert isinstance(client.backend, RestTeacher)
        assert {http.headers["authorization"] for http in client.backend._clients} == {f"Bearer {sent}"}
        asyncio.run(client.close())


def test_ready_asks_once() -> None:
    script, time = Script(httpx.ConnectError("refused")), FakeTime()

    async def scenario() -> None:
        client = AsyncTeacherClient(teacher_over(script, time))
        assert not await client.ready()
        assert await client.ready()
        assert time.sleeps == []
        await client.close()

    asyncio.run(scenario())


def test_a_gateway_that_stands_still_is_not_ready() -> None:
    async def silent(request: httpx.Request) -> httpx.Response:
        await asyncio.Event().wait()
        raise AssertionError

    assert asyncio.run(teacher_over(silent, timeout_s=0.05).ready()) is False


@pytest.mark.parametrize(
    "url",
    [
        "gateway:8080",
        "ftp://h/x",
        "http://",
        "http://h/?a=b",
        "http://u:p@h/",
        "grpc://h:1",
        "grpc://h/m",
        "grpc+shm://h:1/a/b",
        "http://[::1",
        "http://h:port/",
        "grpc://h:99999/m",
    ],
)
def test_a_url_that_leads_nowhere_is_refused_when_it_is_given(url: str) -> None:
    with pytest.raises(RequestRefused):
        open_async_client(url)


@pytest.mark.parametrize(
    "options",
    [{"timeout_s": 0}, {"timeout_s": float("nan")}, {"timeout_s": float("inf")}, {"max_in_flight": 0}, {"api_key": ""}],
)
def test_an_option_without_a_meaning_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(RequestRefused):
        open_async_client("http://h", **options)
    with pytest.raises(RequestRefused):
        open_async_client("grpc://h:1/m", **{"api_key": "k", **options})


@pytest.mark.parametrize("policy", [{"max_attempts": 0}, {"first_wait_s": 0}, {"first_wait_s": 2, "longest_wait_s": 1}])
def test_a_policy_without_a_meaning_is_refused(policy: dict[str, Any]) -> None:
    with pytest.raises(RequestRefused):
        RetryPolicy(**policy)


@pytest.mark.parametrize(
    "arguments",
    [
        {"temperature": 0},
        {"temperature": float("nan")},
        {"temperature": "warm"},
        {"temperature": [1, 2]},
        {"top_k": 0},
        {"top_k": 6},
    ],
)
def test_arguments_that_no_teacher_can_take_are_refused_before_they_travel(arguments: dict[str, Any]) -> None:
    script = Script()

    async def scenario() -> None:
        client = AsyncTeacherClient(teacher_over(script))
        with pytest.raises(RequestRefused):
            await client.soft_labels(CROPS, **arguments)
        with pytest.raises(RequestRefused):
            await client.logits(CROPS[0])
        with pytest.raises(RequestRefused):
            await client.logits(CROPS.astype(np.float32))  # type: ignore[arg-type]
        await client.close()

    asyncio.run(scenario())
    assert script.requests == []


def test_top_k_gives_the_largest_first() -> None:
    async def scenario() -> None:
        client = AsyncTeacherClient(teacher_over(Script()))
        ids_BR, probs_BR = await client.soft_labels(CROPS, 4, top_k=2)
        truth_BK = softmax(fake_logits(CROPS, 5), 4)
        assert (ids_BR.dtype, probs_BR.dtype) == (np.uint32, np.float32)
        for ids_R, probs_R, truth_K in zip(ids_BR, probs_BR, truth_BK, strict=True):
            assert ids_R.tolist() == sorted(range(5), key=lambda k: -truth_K[k])[:2]
            np.testing.assert_array_equal(probs_R, truth_K[ids_R])
        await client.close()

    asyncio.run(scenario())


def test_json_errors_of_any_shape_are_errors_and_no_crash() -> None:
    for body in ("[]", '{"error": 3}', '{"error": {"code": 1}}', '{"error": {"code": "c", "message": "m", "items": [{}]}}', "\x00"):
        with pytest.raises(RequestRefused, match="403"):
            ask(Script(httpx.Response(403, content=body.encode())))


class Renewed(Script):
    """From `change` on another teacher answers, which takes crops of `size` pixels; the gateway refuses all others."""

    size = 8

    def __init__(self) -> None:
        super().__init__()
        self.looks = 0

    def change(self, **changes: Any) -> None:
        self.info = INFO.replace(version=4, fingerprint="e" * 64, **changes)
        self.size = self.info.preprocessing.image_size

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        self.looks += request.method == "GET"
        if request.method == "GET":
            return await super().__call__(request)
        self.requests.append(request)
        crops = decode_crops(request.content)
        if crops.shape[1] != self.size:
            return refusal(422, "refused")
        temperature = float(request.url.params.get("temperature", 1))
        values = fake_logits(crops, self.info.num_classes)
        header = SoftLabelsHeader(
            model="fake",
            version=self.info.version,
            fingerprint=self.info.fingerprint,
            temperature=temperature,
            kind=request.url.params["return"],
            num_images=len(crops),
            num_classes=self.info.num_classes,
        )
        values = softmax(values, temperature) if header.kind == "probs" else values
        return httpx.Response(200, content=encode_soft_labels(SoftLabelsMessage(header, values)))


LARGER = np.random.default_rng(1).integers(0, 256, (3, 12, 12, 3), np.uint8)


def test_a_teacher_of_another_crop_size_is_found_out() -> None:
    async def scenario() -> None:
        for fingerprint in (None, "e" * 64):  # the labels of any teacher are wanted, or the caller knows of the new one before us
            script = Renewed()
            teacher = teacher_over(script)
            await teacher.logits(CROPS)
            script.change(preprocessing=Preprocessing(image_size=12))
            np.testing.assert_array_equal(await teacher.logits(LARGER, fingerprint=fingerprint), fake_logits(LARGER, 5))
            assert (await teacher.info()).version == 4

        script = Renewed()
        teacher = teacher_over(script)
        await teacher.info()
        script.change(preprocessing=Preprocessing(image_size=12))
        with pytest.raises(TeacherChanged, match="serves version 4"):
            await teacher.logits(CROPS, fingerprint="f" * 64)
        with pytest.raises(RequestRefused, match=r"uint8 \[B,12,12,3\]"):
            await teacher.logits(CROPS)

        script = Renewed()
        teacher = teacher_over(script)
        await teacher.info()
        script.change(preprocessing=Preprocessing(image_size=12))
        assert await teacher.ready()

    asyncio.run(scenario())


def test_what_the_teacher_really_refuses_is_looked_up_once_and_a_wrong_key_not_at_all() -> None:
    async def scenario() -> None:
        script = Renewed()
        teacher = teacher_over(script)
        with pytest.raises(RequestRefused, match=r"takes crops of uint8 \[B,8,8,3\]"):
            await teacher.logits(LARGER)
        assert (script.looks, len(script.requests)) == (2, 0)
        for status, looks in ((422, 2), (401, 1), (404, 1)):
            plain = Script(refusal(status, "no"))
            seen: list[str] = []

            async def counted(request: httpx.Request, plain: Script = plain, seen: list[str] = seen) -> httpx.Response:
                seen.append(request.method)
                return await plain(request)

            with pytest.raises(RequestRefused, match=f"{status} no"):
                await teacher_over(counted).logits(CROPS)
            assert seen.count("GET") == looks
            assert seen.count("POST") == 1

    asyncio.run(scenario())


@pytest.mark.parametrize(("before", "after", "top_k"), [("abcde", "abc", 3), ("abcde", "abc", 4), ("abc", "abcde", 4)])
def test_top_k_counts_the_classes_of_the_teacher_that_answers(before: str, after: str, top_k: int) -> None:
    async def scenario() -> Any:
        script = Renewed()
        script.info = INFO.replace(class_names=tuple(before))
        async with AsyncTeacherClient(teacher_over(script)) as client:
            await client.info()
            script.change(class_names=tuple(after))
            return await client.soft_labels(CROPS, 1.0, top_k=top_k)

    if top_k > len(after):
        with pytest.raises(RequestRefused, match="1 to 3"):
            asyncio.run(scenario())
    else:
        assert asyncio.run(scenario()).class_ids_BR.shape == (10, top_k)


def test_the_temperature_is_that_of_the_teacher_that_answers() -> None:
    async def scenario() -> None:
        script = Renewed()
        async with AsyncTeacherClient(teacher_over(script)) as client:
            await client.info()
            script.change(default_temperature=5.0)
            np.testing.assert_allclose(await client.soft_labels(CROPS), softmax(fake_logits(CROPS, 5), 5), rtol=1e-6)
            with pytest.raises(TeacherChanged):
                await client.soft_labels(CROPS, fingerprint="f" * 64)

    asyncio.run(scenario())


@pytest.mark.parametrize("question", ["soft_labels", "top_logits"])
def test_one_budget_is_for_who_it_is_and_for_what_it_says(question: str) -> None:
    time = FakeTime()
    methods: list[str] = []

    async def slow(request: httpx.Request) -> httpx.Response:
        methods.append(request.method)
        if methods.count(request.method) == 1:  # the first question of each kind: eight of the ten seconds
            return refusal(503, "teacher_unavailable", {"Retry-After": "8"})
        info = INFO.replace(top_outputs=2)
        return httpx.Response(200, json={"models": [info.model_dump(mode="json")]}) if request.method == "GET" else labels(request)

    async def scenario() -> None:
        teacher = teacher_over(slow, time, timeout_s=10)
        async with AsyncTeacherClient(teacher) as client:
            with pytest.raises(TeacherUnavailable, match="timeout_s is 10, which asks for 8 s"):
                await (client.soft_labels(CROPS) if question == "soft_labels" else teacher.top_logits(CROPS))

    asyncio.run(scenario())
    assert methods == ["GET", "GET", "POST"]


def too_many(num_images: int) -> httpx.Response:
    message = f"a request holds 1 to 3 images (server.max_batch), got {num_images}"
    return httpx.Response(413, json={"error": {"code": "too_large", "message": message}})


def test_a_gateway_that_takes_fewer_crops_gets_fewer_from_then_on() -> None:
    refused: list[int] = []

    async def few(request: httpx.Request) -> httpx.Response:
        if request.method == "GET":
            return httpx.Response(200, json={"models": [INFO.model_dump(mode="json")]})
        num_images = len(decode_crops(request.content))
        if num_images > 3:
            refused.append(num_images)
            return too_many(num_images)
        return labels(request)

    async def scenario() -> None:
        teacher = teacher_over(few)
        for _ in range(2):
            np.testing.assert_array_equal(await teacher.logits(CROPS), fake_logits(CROPS, 5))
        assert refused == [10, 5, 5]
        assert teacher._message_images == 2
        assert teacher._message_bytes == 4_900_000, "large images were never the matter"

    asyncio.run(scenario())


def test_a_gateway_that_takes_fewer_files_gets_fewer_from_then_on() -> None:
    """However large they are: a limit in bytes, learnt from small files, would not spare small files nor let large ones go together."""
    sent: list[int] = []

    async def few(request: httpx.Request) -> httpx.Response:
        if request.method == "GET":
            return httpx.Response(200, json={"models": [INFO.model_dump(mode="json")]})
        num_images = request.content.count(b'name="images"')
        sent.append(num_images)
        if num_images > 3:
            return too_many(num_images)
        fields = {"model": "fake", "version": 3, "fingerprint": "f" * 64, "temperature": 2, "kind": "probs", "num_classes": 5}
        header = SoftLabelsHeader(**{**fields, "num_images": num_images})
        values = np.full((num_images, 5), 0.2, np.float32)
        return httpx.Response(200, content=encode_soft_labels(SoftLabelsMessage(header, values)))

    async def scenario() -> None:
        teacher = teacher_over(few)
        assert len(await teacher.soft_labels_of([b"small"] * 10)) == 10
        assert sorted(sent) == [2, 2, 3, 3, 5, 5, 10]
        sent.clear()
        assert len(await teacher.soft_labels_of([b"large" * 1000] * 4)) == 4
        assert sent == [2, 2]

    asyncio.run(scenario())


def test_connections_are_spread_over_clients_and_all_are_closed() -> None:
    async def scenario() -> list[bool]:
        teacher = RestTeacher("http://gateway", max_in_flight=20, transport=httpx.MockTransport(lambda request: httpx.Response(503)))
        assert not any(client.is_closed for client in teacher._clients)
        await teacher.close()
        return [client.is_closed for client in teacher._clients]

    assert asyncio.run(scenario()) == [True, True, True]
