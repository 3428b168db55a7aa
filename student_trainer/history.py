"""A stage's journal (`metrics.jsonl`) read back: how the run went, short enough for a page.

A run that went on from a checkpoint said some steps twice; the later word counts, as in TensorBoard. Unit of data: one row.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from distill.cluster.worker import Row
from student_trainer.waits import Waits

MOST_POINTS = 300
"""Of a curve: a picture has not many more pixels."""


def read_history(path: Path) -> dict[str, Any]:
    """The journal at `path` as plain data; no points if there is none.

    Returns:
        `points`: at most 300, each with `step`, `seconds` (of training), `images_per_s`, `losses`, `agreement`, `waits` (seconds so far).
    """
    rows = once_each(_rows(path))
    steps = [row for row in rows if row["kind"] == "step" and "waits_recent" in row]
    kept = [steps[round(n * (len(steps) - 1) / (MOST_POINTS - 1))] for n in range(MOST_POINTS)] if len(steps) > MOST_POINTS else steps
    return {"points": [_point(row) for row in kept]}


def once_each(rows: Iterable[Row]) -> list[Row]:
    """Without the rows that a resumed run did again: where steps go back, what had been said from there on is dropped."""
    kept: list[Row] = []
    last: dict[str, int] = {}
    for row in rows:
        if row["kind"] in ("step", "epoch") and "step" in row:
            if row["step"] <= last.get(row["kind"], -1) or row["step"] < max(last.values(), default=-1):
                kept = [earlier for earlier in kept if earlier.get("step", -1) < row["step"]]
                last.clear()
            last[row["kind"]] = row["step"]
        kept.append(row)
    return kept


def _rows(path: Path) -> list[Row]:
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]  # a machine that died may leave a part of the last one


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
