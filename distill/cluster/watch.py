"""What the driver does while a worker group works: reads the board in a thread, writes each row to the journal, hands it to whoever looks.

Unit of data: one row (`distill.cluster.worker.Row`).
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import ray
import ray.exceptions

from distill.cluster.board import BoardHandle
from distill.cluster.worker import Row
from distill.progress import console

WATCH_EVERY_S = 0.5


class RowSink(Protocol):
    """Somebody who looks at the rows of a run: a terminal, a file of events, a scraper. All calls come from one thread."""

    def show(self, row: Row) -> None:
        """One row, stamped with `time`, in the order of posting."""
        ...

    def close(self, failed: bool) -> None:
        """The work ended."""
        ...


class Watch:
    """Use as a context manager around the work. Each row gets `time` (seconds since 1970) and becomes a line of `journal`."""

    def __init__(self, board: BoardHandle, journal: Path, sinks: Sequence[RowSink]) -> None:
        self._board = board
        self._journal = journal
        self._sinks = list(sinks)
        self._stop = threading.Event()
        self._failed = False
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._failed = error is not None
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        with self._journal.open("a", encoding="utf-8", buffering=1) as journal:  # whole lines: kill -9 leaves no half of one
            while True:
                last_look = self._stop.is_set()
                for row in self._rows():
                    stamped = {"time": time.time(), **row}
                    journal.write(json.dumps(stamped) + "\n")
                    self._show(stamped)
                if last_look:
                    break
                self._stop.wait(WATCH_EVERY_S)
        for sink in self._sinks:
            sink.close(self._failed)

    def _show(self, row: Row) -> None:
        for sink in list(self._sinks):
            try:
                sink.show(row)
            except OSError as error:  # a full disk under the event files is no reason to stop training
                self._sinks.remove(sink)
                console.print(f"  {type(sink).__name__} shows no more: {error}", markup=False)

    def _rows(self) -> list[Row]:
        try:
            return ray.get(self._board.take.remote())
        except ray.exceptions.RayError:
            return []  # the cluster is going down; `fit` says why
