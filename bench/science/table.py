"""Cells to a table and a picture: mean and spread over seeds, differences paired by seed.

Unit of data: one cell, an arm at one label fraction with one seed.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from distill.config import digest_of

matplotlib.use("agg")
from matplotlib import pyplot as plt

Cell = dict[str, Any]

PAIRS = (
    ("pretraining helps the teacher", "teacher, pretrained + fine-tuned", "teacher, supervised only"),
    ("self-distillation helps the teacher", "teacher, + self-distilled", "teacher, pretrained + fine-tuned"),
    ("the same at temperature 1", "teacher, + self-distilled at temperature 1", "teacher, pretrained + fine-tuned"),
    ("distillation helps the student", "student, distilled on all images", "student, supervised only"),
    ("the same at temperature 0.1", "student, distilled on all images at temperature 0.1", "student, supervised only"),
    ("the same without self-distillation", "student, distilled from the fine-tuned teacher", "student, supervised only"),
    ("unlabelled images matter", "student, distilled on all images", "student, distilled on labelled images only"),
    ("a self-distilled teacher teaches better", "student, distilled on all images", "student, distilled from the fine-tuned teacher"),
    (
        "the same at temperature 0.1",
        "student, distilled on all images at temperature 0.1",
        "student, distilled from the fine-tuned teacher",
    ),
    (
        "the same, self-distilled at temperature 1",
        "student, distilled from the teacher self-distilled at temperature 1",
        "student, distilled from the fine-tuned teacher",
    ),
    ("labels beside soft labels help", "student, distilled + labels (alpha 0.5)", "student, distilled on all images"),
)
"""(what is asked, the arm that should be better, the arm it is compared with). All but the other temperatures is in the paper."""


def write_table(results: Path, arms: Sequence[str]) -> list[Path]:
    """Write `TABLE.md` and `science.png`; return their paths."""
    sets = [_of_one_setting(json.loads(path.read_text())) for path in sorted(results.glob("*.json"))]
    lines = ["# Science table", "", "Made by `python -m bench.science table`; do not edit. Top-1 on 10,000 test images, mean ± spread", ""]
    lines[2] += " (standard deviation over seeds; one seed has no spread), and the mean expected calibration error (ECE) at temperature 1."
    for kept in sets:
        lines += _one_set(kept, arms)
    path, picture = results / "TABLE.md", results / "science.png"
    path.write_text("\n".join(lines) + "\n")
    _draw(sets, arms, picture)
    return [path, picture]


def _of_one_setting(kept: dict[str, Any]) -> dict[str, Any]:
    """Without the cells that were trained by other settings than the last."""
    own = [cell for cell in kept["cells"] if cell["setting"] == digest_of(kept["setting"])]
    return {**kept, "cells": own, "others": len(kept["cells"]) - len(own)}


def _one_set(kept: dict[str, Any], arms: Sequence[str]) -> list[str]:
    cells = kept["cells"]
    fractions = sorted({cell["fraction"] for cell in cells})
    machines = Counter(cell["machine"] for cell in cells)
    lines = [f"## {kept['dataset']}", "", "; ".join(f"{count} cells: {machine}" for machine, count in machines.most_common()) + ".", ""]
    if kept["others"]:
        lines[2] += f" {kept['others']} cells of other settings are left out."
    lines += [
        "| arm | parameters | " + " | ".join(f"{f:.0%} of the labels" for f in fractions) + " |",
        "|---|--:|" + "--:|" * len(fractions),
    ]
    for arm in arms:
        own = [cell for cell in cells if cell["arm"] == arm]
        if own:
            values = [_mean_and_spread([c for c in own if c["fraction"] == f]) for f in fractions]
            lines.append(f"| {arm} | {own[0]['num_parameters']:,} | " + " | ".join(values) + " |")
    lines += ["", "| the paper says | " + " | ".join(f"{f:.0%}: points" for f in fractions) + " |", "|---|" + "--:|" * len(fractions)]
    for title, better, other in PAIRS:
        lines.append(f"| {title} | " + " | ".join(_difference(cells, f, better, other) for f in fractions) + " |")
    return [*lines, ""]


def _mean_and_spread(cells: Sequence[Cell]) -> str:
    if not cells:
        return ""
    tops = [cell["top1"] for cell in cells]
    spread = f" ± {100 * np.std(tops, ddof=1):.1f}" if len(tops) > 1 else ""
    return f"{100 * np.mean(tops):.1f}{spread} ({len(tops)}); ECE {np.mean([cell['ece'] for cell in cells]):.2f}"


def _difference(cells: Sequence[Cell], fraction: float, better: str, other: str) -> str:
    """Mean and spread of the difference in points, seed by seed."""
    tops = {(cell["arm"], cell["seed"]): cell["top1"] for cell in cells if cell["fraction"] == fraction}
    seeds = [seed for arm, seed in tops if arm == better and (other, seed) in tops]
    points = [100 * (tops[better, seed] - tops[other, seed]) for seed in seeds]
    if not points:
        return ""
    return f"{np.mean(points):+.1f}" + (f" ± {np.std(points, ddof=1):.1f}" if len(points) > 1 else "")


def _draw(sets: Sequence[dict[str, Any]], arms: Sequence[str], path: Path) -> None:
    panels = [(kept, fraction) for kept in sets for fraction in sorted({cell["fraction"] for cell in kept["cells"]})]
    figure, axes = plt.subplots(1, max(1, len(panels)), figsize=(3.2 * len(panels) + 2.5, 3.6), sharey=True, squeeze=False)
    for axis, (kept, fraction) in zip(axes[0], panels, strict=False):
        for row, arm in enumerate(reversed(arms)):
            values = [100 * c["top1"] for c in kept["cells"] if c["arm"] == arm and c["fraction"] == fraction]
            colour = "tab:blue" if arm.startswith("teacher") else "tab:orange"
            axis.plot(values, [row] * len(values), "o", color=colour, alpha=0.5, markersize=5)
            if values:
                axis.plot([np.mean(values)], [row], "|", color=colour, markersize=16)
        axis.set(title=f"{kept['dataset']}, {fraction:.0%} of the labels", xlabel="top-1, %", yticks=range(len(arms)))
        axis.set_yticklabels(list(reversed(arms)), fontsize=8)
        axis.grid(axis="x", alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
