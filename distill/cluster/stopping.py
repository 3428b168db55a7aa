"""How a run ends in order at Ctrl-C and SIGTERM: a checkpoint first, then the end.

    signal -> `run_stoppable` (the driver's main thread) -> whoever asks the workers -> `StopAgreement` (the same step in all workers)
    -> the loop keeps a checkpoint and returns -> `run_stoppable` raises what the signal means

Unit of data: one wish to stop. Nothing here knows how the wish travels; `distill.cluster.group` sends it over its board.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

import torch
import torch.distributed as dist

from distill.errors import Terminated

ASK_EVERY_S = 0.5
MOST_STEPS = 100
"""Between two askings: steps that were fast may become slow, and one asking in a hundred steps costs nothing."""
LOOK_EVERY_S = 0.1

T = TypeVar("T")


class StopAgreement:
    """Whether the loop is to stop, with the same answer in all workers at the same step.

    Several workers ask worker 0 (a broadcast of two numbers) at steps that all know beforehand: its answer says after how many steps they
    ask again, which is about `ASK_EVERY_S`.

    Args:
        wants_stop: whether a stop is wanted; asked in worker 0 only.
    """

    def __init__(self, wants_stop: Callable[[], bool], rank: int, world: int, device: torch.device) -> None:
        self._wants_stop = wants_stop
        self._rank, self._world, self._device = rank, world, device
        self._steps = self._next = 1
        self._asked_at = time.monotonic()

    def __call__(self) -> bool:
        """To be called by all workers before each step."""
        if self._world == 1:
            return self._wants_stop()
        self._next -= 1
        if self._next > 0:
            return False
        said = torch.zeros(2, dtype=torch.int64, device=self._device)
        if self._rank == 0:
            said = torch.tensor([int(self._wants_stop()), self._steps_until_next()], device=self._device)
        dist.broadcast(said, 0)
        stop, self._steps = said.tolist()
        self._next = self._steps
        return bool(stop)

    def _steps_until_next(self) -> int:
        now = time.monotonic()
        step_s = (now - self._asked_at) / self._steps
        self._asked_at = now
        return min(MOST_STEPS, max(1, round(ASK_EVERY_S / max(step_s, 1e-6))))


def run_stoppable(work: Callable[[], T], ask_to_stop: Callable[[], bool]) -> T:
    """`work()` in a thread, while this one minds the signals; outside the main thread, which alone gets signals, `work()` alone.

    The first Ctrl-C or SIGTERM calls `ask_to_stop`, and the work ends when it has kept what it has; the second one ends at once.

    Args:
        ask_to_stop: tells the work; False where nothing has begun that could be kept, which ends at once too.

    Raises:
        KeyboardInterrupt, Terminated: after a signal.
        what `work` raises.
    """
    if threading.current_thread() is not threading.main_thread():
        return work()
    done: Future[T] = Future()
    with _noted_signals() as noted:
        threading.Thread(target=_into, args=(done, work), name="work", daemon=True).start()
        asked = False
        while not _finished(done):
            if noted and not asked:
                asked = True
                if not ask_to_stop():
                    raise stop_of(noted[0])
    result = done.result()
    if noted:
        raise stop_of(noted[0])
    return result


def stop_of(number: int) -> KeyboardInterrupt:
    """What a signal is raised as."""
    return Terminated() if number == signal.SIGTERM else KeyboardInterrupt()


@contextmanager
def _noted_signals() -> Iterator[list[int]]:
    """The first Ctrl-C or SIGTERM is written down, the second one raised where the main thread is."""
    noted: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        noted.append(number)
        if len(noted) > 1:
            raise stop_of(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _finished(done: Future[T]) -> bool:
    try:
        done.exception(timeout=LOOK_EVERY_S)
    except NotYet:
        return False
    return True


def _into(done: Future[T], work: Callable[[], T]) -> None:
    try:
        done.set_result(work())
    except BaseException as error:  # noqa: BLE001 - carried to the main thread, raised there
        done.set_exception(error)
