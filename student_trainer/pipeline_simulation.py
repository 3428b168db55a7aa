"""The pipeline of stage 3 as a discrete-event simulation: decode -> ask the teacher -> keep the label -> train, in virtual time.

Flow: `Pipeline` (rates and bounds) -> `simulate` -> what came out a second, and who waited for whom. It is built like the real one: decode
threads a few batches ahead, a bounded number of batches with the teacher, whose copies work through the parts of a batch, labels kept one
batch after the other, batches trained in order, all workers in step. `bounds` is the closed form beside it (the bottleneck law): a pipeline
is never faster than its slowest station, and comes near it where its buffers are large enough for the variation of its stations.

Unit of data: one worker's part of a global batch. Times in seconds, rates in images a second.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections import deque
from dataclasses import dataclass, field

from pydantic import Field

from distill.config import Section
from distill.virtual_time import run_in_virtual_time

NO_LIMIT = 1e12
"""Rate of a station that never holds anything up. (JSON knows no infinity.)"""
_WARM_UP = 0.2
"""Share of the batches before which nothing is counted: the pipeline fills."""


class Pipeline(Section):
    """One stage 3, by its rates."""

    workers: int = Field(default=1, ge=1)
    """Student workers, each with decode threads and a stream of its own."""
    batch: int = Field(ge=1)
    """Images of one step of one worker."""
    decode_threads: int = Field(default=2, ge=1)
    """Of each worker."""
    decode_rate: float = Field(gt=0)
    """Images a second of one thread."""
    batches_ahead: int = Field(default=4, ge=1)
    """Batches that a worker decodes ahead."""
    asks: bool = True
    """Whether labels come from the teacher; else from the store."""
    in_flight: int = Field(default=4, ge=1)
    """Batches of one worker that may be with the teacher, and as many more that wait for the training step."""
    teachers: int = Field(default=1, ge=1)
    """Teacher instances, all for all workers."""
    teacher_rate: float = Field(gt=0)
    """Images a second of one instance."""
    part: int = Field(default=8, ge=1)
    """Most images of one message to the teacher."""
    latency_s: float = Field(default=0.0, ge=0)
    """Of a message, beside the teacher's work: network, batching delay."""
    failure_share: float = Field(default=0.0, ge=0, lt=1)
    """Share of messages that fail after the teacher's work, and are asked again at once."""
    keep_rate: float = Field(default=NO_LIMIT, gt=0)
    """Labels a second that one worker encodes and keeps, or reads from the store."""
    student_rate: float = Field(gt=0)
    """Images a second that one worker trains all students on."""
    variation: float = Field(default=0.2, ge=0)
    """Standard deviation over mean of the service times of decoding, the teacher and the store; gamma-distributed."""
    student_variation: float = Field(default=0.02, ge=0)
    """The same of training steps. Workers in step wait for the slowest of them, so that it counts more the more there are."""


class Simulated(Section):
    """What came out."""

    images_per_s: float
    """Of all workers together."""
    waits: dict[str, float]
    """Share of a worker's time by what it waited for: decode, teacher, store; student: it trained."""
    teacher_busy: float
    """Share of the time that a teacher instance worked."""
    decode_busy: float
    """Share of the time that a decode thread worked."""


def bounds(p: Pipeline) -> dict[str, float]:
    """Station -> most images a second of all workers together. The smallest one is the pipeline's."""
    found = {
        "decode": p.workers * p.decode_threads * p.decode_rate,
        "store": p.workers * p.keep_rate,
        "student": p.workers * p.student_rate,
    }
    if p.asks:
        found["teacher"] = p.teachers * p.teacher_rate * (1 - p.failure_share)
        part = min(p.part, p.batch)
        parallel = math.ceil(p.batch / part)
        alone_s = p.latency_s + max(part / p.teacher_rate, p.batch / (p.teacher_rate * min(p.teachers, parallel)))
        # Little's law: no more batches under way than in_flight, each for at least as long as it takes alone.
        found["in flight"] = p.workers * p.in_flight * p.batch / (alone_s + p.batch / p.keep_rate)
    return found


@dataclass
class _Run:
    """What all workers share while they run."""

    p: Pipeline
    num_batches: int
    random: random.Random
    teachers: asyncio.Semaphore
    barrier: asyncio.Barrier
    teacher_busy_s: float = 0.0
    decode_busy_s: float = 0.0
    waits: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("decode", "teacher", "store", "student"), 0.0))
    counted: int = 0
    counted_s: float = 0.0

    def service_s(self, mean_s: float, variation: float | None = None) -> float:
        variation = self.p.variation if variation is None else variation
        if variation == 0 or mean_s == 0:
            return mean_s
        shape = 1 / variation**2
        return self.random.gammavariate(shape, mean_s / shape)


def simulate(p: Pipeline, *, num_batches: int = 300, seed: int = 0) -> Simulated:
    """Run `num_batches` batches of every worker."""
    return run_in_virtual_time(_simulate(p, num_batches, seed))


async def _simulate(p: Pipeline, num_batches: int, seed: int) -> Simulated:
    run = _Run(p, num_batches, random.Random(seed), asyncio.Semaphore(p.teachers), asyncio.Barrier(p.workers))
    loop = asyncio.get_running_loop()
    await asyncio.gather(*(_worker(run) for _ in range(p.workers)))
    total_s = sum(run.waits.values())
    return Simulated(
        images_per_s=run.counted * p.batch / run.counted_s * p.workers,
        waits={name: seconds / total_s for name, seconds in run.waits.items()},
        teacher_busy=run.teacher_busy_s / (loop.time() * p.teachers),
        decode_busy=run.decode_busy_s / (loop.time() * p.workers * p.decode_threads),
    )


async def _worker(run: _Run) -> None:
    """One worker: its stream, and the training loop that takes from it."""
    p, loop = run.p, asyncio.get_running_loop()
    ahead: asyncio.Queue[asyncio.Task[float]] = asyncio.Queue(p.in_flight)
    feeding = asyncio.create_task(_feed(run, ahead))
    first = int(_WARM_UP * run.num_batches)
    begun_s = 0.0
    for number in range(run.num_batches):
        if number == first:
            begun_s = loop.time()
        asked_s = loop.time()
        batch = await ahead.get()
        made_s = loop.time()
        answered_s = max(made_s, await batch)
        handed_s = loop.time()
        await asyncio.sleep(run.service_s(p.batch / p.student_rate, p.student_variation))
        await run.barrier.wait()
        if number >= first:
            run.waits["decode"] += made_s - asked_s
            run.waits["teacher"] += answered_s - made_s
            run.waits["store"] += handed_s - answered_s
            run.waits["student"] += loop.time() - handed_s
    run.counted = run.num_batches - first
    run.counted_s = max(run.counted_s, loop.time() - begun_s)
    await feeding


async def _feed(run: _Run, ahead: asyncio.Queue[asyncio.Task[float]]) -> None:
    """Decode ahead, start the labelling of each batch in order, wait where the queue is full."""
    p = run.p
    threads, slots, keeper = asyncio.Semaphore(p.decode_threads), asyncio.Semaphore(p.in_flight), asyncio.Lock()
    decoding: deque[asyncio.Task[None]] = deque()
    for number in range(run.num_batches + p.batches_ahead):
        if number < run.num_batches:
            decoding.append(asyncio.create_task(_decode(run, threads)))
        if len(decoding) > p.batches_ahead or number >= run.num_batches:
            await decoding.popleft()
            await ahead.put(asyncio.create_task(_label(run, slots, keeper)))


async def _decode(run: _Run, threads: asyncio.Semaphore) -> None:
    async with threads:
        took_s = run.service_s(run.p.batch / run.p.decode_rate)
        await asyncio.sleep(took_s)
        run.decode_busy_s += took_s


async def _label(run: _Run, slots: asyncio.Semaphore, keeper: asyncio.Lock) -> float:
    """When the teacher had answered, or (labels from the store) when it was this batch's turn to be read; what comes after is the store's.

    Waiting for a slot that a batch before holds while it is kept is the store's, too.
    """
    p, loop = run.p, asyncio.get_running_loop()
    answered_s = loop.time()
    async with slots:
        if p.asks:
            full, rest = divmod(p.batch, p.part)
            sizes = [p.part] * full + [rest] * bool(rest)
            await asyncio.gather(*(_ask(run, size) for size in sizes))
            answered_s = loop.time()
        async with keeper:
            await asyncio.sleep(run.service_s(p.batch / p.keep_rate))
    return answered_s


async def _ask(run: _Run, size: int) -> None:
    """One message, asked until it is answered."""
    p = run.p
    while True:
        await asyncio.sleep(run.service_s(p.latency_s))
        async with run.teachers:
            took_s = run.service_s(size / p.teacher_rate)
            await asyncio.sleep(took_s)
            run.teacher_busy_s += took_s
        if run.random.random() >= p.failure_share:
            return
