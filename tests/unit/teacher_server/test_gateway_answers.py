"""What every answer of the gateway carries and what it keeps to itself: headers, logs, pages, probes, model cards, over in-process ASGI."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from distill.wire import CROPS_MEDIA_TYPE, encode_crops
from teacher_server.fake import FakeTeacher
from teacher_server.gateway import create_app
from teacher_server.key_file import KeyFile, new_key, write_keys
from teacher_server.metrics import GatewayMetrics
from teacher_server.readiness import Readiness
from teacher_server.security import own_hosts
from teacher_server.settings import ServerSettings, TritonSettings

LABELS = "/v1/soft-labels"
PIXELS = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8)


@asynccontextmanager
async def gateway(teacher: FakeTeacher | None = None, **settings: Any) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(teacher or FakeTeacher(), ServerSettings(**{"auth": "none", **settings}))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as client:
        yield client


def run(scenario: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    return asyncio.run(asyncio.wait_for(scenario(), 30))


def error_of(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


class Clock:
    """Seconds that pass when told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class BrokenTeacher(FakeTeacher):
    """Fails with a secret in its message, as a validator's error that quotes what a client sent does."""

    async def info(self) -> Any:
        try:
            raise KeyError("inner-secret")
        except KeyError as error:
            raise RuntimeError("outer-secret") from error


EVERY_ANSWER = [
    ("GET", "/", 200), ("GET", "/docs", 200), ("GET", "/openapi.json", 200), ("GET", "/healthz", 200), ("GET", "/readyz", 200),
    ("GET", "/metrics", 200), ("GET", "/v1/models", 200), ("GET", "/v1/stats", 200), ("POST", LABELS, 415), ("GET", LABELS, 405),
    ("GET", "/nothing", 404), ("GET", "/v1/soft-labels/", 404),
]  # fmt: skip


@pytest.mark.parametrize(("method", "path", "status"), EVERY_ANSWER)
def test_every_answer_carries_the_security_headers(method: str, path: str, status: int) -> None:
    async def scenario() -> httpx.Response:
        async with gateway() as client:
            return await client.request(method, path)

    check_security_headers(run(scenario), status)


def check_security_headers(answer: httpx.Response, status: int) -> None:
    assert answer.status_code == status
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    policy = dict(part.strip().partition(" ")[::2] for part in answer.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["frame-ancestors"] == "'none'"
    if answer.headers["content-type"].startswith("text/html"):
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
        assert policy["img-src"] == "'self' blob: data:"
    else:
        assert answer.headers["cache-control"] == "no-store"


def test_errors_of_every_kind_carry_them_too_and_tell_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "keys.yaml"
    key, entry = new_key("alice")
    write_keys(path, KeyFile(keys=(entry,)))
    image = b"\xff\xd8\xff" + b"PRIVATE-IMAGE" * 10

    async def scenario() -> None:
        headers = {"X-API-Key": key, "content-type": "image/jpeg"}
        for teacher, status in (
            (BrokenTeacher(), 500), (FakeTeacher(answer_nan=True), 502), (FakeTeacher(unavailable_calls=9), 503), (FakeTeacher(), 422),
        ):  # fmt: skip
            async with gateway(teacher, auth="keys", keys_file=str(path)) as client:
                content = encode_crops(PIXELS) if status in (502, 503) else image
                media_type = CROPS_MEDIA_TYPE if status in (502, 503) else "image/jpeg"
                answer = await client.post(LABELS, content=content, headers={**headers, "content-type": media_type})
                check_security_headers(answer, status)
                assert "secret" not in answer.text
                assert "PRIVATE" not in answer.text
                check_security_headers(await client.post(LABELS, content=image, headers={"X-API-Key": key + "x"}), 401)
                bad_json = {"images": ["PRIVATE-IMAGE" * 10, {"PRIVATE-IMAGE": key}]}
                answer = await client.post(LABELS, json=bad_json, headers={"X-API-Key": key})
                assert "PRIVATE" not in answer.text

    with caplog.at_level(logging.DEBUG):
        run(scenario)
    assert "POST /v1/soft-labels failed: RuntimeError at" in caplog.text, "the place of a fault is in the log"
    assert "KeyError" in caplog.text
    for secret in ("outer-secret", "inner-secret", "PRIVATE", key, key.split("_", 2)[2]):
        assert secret not in caplog.text


class PageLinks(HTMLParser):
    """Everything that a page loads or links to, and its inline code."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.inline: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "action", "srcset")]
        self.inline += [name for name, _ in attrs if name.startswith("on") or name == "style"]
        self.inline += [tag] if tag == "style" else []


@pytest.mark.parametrize("path", ["/docs", "/"])
def test_no_page_of_ours_asks_anybody_else(path: str) -> None:
    async def scenario() -> str:
        async with gateway() as client:
            return (await client.get(path)).text

    page = PageLinks()
    page.feed(run(scenario))
    assert page.links
    assert all(re.match(r"(/(?!/)|#|data:|\./|[\w.-]+$|static/)", link) for link in page.links), page.links
    assert page.inline == [], "the policy would refuse it"


def test_the_docs_show_every_route_and_every_error() -> None:
    async def scenario() -> str:
        async with gateway() as client:
            return (await client.get("/docs")).text

    text = run(scenario)
    for words in (f"POST {LABELS}", "GET /v1/models/{name}", "<code>429</code>", "queue_full", "multipart/form-data", "as-is"):
        assert words in text


class CountingTeacher(FakeTeacher):
    """Counts the canaries; answers them as told."""

    canaries = 0
    answer = True

    async def ready(self) -> bool:
        self.canaries += 1
        await asyncio.sleep(0)
        return self.answer


def test_probes_do_not_become_load() -> None:
    async def scenario() -> None:
        clock, teacher = Clock(), CountingTeacher()
        readiness = Readiness(teacher, 10, clock)
        assert await asyncio.gather(*(readiness.ready() for _ in range(20))) == [True] * 20
        assert teacher.canaries == 1
        teacher.answer = False
        clock.now = 0.99
        assert await readiness.ready()
        clock.now = 1.0
        assert not await readiness.ready()
        assert teacher.canaries == 2

    run(scenario)


def test_a_teacher_that_hangs_is_not_ready() -> None:
    async def scenario() -> None:
        async with gateway(FakeTeacher(delay_s=3600), triton=TritonSettings(request_timeout_s=0.02)) as client:
            assert error_of(await client.get("/readyz")) == (503, "teacher_unavailable")

    run(scenario)


def test_a_model_card_shows_the_parity_of_exactly_this_teacher() -> None:
    async def scenario(parity: dict[str, Any]) -> Any:
        app = create_app(FakeTeacher(), ServerSettings(auth="none"), parity)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as client:
            return (await client.get("/v1/models/fake")).json()

    measured = {"max_abs_dlogit": 1e-5, "passed": True}
    card = asyncio.run(scenario({"f" * 64: measured, "e" * 64: {}}))
    assert card["parity"] == measured
    assert card["precision"] == "fp32"
    assert asyncio.run(scenario({"e" * 64: measured}))["parity"] is None


def test_tenants_in_the_metrics_are_bounded() -> None:
    metrics = GatewayMetrics()
    labels = [metrics.tenant_label(f"tenant{i}") for i in range(1000)]
    assert len(set(labels)) == 101
    assert labels[0] == metrics.tenant_label("tenant0") == "tenant0"
    assert labels[-1] == "other"


def test_without_keys_only_the_names_of_this_machine_and_its_own_pages_are_answered() -> None:
    async def scenario() -> None:
        settings = ServerSettings(auth="none", host="127.0.0.7")
        app = create_app(FakeTeacher(), settings, hosts=own_hosts(settings))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1:8080") as client:

            async def ask(host: str, origin: str | None = None) -> tuple[int, str]:
                answer = await client.get("/v1/models", headers={"host": host, **({"origin": origin} if origin else {})})
                assert answer.headers["x-content-type-options"] == "nosniff"
                return error_of(answer) if answer.status_code != 200 else (200, "")

            for host in ("localhost", "LOCALHOST:8080", "127.0.0.1", "127.0.0.7:8080", "[::1]:8080"):
                assert await ask(host) == (200, ""), host
                assert await ask(host, f"http://{host}") == (200, ""), host
            for host in ("evil.example", "evil.example:8080", "localhost.evil.example", "10.0.0.1", "127.0.0.1.evil.example", "", "["):
                assert await ask(host) == (403, "foreign_host"), host
            for origin in ("http://evil.example", "null", "http://localhost:3000", "file://"):
                assert await ask("localhost:8080", origin) == (403, "foreign_origin"), origin

    run(scenario)


def test_with_keys_or_for_other_machines_every_name_is_answered() -> None:
    assert own_hosts(ServerSettings()) is None
    assert own_hosts(ServerSettings(auth="none", host="0.0.0.0")) is None
    for host in ("127.0.0.1", "localhost", "::1"):
        assert own_hosts(ServerSettings(auth="none", host=host)) is not None
