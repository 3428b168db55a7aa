"""results/*.json to a table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np


def write_table(results: Path) -> Path:
    """Write `TABLE.md`; returns its path."""
    lines = ["# What a stored label costs", "", "Made by `python -m bench.labels table`; do not edit.", ""]
    for path in sorted(results.glob("*.json")):
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        lines += _sizes(result) + _times(result)
    target = results / "TABLE.md"
    target.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return target


def _sizes(result: dict[str, Any]) -> list[str]:
    lines = []
    for name, cells in result["sizes"].items():
        first = cells[0]["sizes"]
        lines += [f"## {result['teacher']}: {name}", ""]
        lines += [f"{first['num_labels']} labels of {first['num_classes']} classes; fp16 takes {first['dense16_bytes']} bytes.", ""]
        lines += [
            "| T | max_tv | mean B | median | p99 | encodings | largest stated error | largest true / stated |",
            "|---|---|---|---|---|---|---|---|",
        ]
        lines += [_size_row(cell) for cell in cells] + [""]
    return lines


def _size_row(cell: dict[str, Any]) -> str:
    sizes = cell["sizes"]
    mix = ", ".join(f"{name} {count}" for name, count in sizes["encodings"].items())
    temperatures = ", ".join(f"{temperature:g}" for temperature in sizes["temperatures"])
    return (
        f"| {temperatures} | {sizes['max_tv']:g} | **{sizes['mean_bytes']:.1f}** | {sizes['median_bytes']:.0f} | {sizes['p99_bytes']:.0f} "
        f"| {mix} | {sizes['largest_tv']:.5f} | {cell['largest_true_of_stated']:.9f} |"
    )


def _times(result: dict[str, Any]) -> list[str]:
    lines = [
        f"## {result['teacher']}: time",
        "",
        f"{result['machine']}; CPU time, median of {len(result['times'][0]['rounds'])} rounds.",
        "",
    ]
    lines += [
        "| T | max_tv | teacher, a label | writing, a label | share | step of 256 | reading 256 | share |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case in result["times"]:
        teacher, writing, step, reading = (
            float(np.median([cost[key] for cost in case["rounds"]]))
            for key in ("teacher_s_per_label", "write_s_per_label", "student_step_s", "read_s_per_step")
        )
        temperatures = ", ".join(f"{temperature:g}" for temperature in case["temperatures"])
        lines.append(
            f"| {temperatures} | {case['max_tv']:g} | {1e3 * teacher:.2f} ms | {1e6 * writing:.0f} us | **{writing / teacher:.2%}** "
            f"| {1e3 * step:.0f} ms | {1e3 * reading:.2f} ms | **{reading / step:.2%}** |"
        )
    return [*lines, ""]
