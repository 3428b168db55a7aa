"""What the driver does while a worker group works: reads the board in a thread, writes each row to the journal, hands it to whoever looks.

Unit of data: one row (`distill.cluster.worker.Row`).
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self, TextIO

import ray
import ray.exceptions

from distill.cluster.board import BoardHandle
from distill.cluster.worker import Row
from distill.progress import console

WATCH_EVERY_S = 0.5


class RowSink(Protocol):
    """Somebody who looks at the rows of a run: a terminal, a file of events, a scraper. All calls come from one thread at a time."""

    def show(self, row: Row) -> None:
        """One row, stamped with `time`, in the order of posting.

        Raises:
            OSError: it can show no more (a full disk); it is given up, and the others go on.
        """
        ...

    def close(self, failed: bool) -> None:
        """The work ended. A second call does nothing."""
        ...


class Journal:
    """A `RowSink` that adds each row as a line to the file at `path`. It always begins a line: what a process that was killed left of its
    last one, or a full disk let through, stays a line by itself."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: TextIO | None = None

    def show(self, row: Row) -> None:
        """Write it, down to the operating system: kill -9 takes back no line."""
        if self._file is None:
            torn = _ends_within_a_line(self._path)
            self._file = self._path.open("a", encoding="utf-8", buffering=1)
            if torn:
                self._file.write("\n")
        self._file.write(json.dumps(row) + "\n")

    def close(self, failed: bool) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def _ends_within_a_line(path: Path) -> bool:
    if not path.exists() or path.stat().st_size == 0:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() != b"\n"


class Watch:
    """Use as a context manager around the work. Each row gets `time` (seconds since 1970) and becomes a line of `journal`.

    A sink that raises is closed and gets no more rows; the others, the journal among them, go on. At the end all are closed.

    Raises:
        what a sink raised, but for OSError, at the end of a block that raised nothing itself.
    """

    def __init__(self, board: BoardHandle, journal: Path, sinks: Sequence[RowSink]) -> None:
        self._board = board
        self._sinks: list[RowSink] = [Journal(journal), *sinks]
        self._stop = threading.Event()
        self._failed = False
        self._error: Exception | None = None
        """The first one that is a fault of ours, and not of the disk."""
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._failed = error is not None
        self._stop.set()
        self._thread.join()
        if self._error is not None and error is None:
            raise self._error

    def _watch(self) -> None:
        try:
            last_look = False
            while not last_look:
                last_look = self._stop.wait(WATCH_EVERY_S)
                for row in self._rows():
                    self._show({"time": time.time(), **row})
        except Exception as error:  # noqa: BLE001 - carried to the main thread, raised there
            self._error = self._error or error
        finally:
            self._close_all()

    def _show(self, row: Row) -> None:
        for sink in list(self._sinks):
            try:
                sink.show(row)
            except Exception as error:  # noqa: BLE001 - a full disk under the event files is no reason to stop training
                self._sinks.remove(sink)
                self._note(sink, error)
                with suppress(Exception):  # what is wrong with it is said
                    sink.close(failed=True)

    def _close_all(self) -> None:
        for sink in self._sinks:
            try:
                sink.close(self._failed)
            except Exception as error:  # noqa: BLE001 - the others are to be closed too
                self._note(sink, error)

    def _note(self, sink: RowSink, error: Exception) -> None:
        console.print(f"  {type(sink).__name__} shows no more: {error}", markup=False)
        if not isinstance(error, OSError):
            self._error = self._error or error

    def _rows(self) -> list[Row]:
        try:
            return ray.get(self._board.take.remote())
        except ray.exceptions.RayError:
            return []  # the cluster is going down; `fit` says why
