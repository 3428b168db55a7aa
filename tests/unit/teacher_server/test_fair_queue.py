"""Whose turn it is: shares under a backlog, the bound, cancellation; and any order of events at all (hypothesis)."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_server.fair_queue import FairQueue, QueueFull


class Turns:
    """Requests before a queue: who got a turn, in which order; each turn ends when the test says so."""

    def __init__(self, queue: FairQueue) -> None:
        self.queue = queue
        self.started: list[str] = []
        self.ends: list[asyncio.Event] = []
        self.tasks: list[asyncio.Task[None]] = []

    async def ask(self, tenant: str, weight: float = 1.0, num_images: int = 1) -> asyncio.Task[None]:
        """A request that comes now."""

        async def request() -> None:
            async with self.queue.turn(tenant, weight, num_images):
                self.started.append(tenant)
                self.ends.append(end := asyncio.Event())
                await end.wait()

        task = asyncio.create_task(request())
        self.tasks.append(task)
        await settle()
        return task

    async def end(self, number: int) -> None:
        """The turn that was the `number`-th to start is over."""
        self.ends[number].set()
        await settle()

    async def end_all(self) -> None:
        """One turn after the other, in the order in which they start, until nobody waits."""
        done = 0
        while done < len(self.ends):
            await self.end(done)
            done += 1
        await asyncio.gather(*self.tasks, return_exceptions=True)


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def run(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(scenario())


def test_tenants_of_weight_3_and_1_are_served_3_to_1_under_a_backlog() -> None:
    async def scenario() -> None:
        turns = Turns(FairQueue(max_in_flight=1))
        await turns.ask("first")
        for _ in range(40):  # light asks first and much: neither buys it anything
            await turns.ask("light", 1)
        for _ in range(40):
            await turns.ask("heavy", 3)
        await turns.end_all()
        for length in (8, 16, 40, 52):
            served = Counter(turns.started[1 : 1 + length])
            assert abs(served["heavy"] - length * 3 / 4) <= 1, (length, served)

    run(scenario)


def test_images_count_and_not_requests() -> None:
    async def scenario() -> None:
        turns = Turns(FairQueue(max_in_flight=8))
        await turns.ask("first", 1, 8)
        for _ in range(10):
            await turns.ask("large", 1, 8)
        for _ in range(80):
            await turns.ask("small", 1, 1)
        await turns.end_all()
        first_half = Counter(turns.started[1 : 1 + 45])  # 5 * 8 images of one, 40 * 1 of the other
        assert abs(first_half["large"] - 5) <= 1

    run(scenario)


def test_who_was_idle_has_saved_nothing_up() -> None:
    async def scenario() -> None:
        turns = Turns(FairQueue(max_in_flight=1))
        await turns.ask("busy")
        for _ in range(20):
            await turns.ask("busy")
        for number in range(10):
            await turns.end(number)
        before = len(turns.started)
        for _ in range(20):
            await turns.ask("newcomer")
        await turns.end_all()
        served = Counter(turns.started[before : before + 10])
        assert abs(served["newcomer"] - 5) <= 1

    run(scenario)


def test_the_bound_holds_and_a_larger_request_goes_alone() -> None:
    async def scenario() -> None:
        queue = FairQueue(max_in_flight=4)
        turns = Turns(queue)
        await turns.ask("a", 1, 3)
        await turns.ask("b", 1, 9)
        await turns.ask("c", 0.1, 1)  # would fit, but let those by and the large one waits for ever
        assert turns.started == ["a"]
        await turns.end(0)
        assert (turns.started, queue.in_flight_images) == (["a", "b"], 9)
        await turns.end_all()
        assert turns.started == ["a", "b", "c"]
        assert queue.in_flight_images == queue.waiting_images == queue.waiting_requests == 0

    run(scenario)


def test_a_cancelled_waiter_leaves_at_once_and_lets_the_next_one_by() -> None:
    async def scenario() -> None:
        queue = FairQueue(max_in_flight=4)
        turns = Turns(queue)
        await turns.ask("a", 1, 2)
        large = await turns.ask("b", 1, 4)
        await turns.ask("b", 1, 1)
        assert (queue.waiting_requests, queue.waiting_images) == (2, 5)
        large.cancel()
        await settle()
        assert turns.started == ["a", "b"], "there was room for the small one behind the large one"
        assert (queue.waiting_requests, queue.in_flight_images) == (0, 3)
        await turns.end_all()

    run(scenario)


def test_a_waiter_cancelled_in_the_moment_of_its_turn_hands_the_turn_on() -> None:
    async def scenario() -> None:
        queue = FairQueue(max_in_flight=1)
        turns = Turns(queue)
        await turns.ask("a")
        second = await turns.ask("b")
        await turns.ask("c")
        turns.ends[0].set()
        while queue.waiting_requests == 2:  # noqa: ASYNC110 - one pass of the event loop at a time
            await asyncio.sleep(0)
        second.cancel()  # it has its turn, but has not run yet
        await settle()
        assert turns.started == ["a", "c"]
        await turns.end_all()
        assert queue.in_flight_images == 0

    run(scenario)


def test_a_turn_may_be_given_while_a_cancelled_waiter_has_not_yet_noticed() -> None:
    async def scenario() -> None:
        queue = FairQueue(max_in_flight=1)
        turns = Turns(queue)
        await turns.ask("a")
        second = await turns.ask("b")
        await turns.ask("c")
        turns.ends[0].set()
        second.cancel()
        await settle()
        assert turns.started == ["a", "c"]
        await turns.end_all()
        assert queue.in_flight_images == queue.waiting_requests == 0

    run(scenario)


def test_one_tenant_is_full_before_the_queue_is() -> None:
    async def scenario() -> None:
        clock = iter(range(0, 1000, 2))
        queue = FairQueue(1, max_waiting=4, max_waiting_total=6, clock=lambda: next(clock))
        turns = Turns(queue)
        await turns.ask("a")
        await turns.end(0)  # a turn takes 2 s by this clock
        await turns.ask("a")
        await turns.ask("a", 1, 4)
        with pytest.raises(QueueFull, match="4 of your images wait already, 4 may") as full:
            queue.check_room("a", 1)
        assert full.value.retry_after_s == 4 * 2 / 1
        queue.check_room("b", 2)
        await turns.ask("b", 1, 2)
        with pytest.raises(QueueFull, match="6 images wait already, 6 may"):
            queue.check_room("c", 1)
        refused = await turns.ask("c")
        assert isinstance(refused.exception(), QueueFull)
        await turns.end_all()
        queue.check_room("a", 100)  # there is room at once: nothing would wait

    run(scenario)


EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("ask"), st.sampled_from("abc"), st.integers(1, 5)),
        st.tuples(st.just("end"), st.integers(0, 30), st.just(0)),
        st.tuples(st.just("cancel"), st.integers(0, 30), st.just(0)),
        st.tuples(st.just("settle"), st.just(0), st.just(0)),
    ),
    max_size=60,
)


@settings(max_examples=300)
@given(events=EVENTS, bound=st.integers(5, 8))
def test_whatever_happens_the_bound_holds_and_everybody_is_served(events: list[tuple[str, Any, int]], bound: int) -> None:
    async def scenario() -> None:
        queue = FairQueue(bound)
        under_way = 0
        served: set[int] = set()
        ends: list[asyncio.Event] = []
        tasks: list[asyncio.Task[None]] = []
        cancelled: set[int] = set()

        async def request(number: int, tenant: str, cost: int) -> None:
            nonlocal under_way
            async with queue.turn(tenant, {"a": 1.0, "b": 3.0, "c": 0.5}[tenant], cost):
                under_way += cost
                try:
                    assert under_way <= bound
                    served.add(number)
                    await ends[number].wait()
                finally:
                    under_way -= cost

        for kind, which, cost in events:
            if kind == "ask":
                ends.append(asyncio.Event())
                tasks.append(asyncio.create_task(request(len(tasks), which, cost)))
            elif kind == "settle":
                await settle()
            elif which < len(tasks):  # without a pause: several things happen within one turn of the event loop
                if kind == "end":
                    ends[which].set()
                else:
                    tasks[which].cancel()
                    cancelled.add(which)
        for end in ends:
            end.set()
        results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 10)
        assert [result for result in results if not isinstance(result, asyncio.CancelledError | None)] == []
        assert served >= set(range(len(tasks))) - cancelled, "a wakeup was lost"
        assert (queue.in_flight_images, queue.waiting_images, queue.waiting_requests) == (0, 0, 0)
        assert queue._lines == {}

    run(scenario)
