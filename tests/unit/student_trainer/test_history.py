"""A journal read back: each step once, and never more points than a picture can show."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

from student_trainer.history import MOST_POINTS, once_each, read_history
from student_trainer.waits import Waits


def step_row(step: int, **more: Any) -> dict[str, Any]:
    totals = {"seconds": step / 2, "images": 10.0 * step, **Waits(student=step / 4, teacher=step / 4).model_dump()}
    row = {"kind": "step", "time": 0.0, "step": step, "images_per_s": 20.0, "losses": {"small": 1.0}, "agreement": {"small": 0.5}}
    return {**row, "waits_recent": {}, "totals": totals, **more}


def kept(rows: list[dict[str, Any]]) -> list[tuple[str, int]]:
    return [(row["kind"], row["step"]) for row in once_each(rows)]


def test_what_a_resumed_run_did_again_counts_once() -> None:
    epoch, checkpoint = {"kind": "epoch", "step": 20}, {"kind": "checkpoint", "step": 20}
    rows = [
        step_row(10),
        step_row(20),
        epoch,
        checkpoint,
        step_row(30),
        step_row(40),
        {"kind": "epoch", "step": 40},
        step_row(25),
        step_row(35),
    ]
    expected = [("step", 10), ("step", 20), ("epoch", 20), ("checkpoint", 20), ("step", 25), ("step", 35)]
    assert kept(rows) == expected
    assert kept([*rows, step_row(5)]) == [("step", 5)]


def test_rows_without_a_step_stay() -> None:
    assert [row["kind"] for row in once_each([step_row(10), {"kind": "silence", "seconds": 3.0}, step_row(10)])] == ["silence", "step"]


def test_a_point_is_the_row_in_short(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (step_row(4), {"kind": "epoch", "step": 4}, step_row(8))) + '{"kind": "st')
    points = read_history(path)["points"]
    assert [point["step"] for point in points] == [4, 8]
    assert points[1] == {
        "step": 8, "seconds": 4.0, "images_per_s": 20.0, "losses": {"small": 1.0}, "agreement": {"small": 0.5},
        "waits": {"decode": 0.0, "store": 0.0, "teacher": 2.0, "student": 2.0},
    }  # fmt: skip


def test_long_runs_are_thinned_between_their_ends(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(step_row(step)) + "\n" for step in range(1, 1001)))
    steps = [point["step"] for point in read_history(path)["points"]]
    assert len(steps) == MOST_POINTS
    assert (steps[0], steps[-1]) == (1, 1000)
    assert {b - a for a, b in pairwise(steps)} <= {3, 4}


def test_no_journal_is_no_history(tmp_path: Path) -> None:
    assert read_history(tmp_path / "metrics.jsonl") == {"points": []}
