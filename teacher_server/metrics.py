"""What the gateway counts, for Prometheus: `GET /metrics`.

Unit of data: one HTTP request. Keys are fixed; labels have few values (route templates and statuses, never names or paths of clients).
"""

from __future__ import annotations

import time

from fastapi import FastAPI
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_LATENCY_BUCKETS_S = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)


class GatewayMetrics:
    """The metrics of one app, in a registry of their own, so that two apps in one process do not collide."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("distill_gateway_requests", "HTTP requests", ["route", "status"], registry=self.registry)
        self.images = Counter("distill_gateway_images", "Images by outcome: labelled or rejected", ["outcome"], registry=self.registry)
        self.latency = Histogram(
            "distill_gateway_latency_seconds", "Request in to answer out", ["route"], buckets=_LATENCY_BUCKETS_S, registry=self.registry
        )
        self.in_flight = Gauge("distill_gateway_in_flight", "Requests being worked on", registry=self.registry)

    def text(self) -> bytes:
        """The Prometheus text format."""
        return generate_latest(self.registry)


class CountRequests:
    """ASGI middleware around the whole app; plain ASGI because Starlette's BaseHTTPMiddleware hides a client's disconnect."""

    def __init__(self, app: ASGIApp, metrics: GatewayMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Count one request, whatever becomes of it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 500
        started = time.perf_counter()

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self._metrics.in_flight.inc()
        try:
            await self._app(scope, receive, watch)
        finally:
            self._metrics.in_flight.dec()
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.requests.labels(route, str(status)).inc()
            self._metrics.latency.labels(route).observe(time.perf_counter() - started)


def count_requests(app: FastAPI, metrics: GatewayMetrics) -> None:
    """Put the counting around an app."""
    app.add_middleware(CountRequests, metrics=metrics)
