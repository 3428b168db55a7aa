"""Token buckets and concurrency of one tenant, by a clock that the test moves."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from teacher_server.problems import Problem
from teacher_server.quotas import TenantUsage, TokenBucket
from teacher_server.settings import TenantQuota


class Clock:
    """Seconds that pass when told to."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def refused(usage: TenantUsage, num_images: int | None = None) -> Problem:
    with pytest.raises(Problem) as caught:
        usage.enter().__enter__() if num_images is None else usage.charge(num_images)
    assert caught.value.status == 429
    return caught.value


def test_images_a_second_with_their_burst_and_the_time_to_come_back() -> None:
    clock = Clock()
    usage = TenantUsage("alice", TenantQuota(images_per_s=10, burst_s=2), clock)
    usage.charge(15)
    problem = refused(usage, 6)
    assert (problem.code, problem.retry_after_s) == ("too_many_images", pytest.approx(0.1))
    assert "alice" in problem.message
    assert "10 images a second" in problem.message
    assert problem.answer().headers["retry-after"] == "1"
    clock.now += 0.1
    usage.charge(6)
    assert refused(usage, 1).retry_after_s == pytest.approx(0.1)
    clock.now += 3600  # the burst is all that is saved up
    usage.charge(20)
    assert refused(usage, 20).retry_after_s == pytest.approx(2)


def test_a_request_above_the_burst_passes_when_the_bucket_is_full_and_is_paid_for_afterwards() -> None:
    clock = Clock()
    usage = TenantUsage("alice", TenantQuota(images_per_s=10, burst_s=1), clock)
    usage.charge(50)
    clock.now += 4.9
    assert refused(usage, 10).retry_after_s == pytest.approx(0.1)
    clock.now += 0.1
    usage.charge(10)


def test_requests_a_second() -> None:
    clock = Clock()
    usage = TenantUsage("alice", TenantQuota(requests_per_s=0.5, burst_s=2), clock)
    with usage.enter():
        pass
    problem = refused(usage)
    assert (problem.code, problem.retry_after_s) == ("too_many_requests", pytest.approx(2))
    assert problem.answer().headers["retry-after"] == "2"
    clock.now += 2
    with usage.enter():
        pass


def test_requests_at_once() -> None:
    usage = TenantUsage("alice", TenantQuota(max_concurrent=2))
    with usage.enter(), usage.enter():
        assert refused(usage).code == "too_many_at_once"
    with pytest.raises(KeyError), usage.enter():
        raise KeyError  # a request that fails is over, too
    with usage.enter(), usage.enter():
        pass


def test_no_quota_is_no_limit() -> None:
    usage = TenantUsage("alice", TenantQuota())
    for _ in range(1000):
        usage.charge(1000)


@given(st.lists(st.tuples(st.floats(0, 5), st.integers(1, 60)), min_size=1, max_size=50), st.floats(0.1, 100), st.floats(0.1, 5))
def test_nobody_gets_more_than_the_rate_and_who_comes_back_when_told_is_served(
    requests: list[tuple[float, int]], rate: float, burst_s: float
) -> None:
    clock = Clock()
    started = clock.now
    bucket = TokenBucket(rate, max(1, rate * burst_s), clock)
    taken, largest = 0, 0
    for pause, cost in requests:
        clock.now += pause
        wait_s = bucket.take(cost)
        if wait_s:
            clock.now += wait_s
            assert bucket.take(cost) == 0
        taken, largest = taken + cost, max(largest, cost)
        assert taken <= bucket.burst + rate * (clock.now - started) * (1 + 1e-6) + largest


def test_what_is_given_back_can_be_used_again_but_nothing_beyond_the_burst() -> None:
    usage = TenantUsage("alice", TenantQuota(images_per_s=2, burst_s=3), lambda: 0.0)
    usage.charge(6)
    usage.refund(6)
    usage.refund(6)
    usage.charge(6)
    assert refused(usage, 1).code == "too_many_images"
    TenantUsage("bob", TenantQuota()).refund(3)
