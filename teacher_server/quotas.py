"""How much one tenant may ask for: requests and images a second, and requests at once.

Flow: a request with a valid key -> `TenantUsage.enter` (a request, at once or a second) -> its images are counted -> `TenantUsage.charge`.
Unit of data: one tenant. Time comes from outside, so a test can make it pass.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from teacher_server.problems import Problem
from teacher_server.settings import TenantQuota

_TOO_MANY_AT_ONCE_RETRY_S = 1.0


class TokenBucket:
    """`rate` tokens a second, saved up to `burst` of them.

    A request that costs more than the burst passes when the bucket is full and leaves it in debt: it is refused for no time at which it
    asks, and in the long run nobody gets more than `rate`.
    """

    def __init__(self, rate: float, burst: float, clock: Callable[[], float]) -> None:
        self.rate = rate
        self.burst = burst
        self._clock = clock
        self._tokens = burst
        self._last = clock()

    def take(self, cost: float) -> float:
        """0 if the tokens were there and are taken; else the seconds until they will be, and nothing is taken."""
        now = self._clock()
        self._tokens = min(self.burst, self._tokens + (now - self._last) * self.rate)
        self._last = now
        missing = min(cost, self.burst) - self._tokens
        if missing > 1e-9 * self.burst:  # rounding must not refuse whoever comes back exactly when told to
            return missing / self.rate
        self._tokens -= cost
        return 0.0

    def give_back(self, cost: float) -> None:
        """Undo one `take`."""
        self._tokens = min(self.burst, self._tokens + cost)


class TenantUsage:
    """What one tenant has used of its quota."""

    def __init__(self, name: str, quota: TenantQuota, clock: Callable[[], float] = time.monotonic) -> None:
        self.name = name
        self.quota = quota
        self._at_once = 0
        self._requests = _bucket(quota.requests_per_s, quota.burst_s, clock)
        self._images = _bucket(quota.images_per_s, quota.burst_s, clock)

    @contextmanager
    def enter(self) -> Iterator[None]:
        """The block is one request. Raises Problem 429 if it is one too many."""
        if self._at_once >= self.quota.max_concurrent:
            message = f"tenant {self.name} has {self._at_once} requests under way, its quota is {self.quota.max_concurrent} at once"
            raise Problem(429, "too_many_at_once", message, retry_after_s=_TOO_MANY_AT_ONCE_RETRY_S)
        wait_s = self._requests.take(1) if self._requests else 0.0
        if wait_s:
            message = f"tenant {self.name} asks more often than its quota of {self.quota.requests_per_s:g} requests a second"
            raise Problem(429, "too_many_requests", message, retry_after_s=wait_s)
        self._at_once += 1
        try:
            yield
        finally:
            self._at_once -= 1

    def charge(self, num_images: int) -> None:
        """Count the images of a request, before any work is done for them. Raises Problem 429 if they are over the quota."""
        wait_s = self._images.take(num_images) if self._images else 0.0
        if wait_s:
            message = f"tenant {self.name}: {num_images} images are over its quota of {self.quota.images_per_s:g} images a second"
            raise Problem(429, "too_many_images", message, retry_after_s=wait_s)

    def refund(self, num_images: int) -> None:
        """Undo one `charge`: no label was delivered, and that was not the tenant's doing."""
        if self._images:
            self._images.give_back(num_images)


def _bucket(rate: float | None, burst_s: float, clock: Callable[[], float]) -> TokenBucket | None:
    return TokenBucket(rate, max(1.0, rate * burst_s), clock) if rate else None
