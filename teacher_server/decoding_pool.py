"""Threads that turn encoded images into crops, shared fairly between the requests of all tenants.

Flow: the files of one request -> chunks of a few -> each chunk waits its tenant's turn -> a thread decodes and cuts -> crops or errors.
Unit of data: one chunk of images. A single image behind a batch of a thousand waits for a chunk, not for the batch.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from teacher_server.fair_queue import FairQueue
from teacher_server.quotas import TenantUsage

T = TypeVar("T")
U = TypeVar("U")

_CHUNK = 4


class DecodingPool:
    """One thread for each core. Belongs to one event loop."""

    def __init__(self) -> None:
        num_threads = os.cpu_count() or 1
        self._threads = ThreadPoolExecutor(max_workers=num_threads, thread_name_prefix="gateway-decode")
        # Two chunks a thread: the next one is there when a thread is done, and no more lie before a tenant whose turn comes.
        self._queue = FairQueue(max_in_flight=2 * _CHUNK * num_threads)

    async def map(self, tenant: TenantUsage, work: Callable[[int, T], U], inputs: list[T]) -> list[U]:
        """`work(position, input)` of every input, in order. Cancelled, it starts nothing more; what a thread has begun it finishes."""
        starts = range(0, len(inputs), _CHUNK)
        if len(starts) == 1:
            return await self._chunk(tenant, work, inputs, 0)
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._chunk(tenant, work, inputs, start)) for start in starts]
        return [result for task in tasks for result in task.result()]

    async def run(self, work: Callable[[], T]) -> T:
        """Other work that would hold up the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def close(self) -> None:
        """Drop what has not begun."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _chunk(self, tenant: TenantUsage, work: Callable[[int, T], U], inputs: list[T], start: int) -> list[U]:
        chunk = inputs[start : start + _CHUNK]
        async with self._queue.turn(tenant.name, tenant.quota.weight, len(chunk)):
            return await self.run(lambda: [work(position, item) for position, item in enumerate(chunk, start)])
