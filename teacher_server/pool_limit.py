"""How many requests one teacher of a pool may have under way at once, found from its answers: additive increase, multiplicative decrease.

Flow: `send` before each request -> `answered` or `failed` after it -> `allowed`, which the pool reads before the next one.
Unit of data: one round, as many answers as may be under way (at least `ROUND_ANSWERS`), all of requests sent since the limit last changed.

    median latency of a round <= floor + slack, and the limit was reached     limit + 1
    median latency of a round >  floor + slack                                limit x 0.9
    a request failed, was refused for overload or came too late               limit / 2

The floor is the latency with nobody waiting: the lowest median of a round so far, measured anew whenever one request at a time is
allowed. It grows old: a minute after it was found one round is sent one request at a time, because a limit that was right an hour ago need
not be right now. The slack is the queue that a busy teacher needs: (tolerance - 1) x floor, at least `latency_slack_ms`.

A teacher that works on one request after the other ends with 2 or 3 under way (one is answered, one waits), one with n copies with 2n to
3n. How many images go to a slow teacher and how many to a fast one then follows from how soon each has room again.

AIMD: Chiu and Jain 1989; TCP's congestion window (RFC 5681) halves for losses. Latency instead of loss: TCP Vegas (Brakmo and Peterson
1995). The factor 0.9, one step a round and no step while the limit is not reached: Vector's adaptive request concurrency (its RFC 1858,
2020) and Netflix's concurrency-limits. A floor that is measured anew now and then: BBR's ProbeRTT (Cardwell et al. 2016).
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from teacher_server.settings import PoolSettings

ROUND_ANSWERS = 5
"""Fewer answers than this tell nothing of a median."""
_DECREASE = 0.9
_DECREASE_FAILED = 0.5
_FLOOR_AGE_S = 60.0
_FLOOR_AGE_ANSWERS = 200
"""The floor of a slow teacher is measured less often, so that measuring takes less than about 3 % of its time."""
_USUAL_SHARE = 0.75
"""A request with fewer images than this share of the usual ones is answered sooner, and says nothing of the queue."""
_USUAL_DECAY = 0.99


@dataclass(frozen=True)
class Sent:
    """One request under way."""

    at_s: float
    """When it was sent, by the clock of the event loop."""
    num_images: int
    round_number: int


class AimdLimit:
    """The limit of one teacher. Times are seconds of one monotonic clock."""

    def __init__(self, settings: PoolSettings) -> None:
        self._settings = settings
        self._limit = 1.0
        self._round = 0
        self._latencies_s: list[float] = []
        self._filled = False
        self._floor_s: float | None = None
        self._floor_at_s = 0.0
        self._probing = False
        self._usual_images = 0.0

    @property
    def allowed(self) -> int:
        """Requests that may be under way now, at least 1."""
        return 1 if self._probing else int(self._limit)

    @property
    def floor_s(self) -> float | None:
        """Latency with nobody waiting, in s; None before the first round is over."""
        return self._floor_s

    def send(self, now_s: float, num_images: int, num_under_way: int) -> Sent:
        """A request goes out as number `num_under_way` (itself included)."""
        self._usual_images = max(float(num_images), self._usual_images * _USUAL_DECAY)
        self._filled |= num_under_way >= self.allowed
        return Sent(now_s, num_images, self._round)

    def answered(self, sent: Sent, now_s: float) -> None:
        """Its answer came."""
        if sent.round_number != self._round or sent.num_images < _USUAL_SHARE * self._usual_images:
            return
        self._latencies_s.append(now_s - sent.at_s)
        if len(self._latencies_s) >= max(self.allowed, ROUND_ANSWERS):
            self._end_round(statistics.median(self._latencies_s), now_s)

    def failed(self) -> None:
        """It failed, was refused for overload or came too late."""
        self._limit = max(1.0, self._limit * _DECREASE_FAILED)
        self._next_round()

    def _end_round(self, latency_s: float, now_s: float) -> None:
        if self._floor_s is None or latency_s <= self._floor_s or self.allowed == 1:
            self._floor_s, self._floor_at_s = latency_s, now_s
        was_probe, self._probing = self._probing, False
        floor_s = self._floor_s
        if was_probe:
            pass  # the limit was not in use: nothing is known of it
        elif latency_s > floor_s + max((self._settings.latency_tolerance - 1) * floor_s, self._settings.latency_slack_ms / 1000):
            self._limit = max(1.0, self._limit * _DECREASE)
        elif self._filled:
            self._limit = min(float(self._settings.max_in_flight), self._limit + 1)
        if now_s - self._floor_at_s > max(_FLOOR_AGE_S, _FLOOR_AGE_ANSWERS * floor_s):
            self._probing = True
        self._next_round()

    def _next_round(self) -> None:
        self._round += 1
        self._latencies_s.clear()
        self._filled = False
