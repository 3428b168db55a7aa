"""Batches with soft labels, in the plan's order, asked for ahead of the training step; and the control's, which need none.

A feeder thread takes batches of crops from the loader and starts the labelling of each on an event loop of its own; a bounded queue holds
them in order, so that answers may come out of order and batches do not. A semaphore lets no more than `in_flight` wait for the teacher.

Unit of data: `LabelledBatch`. Shapes: B images, K classes.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeAlias, TypeVar

from distill.loader import CropBatch, CropLoader
from distill.soft_labels import FloatArray
from student_trainer.label_path import LabelPath, LabelRules
from student_trainer.store import SoftLabelStore
from student_trainer.unanswerable import answerable
from student_trainer.waits import Waits
from teacher_server.backend import TeacherBackend

POLL_S = 0.1
TELL_EVERY_S = 1.0

T = TypeVar("T")


@dataclass(frozen=True)
class LabelledBatch:
    """Crops and what a student is to learn about them."""

    crops: CropBatch
    logits_BK: FloatArray | None
    """The teacher's logits; None for the control, which trains on the labels of the crops."""
    tv_B: FloatArray | None
    """float32 bound of each label's total-variation error at the job's temperature; None for the control."""
    num_asked: int
    """How many of the labels came from the teacher; the others were in the store."""


Item: TypeAlias = Future[LabelledBatch] | BaseException | None
"""In the queue: a batch being labelled, what stopped the feeder, or the end of the epoch."""


@dataclass(frozen=True)
class _Feeding:
    """One epoch's feeder thread, the queue that it fills, and the flag that stops it."""

    thread: threading.Thread
    ahead: queue.Queue[Item]
    stop: threading.Event

    def next_item(self) -> Item:
        """Wait for what comes next.

        Raises:
            RuntimeError: the epoch was ended; nothing comes any more.
        """
        while not self.stop.is_set():
            with suppress(queue.Empty):
                return self.ahead.get(timeout=POLL_S)
        raise RuntimeError("this epoch was ended, by the start of another one or by leaving the stream; call epoch() again")

    def end(self) -> None:
        """Stop the thread and throw away what is queued. Calling it twice does no harm."""
        self.stop.set()
        while self.thread.is_alive():
            _drain(self.ahead)
            self.thread.join(POLL_S)
        _drain(self.ahead)


class LabelledStream:
    """One worker's stream. Use as a context manager: leaving it commits what is pending and closes the teacher's connection.

    Args:
        open_backend: makes the teacher's client; called on the stream's own event loop.
        in_flight: batches that may wait for the teacher, and batches that may wait for the training step.
    """

    def __init__(
        self, loader: CropLoader, store: SoftLabelStore, open_backend: Callable[[], TeacherBackend], rules: LabelRules, in_flight: int
    ) -> None:
        self.loader = loader
        self.waits = Waits()
        self.on_silence: Callable[[float], None] = lambda seconds: None
        """Called now and then while the next batch waits, with the seconds that the teacher has been silent (0 when it answers)."""
        self._in_flight = in_flight
        self._slots = asyncio.Semaphore(in_flight)
        self._labelling: set[asyncio.Task[Any]] = set()
        self._feeding: _Feeding | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="labels", daemon=True)
        self._thread.start()
        try:
            self.path: LabelPath = self._on_loop(self._make_path(store, open_backend, rules))
        except BaseException:
            self._stop_loop()
            raise

    async def _make_path(self, store: SoftLabelStore, open_backend: Callable[[], TeacherBackend], rules: LabelRules) -> LabelPath:
        return LabelPath(store, open_backend(), rules)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[LabelledBatch]:
        """The labelled batches of an epoch from `start_step` on. One epoch at a time: starting another ends this one.

        Raises:
            RuntimeError: it was ended (another epoch was started, the stream was left), and is asked for a batch all the same.
            what the loader and the label path raise, at the batch that it befell.
        """
        if self._feeding is not None:
            self._feeding.end()
        self._on_loop(self._refresh())  # what other workers committed in the last epoch
        ahead: queue.Queue[Item] = queue.Queue(maxsize=self._in_flight)
        stop = threading.Event()
        thread = threading.Thread(target=self._feed, args=(epoch, start_step, ahead, stop), name="feeder", daemon=True)
        feeding = self._feeding = _Feeding(thread, ahead, stop)
        thread.start()
        try:
            while True:
                asked_at = time.monotonic()
                item = feeding.next_item()
                made_at = time.monotonic()
                self.waits = self.waits.plus("decode", made_at - asked_at)
                if item is None:
                    return
                if isinstance(item, BaseException):
                    raise item
                while not wait([item], timeout=TELL_EVERY_S).done:
                    self.on_silence(self.path.silent_s())
                batch = item.result()
                handed_at = time.monotonic()
                self.waits = self.waits.plus("teacher" if batch.num_asked else "store", handed_at - made_at)
                yield batch
                self.waits = self.waits.plus("student", time.monotonic() - handed_at)
        finally:
            feeding.end()

    def _feed(self, epoch: int, start_step: int, ahead: queue.Queue[Item], stop: threading.Event) -> None:
        def put(item: Item) -> None:
            while not stop.is_set():
                try:
                    return ahead.put(item, timeout=POLL_S)
                except queue.Full:
                    continue

        try:
            for batch in self.loader.epoch(epoch, start_step):
                if stop.is_set():
                    return
                put(asyncio.run_coroutine_threadsafe(self._label(batch), self._loop))
            put(None)
        except BaseException as error:  # noqa: BLE001 - carried to the training loop, raised there
            put(error)

    async def _label(self, batch: CropBatch) -> LabelledBatch:
        task = asyncio.current_task()
        assert task is not None
        self._labelling.add(task)
        try:
            async with self._slots:
                batch, labels = await answerable(self.path, batch, self.loader.rejections)
        finally:
            self._labelling.discard(task)
        return LabelledBatch(batch, labels.logits_BK, labels.tv_B, labels.num_asked)

    async def _refresh(self) -> None:
        self.path.refresh()

    def label(self, batch: CropBatch) -> LabelledBatch:
        """A batch outside the plan, labelled through the store like the others, at once.

        Raises:
            what the label path raises.
        """
        return self._on_loop(self._label(batch))

    def commit(self) -> None:
        """Commit every label that was asked for so far."""
        self._on_loop(self._commit())

    async def _commit(self) -> None:
        self.path.commit()

    def _on_loop(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if self._feeding is not None:
                self._feeding.end()  # an iterator that somebody still holds has not ended by itself
            self._on_loop(self._finish())
        finally:
            self._stop_loop()

    async def _finish(self) -> None:
        """Give up what is being asked for, keep what was answered, close the teacher's connection."""
        for task in self._labelling:
            task.cancel()
        await asyncio.gather(*self._labelling, return_exceptions=True)
        try:
            await self.path.close()
        finally:
            await self._loop.shutdown_default_executor()

    def _stop_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class PlainStream:
    """The control's stream: crops of labelled images, and no teacher."""

    def __init__(self, loader: CropLoader) -> None:
        self.loader = loader
        self.waits = Waits()

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[LabelledBatch]:
        """The batches of an epoch from `start_step` on."""
        asked_at = time.monotonic()
        for crops in self.loader.epoch(epoch, start_step):
            handed_at = time.monotonic()
            self.waits = self.waits.plus("decode", handed_at - asked_at)
            yield LabelledBatch(crops, None, None, 0)
            asked_at = time.monotonic()
            self.waits = self.waits.plus("student", asked_at - handed_at)

    def commit(self) -> None:
        """Nothing is kept."""


Stream: TypeAlias = LabelledStream | PlainStream


def _drain(ahead: queue.Queue[Item]) -> None:
    """Throw away what is queued; work that has begun is cancelled."""
    while True:
        try:
            item = ahead.get_nowait()
        except queue.Empty:
            return
        if isinstance(item, Future):
            item.cancel()
