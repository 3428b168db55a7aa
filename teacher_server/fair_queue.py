"""Whose turn it is before the teacher: weighted fair queueing between tenants, with a bound on what is under way.

Flow: a request with its images ready -> `turn` -> its tenant's line -> the teacher. Among the tenants that wait, the request with the
smallest virtual finish time (start + images / weight) goes next, so under a backlog tenants get images in the ratio of their weights, and
a tenant that was idle has saved nothing up (self-clocked fair queueing, Golestani 1994).
Unit of data: one request of a number of images. One event loop; nothing here awaits while it counts.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

_SHORTEST_RETRY_S = 0.1
_LONGEST_RETRY_S = 60
_NEWEST_SHARE = 0.1  # weight of the newest turn in the running mean of how long a turn takes


class QueueFull(Exception):
    """No room to wait. `retry_after_s` is about when there will be some."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


@dataclass(eq=False)
class _Waiter:
    """One request that waits."""

    cost: int
    granted: asyncio.Future[None]


@dataclass(eq=False)
class _Line:
    """One tenant's waiting requests in the order in which they came; at least one. `start` is the virtual start time of the first."""

    start: float
    weight: float = 1.0
    cost: int = 0
    waiters: deque[_Waiter] = field(default_factory=deque)

    def finish(self) -> float:
        """Virtual finish time of the first request."""
        return self.start + self.waiters[0].cost / self.weight


class FairQueue:
    """At most `max_in_flight` images have their turn at once; a larger request has it alone.

    Images that wait are at most `max_waiting` of one tenant and `max_waiting_total` of all. A tenant alone cannot fill the whole queue
    when the first is the smaller one, so its rejections begin before the others have any.
    """

    def __init__(
        self,
        max_in_flight: int,
        max_waiting: float = math.inf,
        max_waiting_total: float = math.inf,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.max_in_flight = max_in_flight
        self.max_waiting = max_waiting
        self.max_waiting_total = max_waiting_total
        self.in_flight_images = 0
        self.waiting_images = 0
        self.waiting_requests = 0
        self._clock = clock
        self._virtual_time = 0.0
        self._lines: dict[str, _Line] = {}
        self._mean_turn_s = 0.0

    @asynccontextmanager
    async def turn(self, tenant: str, weight: float, num_images: int) -> AsyncIterator[None]:
        """The block is this request's turn; it may have to wait for it. A waiter that is cancelled leaves its line at once.

        Raises:
            QueueFull: see `check_room`.
        """
        if self.waiting_requests or not self._fits(num_images):
            self.check_room(tenant, num_images)
            await self._wait(tenant, weight, num_images)
        else:
            self._begin(self._virtual_time + num_images / weight, num_images)
        started = self._clock()
        try:
            yield
        finally:
            took_s = self._clock() - started
            self._mean_turn_s += (took_s - self._mean_turn_s) * (_NEWEST_SHARE if self._mean_turn_s else 1)
            self._end(num_images)

    def check_room(self, tenant: str, num_images: int) -> None:
        """Raises QueueFull if a request of this size would have to wait and may not. An empty line takes any one request."""
        if not self.waiting_requests and self._fits(num_images):
            return
        line = self._lines.get(tenant)
        own = line.cost if line else 0
        if own and own + num_images > self.max_waiting:
            raise QueueFull(f"{own} of your images wait already, {self.max_waiting:g} may", self._drain_s(own))
        if self.waiting_images and self.waiting_images + num_images > self.max_waiting_total:
            raise QueueFull(
                f"{self.waiting_images} images wait already, {self.max_waiting_total:g} may", self._drain_s(self.waiting_images)
            )

    def _fits(self, num_images: int) -> bool:
        return self.in_flight_images == 0 or self.in_flight_images + num_images <= self.max_in_flight

    async def _wait(self, tenant: str, weight: float, num_images: int) -> None:
        # A tenant without a line has asked for nothing beyond what it got: it begins where everybody is.
        line = self._lines.setdefault(tenant, _Line(self._virtual_time))
        waiter = _Waiter(num_images, asyncio.get_running_loop().create_future())
        line.weight = weight
        line.waiters.append(waiter)
        line.cost += num_images
        self.waiting_images += num_images
        self.waiting_requests += 1
        try:
            await waiter.granted
        except asyncio.CancelledError:
            if not waiter.granted.cancelled():  # its turn came in the same moment
                self._end(num_images)
            elif waiter in line.waiters:
                line.waiters.remove(waiter)
                self._left(tenant, line, num_images)
                self._dispatch()  # it may have been the large one that the others waited behind
            raise

    def _dispatch(self) -> None:
        """Give turns while there is room. The first in order is never overtaken, else a large request might wait for ever."""
        while self._lines:
            tenant, line = min(self._lines.items(), key=lambda item: item[1].finish())
            waiter = line.waiters[0]
            cancelled = waiter.granted.cancelled()  # its task is about to notice
            if not cancelled:
                if not self._fits(waiter.cost):
                    return
                line.start = line.finish()
                self._begin(line.start, waiter.cost)
                waiter.granted.set_result(None)
            line.waiters.popleft()
            self._left(tenant, line, waiter.cost)

    def _left(self, tenant: str, line: _Line, num_images: int) -> None:
        line.cost -= num_images
        self.waiting_images -= num_images
        self.waiting_requests -= 1
        if not line.waiters:
            del self._lines[tenant]

    def _begin(self, finish: float, num_images: int) -> None:
        self._virtual_time = finish
        self.in_flight_images += num_images

    def _end(self, num_images: int) -> None:
        self.in_flight_images -= num_images
        self._dispatch()

    def _drain_s(self, num_images: int) -> float:
        """About how long so many images need, by Little's law: images a second = images under way / how long a turn takes."""
        drain_s = num_images * self._mean_turn_s / max(1, self.in_flight_images)
        return min(max(drain_s, _SHORTEST_RETRY_S), _LONGEST_RETRY_S)
