"""One teacher of a pool: what it is, how it stands, how busy it is, and how long a request would take there.

Flow: pool.py chooses the member with the smallest `expected_delay_s` -> `send` -> `answered` or `failed`.
Unit of data: one request, a part of a batch that fits into one message.
"""

from __future__ import annotations

from typing import Literal, Protocol, runtime_checkable

from distill.config import Section
from distill.teacher_info import TeacherInfo
from teacher_server.backend import CheckedTeacher
from teacher_server.pool_limit import AimdLimit, Sent
from teacher_server.settings import PoolSettings

Standing = Literal["new", "in", "away", "refused"]

_RATE_WEIGHT = 0.3
"""Weight of the newest answer in the estimate of a member's rate."""
_RATE_DOUBLES_S = 10.0
"""A member that is not asked is taken for twice as fast each time this passes: a bad first impression must not last for ever."""
_MOST_DOUBLINGS = 60.0


class MemberState(Section):
    """One teacher of a pool, as plain data."""

    url: str
    """Where it is."""
    standing: Standing
    """`new` (being asked who it is), `in` (gets requests), `away` (gives no answer), `refused` (another teacher, or none at all). Whoever
    is not in is asked again and again."""
    reason: str = ""
    """Why it is not in."""
    for_s: float
    """For how long it has stood like this, in s."""
    fingerprint: str | None = None
    """Of the teacher that it last said to be."""
    in_flight: int
    """Requests under way."""
    images_in_flight: int
    """Crops in them."""
    limit: int
    """Requests that may be under way: see pool_limit.py."""
    floor_ms: float | None = None
    """Latency of a request with nobody waiting."""
    latency_ms: float | None = None
    """Latency of late, a moving mean."""
    images_per_s: float | None = None
    """Estimated rate, a moving mean of (crops under way / latency)."""
    requests: int
    """Requests answered so far."""
    images: int
    """Crops answered so far."""
    failures: int
    """Requests that failed so far; each was asked of another."""


class PoolState(Section):
    """A pool, as plain data."""

    fingerprint: str | None
    """The teacher whose labels are given out; None before anybody answered."""
    waiting: int
    """Requests that wait for room at a teacher."""
    members: tuple[MemberState, ...]


@runtime_checkable
class HasPoolState(Protocol):
    """A back end that asks several teachers and can say how each of them does."""

    def state(self) -> PoolState:
        """As it is now. May be called from any thread."""
        ...


class Member:
    """One teacher of a pool."""

    def __init__(self, url: str, teacher: CheckedTeacher, settings: PoolSettings, now_s: float) -> None:
        self.url = url
        self.teacher = teacher
        self.limit = AimdLimit(settings)
        self.standing: Standing = "new"
        self.reason = ""
        self.since_s = now_s
        self.stays = 0
        """How often it came in: tells a failure of an earlier stay from one of this."""
        self.is_proven = False
        """Whether it has answered a request in this stay. (Who is in has answered a grey crop.)"""
        self.info: TeacherInfo | None = None
        self.in_flight = 0
        self.images_in_flight = 0
        self._latency_s: float | None = None
        self._rate: float | None = None
        self._answered_at_s = now_s
        self._requests = self._images = self._failures = 0

    @property
    def has_room(self) -> bool:
        """Whether it may be asked now."""
        return self.standing == "in" and self.in_flight < self.limit.allowed

    def expected_delay_s(self, num_images: int, now_s: float) -> float:
        """Until `num_images` more crops would be answered, those under way first (shortest expected delay). 0 while nothing is known."""
        if self._rate is None:
            return 0.0
        doublings = min(_MOST_DOUBLINGS, (now_s - self._answered_at_s) / _RATE_DOUBLES_S)
        return (self.images_in_flight + num_images) / (self._rate * 2.0**doublings)

    def send(self, num_images: int, now_s: float) -> Sent:
        """A request goes out; `done` must follow."""
        self.in_flight += 1
        self.images_in_flight += num_images
        return self.limit.send(now_s, num_images, self.in_flight)

    def answered(self, sent: Sent, now_s: float) -> None:
        """Its answer came."""
        self.is_proven = True
        self.limit.answered(sent, now_s)
        self._requests += 1
        self._images += sent.num_images
        self._answered_at_s = now_s
        latency_s = max(now_s - sent.at_s, 1e-6)
        self._latency_s = _moved(self._latency_s, latency_s)
        self._rate = _moved(self._rate, self.images_in_flight / latency_s)  # Little's law

    def failed(self, stay: int) -> bool:
        """A request of that stay failed. True for the first of a stay that is not over: only that one lowers the limit and says anything
        new of the member."""
        self._failures += 1
        first = self.standing == "in" and self.stays == stay
        if first:
            self.limit.failed()
        return first

    def done(self, sent: Sent) -> None:
        """It is not under way any more, whatever came of it."""
        self.in_flight -= 1
        self.images_in_flight -= sent.num_images

    def stand(self, standing: Standing, now_s: float, reason: str = "") -> bool:
        """Change how it stands; False when that is how it stood already."""
        changed, self.reason = standing != self.standing, reason
        if changed:
            self.standing, self.since_s = standing, now_s
            if standing == "in":
                self.stays += 1
                self.is_proven = False
                self._rate = None  # who comes back may have become another machine
        return changed

    def describe(self, now_s: float) -> str:
        """One phrase for an error or a log."""
        if self.standing == "in":
            return f"{self.url} answers"
        if self.standing == "new":
            return f"{self.url} is being asked who it is"
        return f"{self.url} {self.standing} for {now_s - self.since_s:.0f} s ({self.reason})"

    def state(self, now_s: float) -> MemberState:
        """As plain data."""
        floor_s = self.limit.floor_s
        return MemberState(
            url=self.url,
            standing=self.standing,
            reason=self.reason,
            for_s=now_s - self.since_s,
            fingerprint=self.info.fingerprint if self.info else None,
            in_flight=self.in_flight,
            images_in_flight=self.images_in_flight,
            limit=self.limit.allowed,
            floor_ms=None if floor_s is None else 1000 * floor_s,
            latency_ms=None if self._latency_s is None else 1000 * self._latency_s,
            images_per_s=self._rate,
            requests=self._requests,
            images=self._images,
            failures=self._failures,
        )


def _moved(mean: float | None, value: float) -> float:
    return value if mean is None else mean + _RATE_WEIGHT * (value - mean)
