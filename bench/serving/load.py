"""A closed loop of askers, and what their requests cost.

Unit of data: one cell: one system under one load. Every system answers the same number of images, so that the whole of its time counts,
the first request and the last one included. CPU seconds are those of the asking process and of all processes of the system.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil

Ask = Callable[[int], Awaitable[Any]]
"""Sends the request of this number and returns what came back, when it is whole."""


@dataclass(frozen=True)
class Load:
    """`concurrency` askers, each with one request of `batch` images in flight."""

    batch: int
    concurrency: int

    def __str__(self) -> str:
        return f"{self.batch} x {self.concurrency}"


LOADS = (Load(1, 1), Load(1, 16), Load(1, 64), Load(8, 4), Load(32, 4))


@dataclass(frozen=True)
class Cost:
    """What one cell came to."""

    images_per_s: float
    p50_ms: float
    p99_ms: float
    cpu_ms_per_image: float


async def measure(ask: Ask, load: Load, num_images: int, pids: Sequence[int]) -> Cost:
    """Answer `num_images` images, rounded up to whole rounds of all askers, after one round that is not counted."""
    num_requests = -(-num_images // (load.batch * load.concurrency)) * load.concurrency
    await asyncio.gather(*(ask(number) for number in range(load.concurrency)))
    numbers = iter(range(num_requests))
    times_s: list[float] = []

    async def asker() -> None:
        for number in numbers:
            began = time.perf_counter()
            await ask(number)
            times_s.append(time.perf_counter() - began)

    cpu_before, began = cpu_seconds(pids), time.perf_counter()
    await asyncio.gather(*(asker() for _ in range(load.concurrency)))
    seconds, cpu = time.perf_counter() - began, cpu_seconds(pids) - cpu_before
    answered = num_requests * load.batch
    return Cost(answered / seconds, *_percentiles_ms(times_s), 1000 * cpu / answered)


def _percentiles_ms(times_s: Sequence[float]) -> tuple[float, float]:
    p50_s, p99_s = np.percentile(times_s, [50, 99])
    return 1000 * float(p50_s), 1000 * float(p99_s)


def cpu_seconds(pids: Sequence[int]) -> float:
    """User and system time of these processes, of all their descendants, and of this process."""
    seconds = sum(psutil.Process().cpu_times()[:2])
    for pid in pids:
        try:
            root = psutil.Process(pid)
            family = [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            continue
        for process in family:
            try:
                seconds += sum(process.cpu_times()[:2])
            except psutil.NoSuchProcess:
                continue
    return seconds
