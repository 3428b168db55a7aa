"""A stage's journal (`metrics.jsonl`) read back: how the run went, short enough for a page.

A run that went on from a checkpoint said some steps twice; the later word counts, as in TensorBoard. Unit of data: one row.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distill.cluster.worker import Row
from student_trainer.waits import Waits

MOST_POINTS = 300
"""Of a curve: a picture has not many more pixels."""
MOST_HELD = 8 * MOST_POINTS
"""While reading: enough that the points picked from them are about equally far apart."""


def read_history(path: Path) -> dict[str, Any]:
    """The journal at `path` as plain data; no points if there is none. Read line by line: memory does not grow with the length of the run.

    Returns:
        `points`: at most 300, each with `step`, `seconds` (of training), `images_per_s`, `losses`, `agreement`, `waits` (seconds so far).
        `unreadable`: lines that are no row, as a machine that died or a full disk leaves them; they are left out.
    """
    curve, again, unreadable = Curve(), SaidAgain(), 0
    for row in _rows(path):
        if row is None:
            unreadable += 1
            continue
        if again.is_said(row):
            curve.forget_from(row["step"])
        if row["kind"] == "step" and "waits_recent" in row:
            curve.add(_point(row))
    return {"points": curve.points(), "unreadable": unreadable}


class SaidAgain:
    """Finds where a run that went on from a checkpoint begins to say steps a second time."""

    def __init__(self) -> None:
        self._last: dict[str, int] = {}
        """Kind of row -> its last step."""

    def is_said(self, row: Row) -> bool:
        """Whether steps went back with this row: then what had been said from its step on counts no more."""
        if row["kind"] not in ("step", "epoch") or "step" not in row:
            return False
        back = row["step"] <= self._last.get(row["kind"], -1) or row["step"] < max(self._last.values(), default=-1)
        if back:
            self._last.clear()
        self._last[row["kind"]] = row["step"]
        return bool(back)


class Curve:
    """Points over steps, however many are added. When there are too many every second one is dropped, and later ones come as far apart."""

    def __init__(self) -> None:
        self._kept: list[dict[str, Any]] = []
        self._last: dict[str, Any] | None = None
        """The last one, where it is not among those kept."""
        self._apart = 1
        self._skipped = 0

    def add(self, point: dict[str, Any]) -> None:
        """The next one."""
        self._skipped += 1
        if self._kept and self._skipped < self._apart:
            self._last = point
            return
        self._kept.append(point)
        self._last, self._skipped = None, 0
        if len(self._kept) > MOST_HELD:
            del self._kept[1::2]
            self._apart *= 2

    def forget_from(self, step: int) -> None:
        """Drop those at `step` and later."""
        while self._kept and self._kept[-1]["step"] >= step:
            self._kept.pop()
        if self._last is not None and self._last["step"] >= step:
            self._last = None

    def points(self) -> list[dict[str, Any]]:
        """At most `MOST_POINTS`, the first and the last among them, about equally far apart."""
        found = self._kept if self._last is None else [*self._kept, self._last]
        if len(found) <= MOST_POINTS:
            return found
        return [found[round(n * (len(found) - 1) / (MOST_POINTS - 1))] for n in range(MOST_POINTS)]


def _rows(path: Path) -> Iterator[Row | None]:
    """None for a line that is no row."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            yield row if isinstance(row, dict) and "kind" in row else None


def _point(row: Row) -> dict[str, Any]:
    totals = row["totals"]
    return {
        "step": row["step"],
        "seconds": totals["seconds"],
        "images_per_s": row["images_per_s"],
        "losses": row["losses"],
        "agreement": row["agreement"],
        "waits": {name: totals[name] for name in Waits.model_fields},
    }
