"""A journal read back: each step once, and never more points than a picture can show."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

from student_trainer.history import MOST_HELD, MOST_POINTS, read_history
from student_trainer.waits import Waits


def step_row(step: int, **more: Any) -> dict[str, Any]:
    totals = {"seconds": step / 2, "images": 10.0 * step, **Waits(student=step / 4, teacher=step / 4).model_dump()}
    row = {"kind": "step", "time": 0.0, "step": step, "images_per_s": 20.0, "losses": {"small": 1.0}, "agreement": {"small": 0.5}}
    return {**row, "waits_recent": {}, "totals": totals, **more}


def write(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def steps_of(path: Path) -> list[int]:
    return [point["step"] for point in read_history(path)["points"]]


def test_what_a_resumed_run_did_again_counts_once(tmp_path: Path) -> None:
    epoch, checkpoint = {"kind": "epoch", "step": 20}, {"kind": "checkpoint", "step": 20}
    first = [step_row(10), step_row(20), epoch, checkpoint, {"kind": "silence", "seconds": 3.0}, step_row(30), step_row(40)]
    rows = [*first, {"kind": "epoch", "step": 40}, step_row(25), step_row(35)]
    assert steps_of(write(tmp_path / "metrics.jsonl", rows)) == [10, 20, 25, 35]
    assert steps_of(write(tmp_path / "metrics.jsonl", [*rows, step_row(5)])) == [5]


def test_a_line_that_was_cut_off_costs_itself_only(tmp_path: Path) -> None:
    """Also where the next process wrote right behind it, as it did once."""
    path = tmp_path / "metrics.jsonl"
    whole = [json.dumps(step_row(step)) for step in (1, 2, 3, 4)]
    path.write_bytes(f"{whole[0]}\n{whole[1][:40]}\n{whole[2][:9]}{whole[2]}\n{whole[3]}\n".encode() + b'7\n{"kind": "\xc3')
    assert read_history(path)["unreadable"] == 4
    assert steps_of(path) == [1, 4]


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


def test_a_very_long_run_is_thinned_while_it_is_read(tmp_path: Path) -> None:
    """As the one above, but of more rows than are held at once, and resumed: 12000 again after 15000."""
    path = write(tmp_path / "metrics.jsonl", (step_row(step) for step in (*range(1, 15_001), *range(12_000, 20_001))))
    tracemalloc.start()
    steps = steps_of(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(steps) == MOST_POINTS
    assert (steps[0], steps[-1]) == (1, 20_000)
    gaps = {b - a for a, b in pairwise(steps)}
    assert min(gaps) > 0
    assert max(gaps) <= 3 * 20_000 / MOST_POINTS
    assert peak < 5 * MOST_HELD * 1024  # a point takes about 1 kB; the whole journal would be ten times as much


def test_no_journal_is_no_history(tmp_path: Path) -> None:
    assert read_history(tmp_path / "metrics.jsonl") == {"points": [], "unreadable": 0}
