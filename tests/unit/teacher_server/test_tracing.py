"""One request is one trace, from whoever sent it to the message that Triton gets; and where nobody looks, nothing is loaded."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from distill.errors import ConfigError
from distill.wire import CROPS_MEDIA_TYPE, LABELS_PATH, encode_crops
from teacher_server.backend import TeacherBackend
from teacher_server.embedded import EmbeddedTeacher, Engine
from teacher_server.fake import FakeTeacher
from teacher_server.gateway import create_app
from teacher_server.key_file import KeyFile, new_key, write_keys
from teacher_server.pool import PooledTeacher
from teacher_server.rest import RestTeacher
from teacher_server.serve import Gateway
from teacher_server.settings import PoolSettings, ServerSettings, TracingSettings
from teacher_server.trace_context import trace_arguments
from teacher_server.tracing import NoTracing, Tracing, open_tracing

pytest.importorskip("opentelemetry.sdk.trace", reason="the extra `tracing` is not installed")

from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio
from opentelemetry.trace import SpanKind, StatusCode

TRACE, SENDER = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SENT = {"traceparent": f"00-{TRACE}-{SENDER}-01"}
CROPS = encode_crops(np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8))


class Collected:
    """Where spans go in these tests; `share` is that of the settings."""

    def __init__(self, share: float = 1.0) -> None:
        self.exporter = InMemorySpanExporter()
        provider = TracerProvider(sampler=ParentBasedTraceIdRatio(share))
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.tracing = Tracing(provider)

    def spans(self) -> dict[str, ReadableSpan]:
        """By name; each is there once."""
        found = self.exporter.get_finished_spans()
        assert len({span.name for span in found}) == len(found)
        return {span.name: span for span in found}


def ask(
    teacher: TeacherBackend,
    tracing: NoTracing | None,
    headers: dict[str, str],
    body: bytes = CROPS,
    method: str = "POST",
    hosts: frozenset[str] | None = None,
    **settings: Any,
) -> httpx.Response:
    async def scenario() -> httpx.Response:
        app = create_app(teacher, ServerSettings(**{"auth": "none", **settings}), hosts=hosts, tracing=tracing)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as client:
            await client.get("/healthz")
            return await client.request(method, LABELS_PATH, content=body, headers={"Content-Type": CROPS_MEDIA_TYPE, **headers})

    return asyncio.run(scenario())


@pytest.fixture
def embedded(tiny_teacher: Any) -> Iterator[EmbeddedTeacher]:
    engine = Engine(tiny_teacher.repository / "tiny" / "1" / "model.onnx", num_threads=1)
    yield EmbeddedTeacher(engine, owns_engine=False)
    engine.close()


def test_a_request_is_one_span_of_its_senders_trace_with_a_span_for_each_part_of_its_way(embedded: EmbeddedTeacher) -> None:
    collected = Collected()
    assert ask(embedded, collected.tracing, SENT).status_code == 200
    spans = collected.spans()
    assert set(spans) == {f"POST {LABELS_PATH}", "decode", "queue", "teacher"}, "and none for the health of the gateway"
    request = spans.pop(f"POST {LABELS_PATH}")
    assert request.kind is SpanKind.SERVER
    assert request.parent is not None
    assert (f"{request.context.trace_id:032x}", f"{request.parent.span_id:016x}") == (TRACE, SENDER)
    assert request.attributes is not None
    assert request.attributes["http.response.status_code"] == 200
    assert request.attributes["http.route"] == LABELS_PATH
    assert request.attributes["distill.tenant"]
    for span in spans.values():
        assert span.parent is not None
        assert (span.context.trace_id, span.parent.span_id) == (request.context.trace_id, request.context.span_id)
    assert spans["teacher"].kind is SpanKind.CLIENT
    assert dict(spans["teacher"].attributes or {}) == {"distill.images": 3}
    started = [spans[name].start_time for name in ("decode", "queue", "teacher")]
    assert started == sorted(started, key=lambda time: time or 0)


class Noting(FakeTeacher):
    """Notes what a client would send with a message."""

    sent: dict[str, Any]

    async def _infer(self, *question: Any) -> Any:
        self.sent = await asyncio.create_task(self._in_a_task())  # as the Triton client sends several messages at once
        return await super()._infer(*question)

    async def _in_a_task(self) -> dict[str, Any]:
        return trace_arguments()


@pytest.mark.parametrize("pooled", [False, True])
def test_what_the_teacher_is_sent_belongs_to_the_span_around_the_question(pooled: bool) -> None:
    collected, teacher = Collected(), Noting()
    asked = PooledTeacher([("a", teacher)], PoolSettings()) if pooled else teacher
    assert ask(asked, collected.tracing, SENT).status_code == 200
    span = collected.spans()["teacher"]
    assert teacher.sent == {"headers": {"traceparent": f"00-{TRACE}-{span.context.span_id:016x}-01"}}
    assert trace_arguments() == {}


def test_a_gateway_before_a_gateway_is_one_trace() -> None:
    collected = Collected()
    inner = create_app(FakeTeacher(), ServerSettings(auth="none"), tracing=collected.tracing)
    outer = RestTeacher("http://gateway", transport=httpx.ASGITransport(inner))
    assert ask(outer, collected.tracing, SENT).status_code == 200
    finished = collected.exporter.get_finished_spans()
    assert {f"{span.context.trace_id:032x}" for span in finished} == {TRACE}
    requests = [span for span in finished if span.kind is SpanKind.SERVER]
    questions = {span.context.span_id for span in finished if span.kind is SpanKind.CLIENT}
    assert [span.parent is not None and span.parent.span_id in questions for span in requests] == [True, False]


def test_a_request_without_a_trace_begins_one() -> None:
    collected = Collected()
    ask(FakeTeacher(), collected.tracing, {})
    assert collected.spans()[f"POST {LABELS_PATH}"].parent is None


@pytest.mark.parametrize(
    ("teacher", "body", "status", "code"),
    [
        (FakeTeacher(unavailable_calls=99), CROPS, 503, StatusCode.ERROR),
        (FakeTeacher(answer_nan=True), CROPS, 502, StatusCode.ERROR),
        (FakeTeacher(), b"no crops of ours", 422, StatusCode.UNSET),
    ],
)
def test_a_failure_is_told_by_status_and_type_and_never_by_what_a_client_sent(
    teacher: FakeTeacher, body: bytes, status: int, code: StatusCode
) -> None:
    collected = Collected()
    assert ask(teacher, collected.tracing, {}, body).status_code == status
    spans = collected.spans()
    request = spans[f"POST {LABELS_PATH}"]
    assert ((request.attributes or {})["http.response.status_code"], request.status.status_code) == (status, code)
    for span in spans.values():
        assert (span.events, span.status.description) == ((), None)
    if status == 503:
        assert (spans["teacher"].attributes or {})["error.type"] == "TeacherUnavailable"


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_who_has_no_key_makes_no_span_whatever_traceparent_he_sends(share: float, tmp_path: Path) -> None:
    (key, entry), (unknown, _) = new_key("alice"), new_key("mallory")
    path, collected = tmp_path / "keys.yaml", Collected(share)
    write_keys(path, KeyFile(keys=(entry,)))

    def status(headers: dict[str, str]) -> int:
        return ask(FakeTeacher(), collected.tracing, {**SENT, **headers}, auth="keys", keys_file=str(path)).status_code

    assert (status({}), status({"Authorization": f"Bearer {unknown}"})) == (401, 401)
    assert collected.spans() == {}
    assert status({"Authorization": f"Bearer {key}"}) == 200
    assert f"{collected.spans()[f'POST {LABELS_PATH}'].context.trace_id:032x}" == TRACE


def test_a_request_for_a_strangers_name_makes_no_span() -> None:
    collected = Collected()
    answer = ask(FakeTeacher(), collected.tracing, {**SENT, "host": "evil.example.com"}, hosts=frozenset({"gateway"}))
    assert answer.status_code == 403
    assert collected.spans() == {}


@pytest.mark.parametrize(("method", "name", "kept"), [("GET", "GET", "GET"), ("X" * 4000, "HTTP", "_OTHER")])
def test_a_method_that_a_client_made_up_is_not_exported(method: str, name: str, kept: str) -> None:
    collected = Collected()
    assert ask(FakeTeacher(), collected.tracing, SENT, method=method).status_code == 405
    (span,) = collected.spans().values()
    assert (span.name, (span.attributes or {})["http.request.method"]) == (f"{name} {LABELS_PATH}", kept)


def test_where_no_collector_is_named_nothing_of_it_is_loaded() -> None:
    """But for the interface, which FastAPI loads by itself where it is installed."""
    program = (
        "import sys; from teacher_server.fake import FakeTeacher; from teacher_server.gateway import create_app;"
        " from teacher_server.settings import ServerSettings; create_app(FakeTeacher(), ServerSettings(auth='none'));"
        " print([name for name in sys.modules if name.startswith(('opentelemetry.sdk', 'opentelemetry.exporter'))])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_wanted_and_not_installed_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ConfigError, match=r"pip install -e '\.\[tracing\]' in the checkout"):
        create_app(FakeTeacher(), ServerSettings(auth="none", tracing=TracingSettings(endpoint="http://127.0.0.1:1/v1/traces")))


class Collector(HTTPServer):
    """An OpenTelemetry collector as far as a gateway sees it: takes OTLP over HTTP and keeps it."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Take)
        self.bodies: list[bytes] = []


class _Take(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.bodies.append(body)
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


@pytest.fixture
def collector() -> Iterator[Collector]:
    server = Collector()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_gateway_that_stops_has_sent_its_spans_to_the_collector(collector: Collector) -> None:
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    endpoint = f"http://127.0.0.1:{collector.server_port}/v1/traces"
    settings = ServerSettings(port=0, auth="none", tracing=TracingSettings(endpoint=endpoint))
    with Gateway(FakeTeacher, settings) as gateway:
        headers = {"Content-Type": CROPS_MEDIA_TYPE, **SENT}
        assert httpx.post(gateway.url + LABELS_PATH, content=CROPS, headers=headers, timeout=20).status_code == 200
    sent = [ExportTraceServiceRequest.FromString(body) for body in collector.bodies]
    resources = [resource for request in sent for resource in request.resource_spans]
    services = {a.value.string_value for resource in resources for a in resource.resource.attributes if a.key == "service.name"}
    assert services == {"distill-gateway"}
    spans = [span for resource in resources for scope in resource.scope_spans for span in scope.spans]
    assert sorted(span.name for span in spans) == [f"POST {LABELS_PATH}", "decode", "queue", "teacher"]
    assert {span.trace_id.hex() for span in spans} == {TRACE}


@pytest.mark.parametrize(("sent", "traced"), [({}, False), (SENT, True), ({"traceparent": SENT["traceparent"][:-1] + "0"}, False)])
def test_a_share_of_none_still_follows_whoever_sent_the_request(sent: dict[str, str], traced: bool) -> None:
    tracing = open_tracing(TracingSettings(endpoint="http://127.0.0.1:1/v1/traces", sampled_share=0))
    assert isinstance(tracing, Tracing)
    with tracing.span("x", sent=sent) as span:
        assert span is not None
        assert span.is_recording() is traced
    tracing._provider._active_span_processor._span_processors[0].span_exporter.shutdown()  # type: ignore[attr-defined]
    tracing.close()
