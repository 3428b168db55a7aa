"""How a teacher is best run on this machine: batch size x instances x threads, measured with the real Triton and the real teacher.

Flow: `candidates` -> `measure_all`: each is loaded into a running Triton and asked by as many clients as keep it busy; the better half is
measured again, and half of that once more -> `choose`: the most images a second within a latency limit.
Unit of data: one candidate, measured once a round. Machines are noisy and drift: rounds interleave the candidates, medians decide.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import Field

from distill.config import Section
from distill.errors import DistillError
from teacher_server.activation import TritonControl
from teacher_server.backend import Crops
from teacher_server.triton import TritonTeacher

BATCH_SIZES = (1, 4, 8, 16, 32, 64, 128, 256)
NUM_ROUNDS = 3
WORTH_A_LOOK = 1.25
"""A round may find a candidate's median latency this much over the limit and be wrong about it."""
AS_FAST = 0.97
"""Candidates that reach this share of the best throughput count as equally fast; the one with the lower latency is chosen."""
NOT_REACHED = "not reached in the time"
"""Note of a row that the first round did not get to."""
_SHORTEST_WINDOW_S = 0.5
_LONGEST_WINDOW_S = 6.0
_REQUESTS_A_CLIENT = 3
_FAILED = "failed: "
_LOAD_GUESS_S = 2.0
_LOOKS_A_CANDIDATE = 1.75
"""All in the first round, half of them in the second, a quarter in the third."""
_CLIENTS_A_COPY = 2
"""One is answered, one waits: enough to keep a copy busy, and no queue that would be measured instead of the copy."""


class Candidate(NamedTuple):
    """One way to run the teacher."""

    batch_size: int
    """Images of one request, and the batch that Triton forms."""
    instance_count: int
    """Copies of the teacher."""
    intra_op_threads: int
    """Threads of each copy; 0 on a GPU."""


class Round(NamedTuple):
    """What one measurement found."""

    images_per_s: float
    p50_ms: float
    p99_ms: float


class Measured(Section):
    """One row of the table: a candidate and what its rounds found, as medians over the rounds."""

    batch_size: int
    """Images of one request, and the batch that Triton forms."""
    instance_count: int
    """Copies of the teacher."""
    intra_op_threads: int
    """Threads of each copy; 0 on a GPU."""
    num_rounds: int = Field(ge=0)
    """How often it was measured."""
    images_per_s: float | None = None
    """Images answered a second."""
    p50_ms: float | None = None
    """Median time from question to answer, in ms, with all instances busy and as many requests waiting."""
    p99_ms: float | None = None
    """Time from question to answer that 99 of 100 requests keep, in ms."""
    note: str = ""
    """Why it was not measured, or not to the end."""

    @property
    def candidate(self) -> Candidate:
        """The candidate of this row."""
        return Candidate(self.batch_size, self.instance_count, self.intra_op_threads)


def usable_cores() -> int:
    """Cores that this process may use: those it may be scheduled on, and not more than the quota of its container."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="utf-8").split()
        cores = min(cores, max(1, int(quota) // int(period)))
    except (OSError, ValueError):
        pass  # no cgroup of version 2, or no quota ("max")
    return cores


def candidates(cores: int, max_batch_size: int, *, budget_s: float = 3600.0, on_gpu: bool = False) -> list[Candidate]:
    """What is worth measuring, small batches first. Where the time is short, every second batch size is left out, and again.

    On the CPU the copies use between half of the cores and all of them: more threads than cores wait for each other, and fewer than half
    leave a machine idle that does nothing else. On a GPU only the number of copies counts.
    """
    powers = [1 << power for power in range(cores.bit_length())]  # up to `cores`
    sizes = sorted({*powers, cores})
    pairs = [(count, threads) for count in powers for threads in sizes if cores / 2 <= count * threads <= cores]
    if on_gpu:
        pairs = [(1, 0), (2, 0), (4, 0)]
    batches = sorted({*(size for size in BATCH_SIZES if size <= max_batch_size)}) or [max_batch_size]
    affordable = budget_s / (_LOOKS_A_CANDIDATE * (_LOAD_GUESS_S + _SHORTEST_WINDOW_S))
    while len(batches) * len(pairs) > affordable and len(batches) > 2:
        batches = batches[::2]
    return [Candidate(batch_size, count, threads) for batch_size in batches for count, threads in pairs]


def needed_s(table: Sequence[Measured], spent_s: float, num_candidates: int) -> float | None:
    """How long a tuning of `num_candidates` would take, where `spent_s` did not do for the first round; None where it did."""
    if not any(row.note == NOT_REACHED for row in table):
        return None
    num_measured = sum(1 for row in table if row.num_rounds or row.note.startswith(_FAILED))
    return _LOOKS_A_CANDIDATE * num_candidates * spent_s / max(1, num_measured)


def choose(table: Sequence[Measured], max_p99_ms: float) -> Measured | None:
    """The row with the most images a second whose p99 is within the limit, of equally fast ones that with the lowest p99; or None.

    Rows that were measured as often as any come first: one lucky round must not win over medians. `Tuner.table` counts only the rounds
    that all who were still in them finished, so a time that ends in the middle of a round decides nothing.
    """
    within = [row for row in table if row.images_per_s is not None and row.p99_ms is not None and row.p99_ms <= max_p99_ms]
    most_rounds = max((row.num_rounds for row in within), default=0)
    sure = [row for row in within if row.num_rounds == most_rounds]
    if not sure:
        return None
    best = max(row.images_per_s or 0.0 for row in sure)
    return min((row for row in sure if (row.images_per_s or 0.0) >= AS_FAST * best), key=lambda row: (row.p99_ms, row.instance_count))


class Tuner:
    """Measures candidates on one running Triton, within a time. `table()` is what is known so far."""

    def __init__(
        self, control: TritonControl, model: str, crops_NHWC: Crops, config_of: Callable[[Candidate], Any], max_p99_ms: float
    ) -> None:
        """
        Args:
            control: a Triton that nobody else asks.
            model: name of the teacher.
            crops_NHWC: uint8 [N,S,S,3]; as many as the largest batch.
            config_of: candidate -> Triton's configuration that runs the teacher so.
            max_p99_ms: the latency limit.
        """
        self._control = control
        self._model = model
        self._crops_NHWC = crops_NHWC
        self._config_of = config_of
        self._max_p99_ms = max_p99_ms
        self._rounds: dict[Candidate, list[Round]] = {}
        self._notes: dict[Candidate, str] = {}
        self._load_s = [_LOAD_GUESS_S]
        self._num_finished = 0

    def measure_all(self, wanted: Sequence[Candidate], budget_s: float) -> Iterator[Candidate]:
        """Measure for at most about `budget_s` seconds; gives each candidate after it was looked at, so that progress can be shown."""
        deadline = time.monotonic() + budget_s
        self._rounds = {candidate: [] for candidate in wanted}
        self._num_finished = 0
        survivors = list(wanted)
        for number in range(NUM_ROUNDS):
            finished = True
            left = [len(survivors) / 2**later for later in range(NUM_ROUNDS - number)]
            for position, candidate in enumerate(survivors):
                if (reason := self._not_worth_it(candidate)) or time.monotonic() > deadline:
                    finished = finished and reason is not None
                    if not self._rounds[candidate]:
                        self._notes[candidate] = reason or NOT_REACHED
                    yield candidate
                    continue
                to_do = sum(left) - position
                self._measure(candidate, (deadline - time.monotonic()) / to_do - statistics.median(self._load_s))
                yield candidate
            if not finished:
                return
            self._num_finished = number + 1
            survivors = self._better_half(survivors)

    def num_measurements(self, num_candidates: int) -> int:
        """How many candidates `measure_all` looks at over all rounds."""
        total = 0
        for _ in range(NUM_ROUNDS):
            total += num_candidates
            num_candidates = _half(num_candidates)
        return total

    def table(self) -> list[Measured]:
        """One row for each candidate, from the rounds that every candidate still in them was looked at in; the first counts in any case."""
        counted = {candidate: rounds[: max(1, self._num_finished)] for candidate, rounds in self._rounds.items()}
        return [
            Measured(
                **candidate._asdict(),
                num_rounds=len(rounds),
                note=self._notes.get(candidate, ""),
                **({name: statistics.median(getattr(r, name) for r in rounds) for name in Round._fields} if rounds else {}),
            )
            for candidate, rounds in counted.items()
        ]

    def _measure(self, candidate: Candidate, window_s: float) -> None:
        window_s = min(max(window_s, _SHORTEST_WINDOW_S), _LONGEST_WINDOW_S)
        started = time.monotonic()
        try:
            self._control.load(self._model, self._config_of(candidate))
            self._load_s.append(time.monotonic() - started)
            found = asyncio.run(measure(self._control.url, self._model, self._crops_NHWC, candidate, window_s))
        except DistillError as error:
            self._notes[candidate] = f"{_FAILED}{error}"[:200]
            return
        self._rounds[candidate].append(found)

    def _not_worth_it(self, candidate: Candidate) -> str | None:
        """Why a candidate need not be measured: it failed, or a smaller batch of the same copies takes too long already."""
        if candidate in self._notes:
            return self._notes[candidate]
        for other, rounds in self._rounds.items():
            same_copies = other[1:] == candidate[1:] and other.batch_size < candidate.batch_size
            if same_copies and rounds and min(found.p50_ms for found in rounds) > WORTH_A_LOOK * self._max_p99_ms:
                return f"batch {other.batch_size} takes too long already"
        return None

    def _better_half(self, survivors: Sequence[Candidate]) -> list[Candidate]:
        """Those to measure again, in the opposite order: what comes late in one round comes early in the next."""

        def merit(candidate: Candidate) -> tuple[bool, float]:
            # From the median latency: one stall of the machine in a short window ruins p99 and the rate of that window, not the candidate.
            p50_ms = statistics.median(found.p50_ms for found in self._rounds[candidate])
            return p50_ms <= WORTH_A_LOOK * self._max_p99_ms, candidate.batch_size * candidate.instance_count / p50_ms

        known = sorted((candidate for candidate in survivors if self._rounds[candidate]), key=merit, reverse=True)
        kept = set(known[: _half(len(survivors))])
        return [candidate for candidate in reversed(survivors) if candidate in kept]


def _half(count: int) -> int:
    return min(count, max(3, -(-count // 2)))


async def measure(url: str, model: str, crops_NHWC: Crops, candidate: Candidate, window_s: float) -> Round:
    """Ask for `window_s` seconds, or longer where an answer takes longer, with two clients for each copy.

    Raises:
        TeacherUnavailable, TeacherAnswerError, RequestRefused: as asking does.
    """
    num_clients = _CLIENTS_A_COPY * candidate.instance_count
    crops_BHWC = crops_NHWC[: candidate.batch_size]
    teacher = TritonTeacher(url, model, max_in_flight=64)
    latencies_s: list[float] = []
    try:
        await asyncio.gather(*(teacher.logits(crops_BHWC) for _ in range(num_clients)))  # the first answers are the slowest
        started = time.monotonic()

        async def client() -> None:
            answered = 0
            while answered < _REQUESTS_A_CLIENT or time.monotonic() - started < window_s:
                asked = time.monotonic()
                await teacher.logits(crops_BHWC)
                latencies_s.append(time.monotonic() - asked)
                answered += 1

        await asyncio.gather(*(client() for _ in range(num_clients)))
        took_s = time.monotonic() - started
    finally:
        await teacher.close()
    p50_ms, p99_ms = (float(value) * 1000 for value in np.percentile(latencies_s, [50, 99]))
    return Round(len(latencies_s) * candidate.batch_size / took_s, p50_ms, p99_ms)
