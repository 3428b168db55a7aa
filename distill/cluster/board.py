"""A board between workers and driver: how far they are, what stopped them, whether they are to stop. Works over any number of machines."""

from __future__ import annotations

import threading
from typing import Any, TypeAlias

import ray

from distill import errors
from distill.errors import DistillError

BoardHandle: TypeAlias = Any
"""Ray's handle of a `Board` (its generic type says nothing of the methods)."""


class Board:
    """The actor. Rows are plain data; each is read once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rows: list[dict[str, Any]] = []
        self._failure: tuple[str, str] | None = None
        self._stop = False
        self._heard = False

    def post(self, row: dict[str, Any]) -> None:
        """Add a row."""
        with self._lock:
            self._rows.append(row)

    def take(self) -> list[dict[str, Any]]:
        """The rows since the last call."""
        with self._lock:
            rows, self._rows = self._rows, []
            return rows

    def fail(self, kind: str, message: str) -> None:
        """A worker met an error that no restart mends; the first one counts."""
        with self._lock:
            self._failure = self._failure or (kind, message)

    def failure(self) -> tuple[str, str] | None:
        """Name of the error's class and its message, if there was one."""
        with self._lock:
            return self._failure

    def ask_to_stop(self) -> bool:
        """The driver's wish that the workers end. True where they have begun and will hear of it."""
        with self._lock:
            self._stop = True
            return self._heard

    def stopping(self) -> bool:
        """Whether the workers are to end; asked by worker 0 as soon as its loop has begun."""
        with self._lock:
            self._heard = True
            return self._stop


def start_board() -> BoardHandle:
    """A new board in the cluster."""
    return ray.remote(Board).options(num_cpus=0, max_concurrency=8).remote()


def report_failure(board: BoardHandle, error: DistillError) -> None:
    """Carry a typed error to the driver, past Ray's wrapping."""
    ray.get(board.fail.remote(type(error).__name__, str(error)))


def raise_failure(board: BoardHandle) -> None:
    """Raise what a worker reported, as the class it was; return if nothing was."""
    found: tuple[str, str] | None = ray.get(board.failure.remote())
    if found is not None:
        raise getattr(errors, found[0], DistillError)(found[1])
