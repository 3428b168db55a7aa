"""A board that workers write on and the driver reads: how far they are, and what stopped them. Works over any number of machines."""

from __future__ import annotations

import threading
from typing import Any

import ray
from ray.actor import ActorHandle

from distill import errors
from distill.errors import DistillError


@ray.remote(num_cpus=0, max_concurrency=8)
class Board:
    """The actor. Rows are plain data; each is read once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rows: list[dict[str, Any]] = []
        self._failure: tuple[str, str] | None = None
        self._stop = False

    def post(self, row: dict[str, Any]) -> bool:
        """Add a row; the answer is whether the run is to stop."""
        with self._lock:
            self._rows.append(row)
            return self._stop

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


def report_failure(board: ActorHandle, error: DistillError) -> None:
    """Carry a typed error to the driver, past Ray's wrapping."""
    ray.get(board.fail.remote(type(error).__name__, str(error)))


def raise_failure(board: ActorHandle) -> None:
    """Raise what a worker reported, as the class it was; return if nothing was."""
    found = ray.get(board.failure.remote())
    if found is not None:
        raise getattr(errors, found[0], DistillError)(found[1])
