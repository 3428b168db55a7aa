"""What the gateway counts, for Prometheus: `GET /metrics`.

Unit of data: one HTTP request. Keys are fixed; labels have few values: route templates, statuses, codes of errors, the first hundred
tenants; never what a client can make up.
"""

from __future__ import annotations

import time

from fastapi import FastAPI
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from teacher_server.fair_queue import FairQueue
from teacher_server.live_stats import LiveStats

_LATENCY_BUCKETS_S = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_MOST_TENANTS = 100
_OTHERS = "other"
_NOBODY = "-"


class GatewayMetrics:
    """The metrics of one app, in a registry of their own, so that two apps in one process do not collide."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("distill_gateway_requests", "HTTP requests", ["route", "status"], registry=self.registry)
        self.images = Counter(
            "distill_gateway_images", "Images by outcome: labelled or rejected", ["tenant", "outcome"], registry=self.registry
        )
        self._refusals = Counter("distill_gateway_refusals", "Requests that got an error", ["tenant", "code"], registry=self.registry)
        self.latency = Histogram(
            "distill_gateway_latency_seconds", "Request in to answer out", ["route"], buckets=_LATENCY_BUCKETS_S, registry=self.registry
        )
        self.in_flight = Gauge("distill_gateway_in_flight", "Requests being worked on", registry=self.registry)
        self.batch = Histogram("distill_gateway_batch_images", "Images of one request", buckets=_BATCH_BUCKETS, registry=self.registry)
        self.decode = self._seconds("decode", "From the whole body to its crops")
        self.wait = self._seconds("queue_wait", "Waiting for the turn before the teacher")
        self.teacher = self._seconds("teacher", "From the question to the teacher's answer")
        self._tenants: set[str] = set()

    def refused(self, code: str, tenant: str | None = None) -> None:
        """Count a request that ends with this error; no tenant: nobody whom we know."""
        self._refusals.labels(self.tenant_label(tenant) if tenant else _NOBODY, code).inc()

    def watch_queue(self, queue: FairQueue) -> None:
        """Show how much waits and how much the teacher is being asked for, as it is when Prometheus looks."""
        for name, text, value in (
            ("queue_images", "Images that wait for the teacher", lambda: queue.waiting_images),
            ("queue_requests", "Requests that wait for the teacher", lambda: queue.waiting_requests),
            ("teacher_images", "Images that the teacher is being asked for", lambda: queue.in_flight_images),
        ):
            Gauge(f"distill_gateway_{name}", text, registry=self.registry).set_function(value)

    def tenant_label(self, tenant: str) -> str:
        """The tenant's name, for the first hundred of them; the number of time series stays bounded."""
        if tenant not in self._tenants:
            if len(self._tenants) >= _MOST_TENANTS:
                return _OTHERS
            self._tenants.add(tenant)
        return tenant

    def _seconds(self, name: str, text: str) -> Histogram:
        return Histogram(f"distill_gateway_{name}_seconds", text, buckets=_LATENCY_BUCKETS_S, registry=self.registry)

    def text(self) -> bytes:
        """The Prometheus text format."""
        return generate_latest(self.registry)


class CountRequests:
    """ASGI middleware around the whole app; plain ASGI because Starlette's BaseHTTPMiddleware hides a client's disconnect.

    Requests to `live_path` are also those that the page shows the last minute of.
    """

    def __init__(self, app: ASGIApp, metrics: GatewayMetrics, live: LiveStats, live_path: str) -> None:
        self._app = app
        self._metrics = metrics
        self._live = live
        self._live_path = live_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Count one request, whatever becomes of it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 500
        started = time.perf_counter()
        live = self._live if scope["path"] == self._live_path else None

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self._metrics.in_flight.inc()
        if live is not None:
            live.begin()
        try:
            await self._app(scope, receive, watch)
        finally:
            took_s = time.perf_counter() - started
            self._metrics.in_flight.dec()
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.requests.labels(route, str(status)).inc()
            self._metrics.latency.labels(route).observe(took_s)
            if live is not None:
                live.end(status, took_s)


def count_requests(app: FastAPI, metrics: GatewayMetrics, live: LiveStats, live_path: str) -> None:
    """Put the counting around an app."""
    app.add_middleware(CountRequests, metrics=metrics, live=live, live_path=live_path)
