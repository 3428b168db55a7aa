"""Threads that turn encoded images into crops, shared fairly between the requests of all tenants.

Flow: the files of one request -> chunks of a few -> each chunk waits its tenant's turn -> a thread decodes and cuts -> crops or errors.
Unit of data: one chunk of images. A single image behind a batch of a thousand waits for a few chunks, not for the batch, also where both
are of one tenant: each request has only so many chunks in line.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from teacher_server.fair_queue import FairQueue
from teacher_server.quotas import TenantUsage

T = TypeVar("T")
U = TypeVar("U")

_CHUNK = 4
_ANSWER_THREADS = 2


class PixelBudget:
    """How many pixels all threads together decode at once: one image of the largest size, or several smaller ones."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self._changed = threading.Condition()
        self._first = threading.Lock()

    @contextmanager
    def hold(self, num_pixels: int) -> Iterator[None]:
        """Blocks its thread until there is room. An image over the limit needs none: it is refused undecoded."""
        cost = num_pixels if num_pixels <= self.limit else 0
        with self._first, self._changed:  # whoever waits is overtaken by nobody, else a large image might wait for ever
            self._changed.wait_for(lambda: self.used + cost <= self.limit)
            self.used += cost
        try:
            yield
        finally:
            with self._changed:
                self.used -= cost
                self._changed.notify_all()


class DecodingPool:
    """One thread for each core, and two for parsing and writing JSON: answers do not wait for images. Belongs to one event loop."""

    def __init__(self, max_pixels: int) -> None:
        """`max_pixels`: of one image, and of all that are decoded at once."""
        self.pixels = PixelBudget(max_pixels)
        num_threads = os.cpu_count() or 1
        self._threads = ThreadPoolExecutor(max_workers=num_threads, thread_name_prefix="gateway-decode")
        self._answers = ThreadPoolExecutor(max_workers=_ANSWER_THREADS, thread_name_prefix="gateway-json")
        # Two chunks a thread: the next one is there when a thread is done, and no more lie before a tenant whose turn comes.
        self._num_chunks = 2 * num_threads
        self._queue = FairQueue(max_in_flight=_CHUNK * self._num_chunks)

    async def map(self, tenant: TenantUsage, work: Callable[[int, T], U], inputs: list[T]) -> list[U]:
        """`work(position, input)` of every input, in order. Cancelled, it starts nothing more; what a thread has begun it finishes."""
        starts = iter(range(0, len(inputs), _CHUNK))
        results: dict[int, list[U]] = {}

        async def one_after_another() -> None:
            for start in starts:  # shared by all of them
                results[start] = await self._chunk(tenant, work, inputs, start)

        if len(inputs) <= _CHUNK:
            await one_after_another()
        else:
            async with asyncio.TaskGroup() as group:
                for _ in range(self._num_chunks):
                    group.create_task(one_after_another())
        return [result for start in sorted(results) for result in results[start]]

    async def run(self, work: Callable[[], T]) -> T:
        """Other work that would hold up the event loop: JSON, in and out."""
        return await asyncio.get_running_loop().run_in_executor(self._answers, work)

    def close(self) -> None:
        """Drop what has not begun."""
        for threads in (self._threads, self._answers):
            threads.shutdown(wait=False, cancel_futures=True)

    async def _chunk(self, tenant: TenantUsage, work: Callable[[int, T], U], inputs: list[T], start: int) -> list[U]:
        chunk = inputs[start : start + _CHUNK]
        async with self._queue.turn(tenant.name, tenant.quota.weight, len(chunk)):
            return await asyncio.get_running_loop().run_in_executor(
                self._threads, lambda: [work(position, item) for position, item in enumerate(chunk, start)]
            )
