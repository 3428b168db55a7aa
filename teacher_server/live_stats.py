"""How the gateway is doing now: the last 60 seconds, second by second, for the page at `/` and for `GET /v1/stats`.

Flow: a request for soft labels starts and ends (`CountRequests`), images are labelled -> counts of that second -> `report`.
Unit of data: one second. Memory is bounded: 60 seconds, each with a histogram of at most 146 latencies. Prometheus (metrics.py) keeps the
history; this answers "what is going on" without one. Everything here runs in the gateway's one event loop.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from pydantic import Field

from distill.config import Section

WINDOW_S = 60
RATE_WINDOW_S = 5
"""Images per second are averaged over so many whole seconds: fewer flicker, more lag behind."""

_SHORTEST_S, _RATIO, _NUM_BUCKETS = 1e-4, 1.1, 146
"""Latencies are kept in buckets that grow by 10 %, 0.1 ms to 100 s: a quantile read from them is within 5 % of the true one."""

_CLIENT_GONE = 499


class Latency(Section):
    """Request in to answer out, in milliseconds, of the requests answered with labels. Within 5 %."""

    p50: float | None
    """Half of the requests were faster. None without requests."""
    p99: float | None
    """99 of 100 requests were faster. None without requests."""


class Series(Section):
    """One value for each of the last 60 seconds, the oldest first, the current one (not over yet) last."""

    images: list[int]
    """Images labelled."""
    requests: list[int]
    """Requests that ended."""
    errors: list[int]
    """Requests that ended with 4xx or 5xx."""
    in_flight: list[int]
    """Most requests at once."""
    queued: list[int]
    """Most requests seen waiting at once."""
    p50_ms: list[float | None]
    """Median latency."""
    p99_ms: list[float | None]
    """99th percentile of the latency."""


class StatsAnswer(Section):
    """The last 60 seconds of requests for soft labels."""

    window_s: int = WINDOW_S
    """Length of the window, in seconds."""
    uptime_s: float = Field(ge=0)
    """Since the gateway started."""
    in_flight: int
    """Requests being worked on now, the waiting ones included."""
    queued: int
    """Requests that wait for their turn now."""
    images_per_s: float
    """Images labelled a second, over the last 5 whole seconds."""
    images: int
    """Images labelled in the window."""
    requests: int
    """Requests that ended in the window."""
    refused: int
    """Of these, with 4xx: the client's doing."""
    failed: int
    """Of these, with 5xx: the server's doing."""
    latency_ms: Latency
    """Over the window."""
    series: Series
    """Second by second."""


@dataclass
class _Second:
    """What happened within one second."""

    number: int
    peak_in_flight: int = 0
    peak_queued: int = 0
    images: int = 0
    requests: int = 0
    refused: int = 0
    failed: int = 0
    latencies: Counter[int] = field(default_factory=Counter)
    """Bucket -> number of requests."""


class LiveStats:
    """Counts of the last 60 seconds. `queued` says how many requests wait now; `clock` gives seconds that never go back."""

    def __init__(self, queued: Callable[[], int] = lambda: 0, clock: Callable[[], float] = time.monotonic) -> None:
        self._queued = queued
        self._clock = clock
        self._started = clock()
        self._in_flight = 0
        self._seconds = [_Second(int(self._started))]

    def begin(self) -> None:
        """A request came in."""
        now = self._now()
        self._in_flight += 1
        now.peak_in_flight = max(now.peak_in_flight, self._in_flight)

    def end(self, status: int, latency_s: float) -> None:
        """That request ended with this HTTP status. A client that hung up (499) is no error and has no latency."""
        now = self._now()
        self._in_flight -= 1
        now.requests += 1
        if status >= 500:
            now.failed += 1
        elif status >= 400:
            now.refused += status != _CLIENT_GONE
        else:
            now.latencies[_bucket(latency_s)] += 1

    def labelled(self, num_images: int) -> None:
        """So many images got their soft labels."""
        self._now().images += num_images

    def report(self) -> StatsAnswer:
        """The window that ends now."""
        now = self._now()
        seconds = [*(_Second(now.number - WINDOW_S + 1 + i) for i in range(WINDOW_S - len(self._seconds))), *self._seconds]
        uptime_s = self._clock() - self._started
        whole = seconds[-1 - RATE_WINDOW_S : -1]
        latencies = sum((second.latencies for second in seconds), Counter[int]())
        return StatsAnswer(
            uptime_s=uptime_s,
            in_flight=self._in_flight,
            queued=self._queued(),
            images_per_s=sum(second.images for second in whole) / RATE_WINDOW_S,
            images=sum(second.images for second in seconds),
            requests=sum(second.requests for second in seconds),
            refused=sum(second.refused for second in seconds),
            failed=sum(second.failed for second in seconds),
            latency_ms=Latency(p50=_quantile_ms(latencies, 0.5), p99=_quantile_ms(latencies, 0.99)),
            series=_series(seconds),
        )

    def _now(self) -> _Second:
        """The current second. Those that passed without an event are filled in: what was in flight stayed in flight."""
        number = int(self._clock())
        last = self._seconds[-1]
        for passed in range(max(last.number + 1, number - WINDOW_S + 1), number + 1):
            self._seconds.append(_Second(passed, self._in_flight, last.peak_queued if self._in_flight else 0))
        del self._seconds[:-WINDOW_S]
        now = self._seconds[-1]
        queued = self._queued()
        # A second that has just begun takes over no queue but the one there is.
        now.peak_queued = queued if now is not last else max(now.peak_queued, queued)
        return now


def _series(seconds: Iterable[_Second]) -> Series:
    seconds = list(seconds)
    return Series(
        images=[second.images for second in seconds],
        requests=[second.requests for second in seconds],
        errors=[second.refused + second.failed for second in seconds],
        in_flight=[second.peak_in_flight for second in seconds],
        queued=[second.peak_queued for second in seconds],
        p50_ms=[_quantile_ms(second.latencies, 0.5) for second in seconds],
        p99_ms=[_quantile_ms(second.latencies, 0.99) for second in seconds],
    )


def _bucket(latency_s: float) -> int:
    """Number of the bucket: bucket i holds 0.1 ms * 1.1^(i - 1/2) to 0.1 ms * 1.1^(i + 1/2), the outermost everything beyond."""
    steps = math.log(max(latency_s, _SHORTEST_S) / _SHORTEST_S, _RATIO)
    return min(round(steps), _NUM_BUCKETS - 1)


def _quantile_ms(latencies: Counter[int], share: float) -> float | None:
    """The middle of the bucket that holds the ceil(share * n)-th fastest of n requests, in ms, to 3 digits; None without requests."""
    wanted = math.ceil(share * latencies.total())
    for bucket in sorted(latencies):
        wanted -= latencies[bucket]
        if wanted <= 0:
            return float(f"{1000 * _SHORTEST_S * _RATIO**bucket:.3g}")
    return None
