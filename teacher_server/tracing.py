"""Traces of requests, as OpenTelemetry has them: one span for the request, one for each part of its way, and the context goes on to Triton.

Flow: a request that was let in (security.py) -> its `traceparent`, if it has one -> a span around the request -> spans `decode`, `queue`,
`teacher` in it -> `traceparent` in the gRPC metadata of each message (trace_context.py), so that Triton's own spans are part of the same
trace -> a collector, by OTLP over HTTP. Nothing of OpenTelemetry is imported unless `server.tracing.endpoint` is set.
Unit of data: one span.

Sources: https://www.w3.org/TR/trace-context/ ; names of attributes from OpenTelemetry's semantic conventions for HTTP.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Literal

from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from distill import __version__
from distill.errors import ConfigError
from distill.extras import how_to_install
from teacher_server.trace_context import carrying

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

    from teacher_server.settings import TracingSettings

Attributes = Mapping[str, str | int | float | bool]
Kind = Literal["server", "internal", "client"]

_EXPORT_TIMEOUT_S = 5

_METHODS = frozenset({"CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "QUERY", "TRACE"})
"""Methods that a span may be named after; of any other word that a client makes up, OpenTelemetry wants `_OTHER` and the name `HTTP`."""


class NoTracing:
    """Nobody looks."""

    def span(
        self, name: str, kind: Kind = "internal", attributes: Attributes | None = None, sent: Mapping[str, str] | None = None
    ) -> AbstractContextManager[Span | None]:
        """Nothing happens."""
        return nullcontext()

    def close(self) -> None:
        """Nothing is open."""


class Tracing(NoTracing):
    """Spans of one gateway.

    Args:
        provider: where they go. It is shut down with this, which sends what waits.
    """

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("distill.gateway", __version__)

    @contextmanager
    def span(
        self, name: str, kind: Kind = "internal", attributes: Attributes | None = None, sent: Mapping[str, str] | None = None
    ) -> Iterator[Span | None]:
        """Around a part of the work; messages to the teacher inside it carry its `traceparent`.

        Of an exception only its type is kept: its message may quote what a client sent.

        Args:
            sent: headers of a request from outside, whose `traceparent` this span belongs to.
        """
        from opentelemetry.trace import SpanKind, StatusCode
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        propagator = TraceContextTextMapPropagator()
        span = self._tracer.start_as_current_span(
            name,
            context=None if sent is None else propagator.extract(sent),
            kind=SpanKind[kind.upper()],
            attributes=dict(attributes or {}),
            record_exception=False,
            set_status_on_exception=False,
        )
        with span as current:
            here: dict[str, str] = {}
            propagator.inject(here)
            try:
                with carrying(here):
                    yield current
            except BaseException as error:
                current.set_attribute("error.type", type(error).__name__)
                current.set_status(StatusCode.ERROR)
                raise

    def close(self) -> None:
        """Send what waits; blocks for some seconds at most."""
        self._provider.shutdown()


def open_tracing(settings: TracingSettings) -> NoTracing:
    """Tracing as the settings have it; off where they name no collector.

    Raises:
        ConfigError: it is wanted, and OpenTelemetry is not installed.
    """
    if settings.endpoint is None:
        return NoTracing()
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio
    except ImportError as error:
        raise ConfigError(
            f"server.tracing.endpoint is {settings.endpoint}, and OpenTelemetry is not installed ({error.name}):"
            f" {how_to_install('tracing')}, or leave server.tracing out"
        ) from error
    resource = Resource.create({"service.name": "distill-gateway", "service.version": __version__})
    provider = TracerProvider(resource=resource, sampler=ParentBasedTraceIdRatio(settings.sampled_share))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=settings.endpoint, timeout=_EXPORT_TIMEOUT_S)))
    return Tracing(provider)


class TraceRequests:
    """ASGI middleware: a span around each request to one path. Plain ASGI because Starlette's BaseHTTPMiddleware hides a disconnect."""

    def __init__(self, app: ASGIApp, tracing: NoTracing, path: str) -> None:
        self._app = app
        self._tracing = tracing
        self._path = path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Trace one request, whatever becomes of it."""
        if scope["type"] != "http" or scope["path"] != self._path:
            await self._app(scope, receive, send)
            return
        known = scope["method"] in _METHODS
        attributes = {"http.request.method": scope["method"] if known else "_OTHER", "http.route": self._path}
        sent = Headers(scope=scope)
        with self._tracing.span(f"{scope['method'] if known else 'HTTP'} {self._path}", "server", attributes, sent) as span:

            async def watch(message: Message) -> None:
                if span is not None and message["type"] == "http.response.start":
                    _note_answer(span, message["status"], scope.get("tenant"))
                await send(message)

            await self._app(scope, receive, watch)


def _note_answer(span: Span, status: int, tenant: Any) -> None:
    from opentelemetry.trace import StatusCode

    span.set_attribute("http.response.status_code", status)
    if tenant is not None:
        span.set_attribute("distill.tenant", tenant.name)
    if status >= 500:
        span.set_status(StatusCode.ERROR)


def trace_requests(app: FastAPI, tracing: NoTracing, path: str) -> None:
    """Put the tracing around an app, where there is any. Added before the guard, so inside it: who is refused there makes no span."""
    if isinstance(tracing, Tracing):
        app.add_middleware(TraceRequests, tracing=tracing, path=path)
