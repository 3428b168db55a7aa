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
    for title in ("rung", "score", "top-1", "latency", "parameters"):
        table.add_column(title, justify="right")
    table.add_column("ended")
    for row in rows[:MOST_ROWS]:
        settings = ", ".join(f"{field}={value}" for field, value in row["settings"].items())
        score = "" if row["score"] is None else f"{row['score']:.4f}"
        top1 = f"{row['top1']:.1%}" if row.get("top1") is not None else ""  # a sweep of an earlier version has none
        latency = f"{row['latency_ms']:.3g} ms" if row.get("latency_ms") is not None else ""
        parameters = f"{row['num_parameters']:,}"
        table.add_row(row["student"], settings, str(row["rung"]), score, top1, latency, parameters, row["ended"] or "at the end")
    return table
