"""The ranking of a sweep as a table for the terminal: the best first."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.table import Table

MOST_ROWS = 20


def sweep_table(rows: list[dict[str, Any]]) -> Table:
    """The first rows of `student_trainer.sweep.ranking`; the others are in `sweep/stage.json`."""
    left_out = len(rows) - MOST_ROWS
    table = Table(box=box.SIMPLE_HEAD, caption=f"and {left_out} more, in sweep/stage.json" if left_out > 0 else None)
    for title in ("student", "settings"):
        table.add_column(title, overflow="fold")
    for title in ("rung", "score", "parameters"):
        table.add_column(title, justify="right")
    table.add_column("ended")
    for row in rows[:MOST_ROWS]:
        settings = ", ".join(f"{field}={value}" for field, value in row["settings"].items())
        score = "" if row["score"] is None else f"{row['score']:.4f}"
        table.add_row(row["student"], settings, str(row["rung"]), score, f"{row['num_parameters']:,}", row["ended"] or "at the end")
    return table
