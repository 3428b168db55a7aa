"""The page of a sweep: all its students on one, the best first, with their settings, what they cost and why they ended.

Flow: the result of the stage `sweep` (see `student_trainer.sweep.ranking`) and its history -> `sweep.html`. Unit of data: one student.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from distill.machine import describe_machine
from student_trainer import comparison_plots, plots
from student_trainer.comparison import Cost, costs_of
from student_trainer.report import write_page

COSTS = (("latency_ms", 1, "median latency of one crop, one thread, ms"), ("size_bytes", 1000, "size of the ONNX fp32 file, kB"))


def write_sweep(path: Path, run_name: str, result: dict[str, Any], history: dict[str, Any]) -> Path:
    """Write the page at `path`.

    Args:
        result: plain data: `ranking`, `totals`, `epochs` and `store` of the stage.
        history: see `student_trainer.history.read_history`.
    """
    ranking, costs, points = result["ranking"], costs_of(result), history["points"]
    best = [row["student"] for row in ranking[: plots.MOST_LINES]]
    finished = [row for row in ranking if row.get("top1") is not None and row.get("latency_ms") is not None]
    content = {
        "title": f"Sweep of {run_name}: {len(ranking)} students on one stream of labels",
        "rows": [_row(row, costs.get(row["student"])) for row in ranking],
        "tradeoffs": _tradeoffs(finished) if finished else "",
        "curves": plots.curves(best, {"distilled": result["epochs"]}, points) if points else "",
        "most_lines": plots.MOST_LINES,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_page(path, "sweep.html.j2", describe_machine(), content)


def _row(row: dict[str, Any], cost: Cost | None) -> dict[str, str]:
    return {
        "student": row["student"],
        "settings": ", ".join(f"{field.rpartition('.')[2]} {value}" for field, value in row["settings"].items()),
        "rung": str(row["rung"]),
        "score": "" if row["score"] is None else f"{row['score']:.4f}",
        # A sweep of an earlier version has none of these three.
        "top1": f"{row['top1']:.1%}" if row.get("top1") is not None else "",
        "latency": f"{row['latency_ms']:.3g} ms" if row.get("latency_ms") is not None else "",
        "size": f"{row['size_bytes'] / 1000:,.0f} kB" if row.get("size_bytes") is not None else "",
        "parameters": f"{row['num_parameters']:,}",
        "images": "" if cost is None else f"{cost.images:,.0f}",
        "stream_share": "" if cost is None else f"{cost.stream_share:.0%}",
        "step_seconds": "" if cost is None else f"{cost.step_seconds:,.1f} s",
        "ended": row["ended"] or "at the end",
    }


def _tradeoffs(finished: list[dict[str, Any]]) -> str:
    """Accuracy against latency and against size, of those that were trained to the end."""

    def paint(figure: Figure) -> None:
        panels = figure.subplots(1, 2, sharey=True)
        for axes, (field, unit, title) in zip(panels, COSTS, strict=True):
            comparison_plots.mark_front(axes, [(row["student"], row[field] / unit, 100 * row["top1"], True) for row in finished])
            axes.set(xlabel=title)
        panels[0].set_ylabel("top-1 on the test images, %")

    return plots.draw(paint, width=9.0, height=3.8)
