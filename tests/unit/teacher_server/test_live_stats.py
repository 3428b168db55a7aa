"""The last 60 seconds, with a clock that the test moves."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import numpy as np
import pytest
from starlette.types import Message, Receive, Scope, Send

from teacher_server.live_stats import WINDOW_S, LiveStats
from teacher_server.metrics import CountRequests, GatewayMetrics


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def stats(clock: Clock) -> LiveStats:
    return LiveStats(clock=clock)


def request(stats: LiveStats, status: int = 200, latency_s: float = 0.01, images: int = 0) -> None:
    stats.begin()
    stats.labelled(images)
    stats.end(status, latency_s)


def test_before_the_first_request_there_are_zeros_and_no_latency(stats: LiveStats) -> None:
    report = stats.report()
    assert (report.images, report.requests, report.refused, report.failed, report.in_flight, report.queued) == (0,) * 6
    assert report.images_per_s == 0
    assert report.latency_ms.p50 is None
    for series in report.series.model_dump().values():
        assert len(series) == WINDOW_S
    assert report.series.p50_ms == [None] * WINDOW_S


def test_a_second_leaves_the_window_after_60(stats: LiveStats, clock: Clock) -> None:
    request(stats, images=3)
    clock.now += 59.9
    assert stats.report().images == 3
    assert stats.report().series.images == [3] + [0] * 59
    clock.now += 0.2
    report = stats.report()
    assert (report.images, report.requests) == (0, 0)
    assert report.latency_ms.p50 is None


def test_seconds_are_in_order_and_the_current_one_is_last(stats: LiveStats, clock: Clock) -> None:
    for images in (5, 7, 11):
        request(stats, images=images)
        clock.now += 1
    clock.now += 1
    request(stats, images=2)
    assert stats.report().series.images[-6:] == [0, 5, 7, 11, 0, 2]


def test_the_rate_is_over_the_last_5_whole_seconds(stats: LiveStats, clock: Clock) -> None:
    for images in (1000, 10, 20, 30, 40, 50):
        request(stats, images=images)
        clock.now += 1
    request(stats, images=1000)  # in the second that is not over
    assert stats.report().images_per_s == 30


def test_a_long_silence_leaves_nothing_behind(stats: LiveStats, clock: Clock) -> None:
    request(stats, images=3)
    clock.now += 86_400
    assert stats.report().images == 0
    request(stats, images=4)
    assert stats.report().series.images == [0] * 59 + [4]


def test_quantiles_are_within_5_percent_of_the_true_ones(stats: LiveStats) -> None:
    latencies_s = np.random.default_rng(0).lognormal(-4, 1, 5000)
    for latency_s in latencies_s:
        request(stats, latency_s=float(latency_s))
    report = stats.report()
    true_ms = 1000 * np.quantile(latencies_s, [0.5, 0.99], method="inverted_cdf")
    np.testing.assert_allclose([report.latency_ms.p50, report.latency_ms.p99], true_ms, rtol=0.055)  # and 3 digits
    assert report.series.p50_ms[-1] == report.latency_ms.p50


def test_p99_is_the_slow_one_of_a_hundred_only_if_it_has_to_be(stats: LiveStats) -> None:
    for _ in range(99):
        request(stats, latency_s=0.01)
    request(stats, latency_s=3)
    assert stats.report().latency_ms.p99 == pytest.approx(10, rel=0.06)
    request(stats, latency_s=3)
    assert stats.report().latency_ms.p99 == pytest.approx(3000, rel=0.06)


@pytest.mark.parametrize(("latency_s", "shown_ms"), [(0.0, 0.1), (1e-9, 0.1), (5000.0, 100_000.0)])
def test_absurd_latencies_stay_on_the_scale(stats: LiveStats, latency_s: float, shown_ms: float) -> None:
    request(stats, latency_s=latency_s)
    assert stats.report().latency_ms.p50 == pytest.approx(shown_ms, rel=0.06)


def test_refusals_and_failures_are_told_apart_and_have_no_latency(stats: LiveStats) -> None:
    for status in (200, 207, 401, 422, 429, 499, 500, 503):
        request(stats, status, latency_s=0.01 if status < 400 else 9)
    report = stats.report()
    assert (report.requests, report.refused, report.failed) == (8, 3, 2)
    assert report.series.errors[-1] == 5
    assert report.latency_ms.p99 == pytest.approx(10, rel=0.06)


def test_a_request_is_in_flight_in_every_second_that_it_lasts(stats: LiveStats, clock: Clock) -> None:
    stats.begin()
    stats.begin()
    stats.end(200, 0.1)
    clock.now += 3
    assert stats.report().in_flight == 1
    stats.end(200, 3.0)
    clock.now += 2
    report = stats.report()
    assert report.in_flight == 0
    assert report.series.in_flight[-7:] == [0, 2, 1, 1, 1, 0, 0]


def test_the_queue_is_seen_at_its_longest(clock: Clock) -> None:
    waiting = 0
    stats = LiveStats(lambda: waiting, clock)
    stats.begin()
    waiting = 7
    stats.begin()
    waiting = 2
    stats.begin()
    assert stats.report().queued == 2
    assert stats.report().series.queued[-1] == 7
    clock.now += 1
    waiting = 0
    assert stats.report().series.queued[-2:] == [7, 0]


def test_memory_does_not_grow_with_traffic(stats: LiveStats, clock: Clock) -> None:
    def size() -> int:
        return sum(len(second.latencies) for second in stats._seconds)

    random = np.random.default_rng(0)
    sizes = []
    for _ in range(3):
        for latency_s in random.lognormal(-4, 4, 20_000):
            request(stats, latency_s=float(latency_s))
            clock.now += 0.01
        sizes.append(size())
    assert len(stats._seconds) == WINDOW_S
    assert max(sizes) <= WINDOW_S * 146


def run(app: CountRequests, path: str) -> None:
    async def nothing() -> Message:
        return {"type": "http.disconnect"}

    async def ignore(message: Message) -> None:
        return None

    asyncio.run(app({"type": "http", "path": path}, nothing, ignore))


def test_the_middleware_counts_one_path_whatever_becomes_of_the_request(stats: LiveStats) -> None:
    seen_in_flight = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen_in_flight.append(stats.report().in_flight)
        if len(seen_in_flight) == 3:
            raise RuntimeError("unforeseen")
        await send({"type": "http.response.start", "status": 422, "headers": []})

    watched = CountRequests(app, GatewayMetrics(), stats, "/v1/soft-labels")
    run(watched, "/v1/stats")
    run(watched, "/v1/soft-labels")
    with pytest.raises(RuntimeError):
        run(watched, "/v1/soft-labels")
    report = stats.report()
    assert seen_in_flight == [0, 1, 1]
    assert (report.requests, report.refused, report.failed, report.in_flight) == (2, 1, 1, 0)
