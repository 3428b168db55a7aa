"""The pictures of the report, each as one SVG element that stands in the page. Input is the plain data that the stages left behind."""

from __future__ import annotations

import io
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
"""Okabe and Ito's, which colour-blind people tell apart; dark ones first."""
TEACHER = "#222222"
MOST_LINES = 6
"""Students in one picture of lines: the best ones, if there are more."""
FEWEST_IN_BIN = 10
"""Images in a bin of a calibration picture; the accuracy of fewer says nothing."""
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "distill",
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "text.parse_math": False,  # names come from outside: `$` in one is a dollar
}


WAITS = {
    "student": ("training", "#0072B2"),
    "decode": ("waiting for crops", "#E69F00"),
    "teacher": ("waiting for the teacher", "#CC79A7"),
    "store": ("waiting for the store", "#56B4E9"),
}
"""Whom the time went to; the terminal's bar has these colours too."""


def draw(paint: Callable[[Figure], None], width: float = 7.0, height: float = 3.4) -> str:
    """One figure as an SVG element; `paint` fills it."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        paint(figure)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]


def accuracy(evaluation: dict[str, Any]) -> str:
    """Top-1 of teacher, distilled students and controls, as bars."""
    names = list(evaluation["students"])

    def paint(figure: Figure) -> None:
        axes: Axes = figure.subplots()
        teacher = evaluation["teacher"]["scores"]["top1"]
        for offset, (group, title) in enumerate((("students", "distilled"), ("controls", "labels only (control)"))):
            judged = {i: evaluation[group][name]["scores"]["top1"] for i, name in enumerate(names) if name in evaluation[group]}
            if not judged:
                continue
            bars = axes.barh([i + 0.38 * offset for i in judged], list(judged.values()), 0.36, label=title, color=COLOURS[offset])
            for inside, padding, colour in ((True, -40, "white"), (False, 3, TEACHER)):  # a short bar holds no number
                axes.bar_label(
                    bars, [f"{top:.1%}" if (top > 0.2) == inside else "" for top in judged.values()], padding=padding, color=colour
                )
        axes.axvline(teacher, color=TEACHER, linestyle="--", label=f"teacher {teacher:.1%}")
        axes.set_yticks([i + 0.19 for i in range(len(names))], names)
        axes.set(xlim=(0, 1), xlabel="top-1 on the test images")
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        figure.legend(loc="outside upper center", ncols=3)

    return draw(paint, height=1.4 + 0.7 * len(names))


def best_students(evaluation: dict[str, Any]) -> list[str]:
    """At most as many as one picture of lines can hold, in their own order."""
    judged = evaluation["students"]
    best = sorted(judged, key=lambda name: -judged[name]["scores"]["top1"])[:MOST_LINES]
    return [name for name in judged if name in best]


def curves(names: list[str], epochs: dict[str, list[dict[str, Any]]], points: list[dict[str, Any]]) -> str:
    """Loss, agreement with the teacher and test top-1 over the steps.

    Args:
        names: of the students that are shown.
        epochs: `distilled` and `labels only` -> a row an evaluation, with `step`, `epoch` and `top1` of each student.
        points: of the distilled students' history (`student_trainer.history`).
    """

    def paint(figure: Figure) -> None:
        panels = figure.subplots(1, 3 if points else 1, squeeze=False)[0]
        for axes, key, title in zip(panels[:-1], ("losses", "agreement"), ("loss, nats", "agreement with the teacher"), strict=False):
            for number, name in enumerate(names):
                values = [(point["step"], point[key][name]) for point in points if point[key].get(name) is not None]
                steps = [step for step, _ in values]
                axes.plot(steps, _smooth([value for _, value in values]), color=COLOURS[number], linewidth=1.2)
            axes.set(xlabel="steps", title=title)
        axes = panels[-1]
        has_steps = all("step" in row for rows in epochs.values() for row in rows)
        for (title, rows), style in zip(epochs.items(), ("-", ":"), strict=False):
            for number, name in enumerate(names):
                found = [(row["step" if has_steps else "epoch"], row["top1"][name]) for row in rows if name in row["top1"]]
                if found:
                    axes.plot(*zip(*found, strict=True), style, color=COLOURS[number], label=f"{name}, {title}", marker=".", markersize=4)
        axes.set(xlabel="steps" if has_steps else "epochs", title="top-1 on the test images")
        figure.legend(loc="outside lower center", ncols=2, fontsize="small")

    return draw(paint, width=9.0, height=2.9 + 0.2 * len(names) * len(epochs) / 2)


def _smooth(values: list[float], span: int = 9) -> list[float]:
    """Mean over `span` neighbours, fewer at the ends."""
    half = span // 2
    return [sum(part) / len(part) for n in range(len(values)) if (part := values[max(0, n - half) : n + half + 1])]


def pretraining(curve: list[dict[str, Any]]) -> str:
    """Contrastive loss, and how often a view finds its partner among all others."""

    def paint(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        steps = [row["step"] for row in curve]
        left.plot(steps, [row["loss"] for row in curve], color=COLOURS[0], linewidth=1)
        left.set(xlabel="step", ylabel="NT-Xent, nats")
        right.plot(steps, [row["accuracy"] for row in curve], color=COLOURS[2], linewidth=1)
        right.set(xlabel="step", ylabel="finds its partner", ylim=(0, 1))

    return draw(paint, height=2.6)


def reliability(evaluation: dict[str, Any]) -> str:
    """Accuracy against confidence, a panel for each student: on the diagonal a network means what it says."""
    names = best_students(evaluation)
    columns = len(names) if len(names) <= 4 else 3
    rows, side = -(-len(names) // columns), min(3.0, 8.6 / columns)

    def paint(figure: Figure) -> None:
        panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for axes in panels.flat[len(names) :]:
            axes.set_visible(False)
        for axes, name in zip(panels.flat, names, strict=False):
            axes.plot([0, 1], [0, 1], color="#999999", linewidth=0.8)
            everyone = [("teacher", evaluation["teacher"], TEACHER, "-"), ("distilled", evaluation["students"][name], COLOURS[0], "-")]
            if name in evaluation["controls"]:
                everyone.append(("labels only", evaluation["controls"][name], COLOURS[1], ":"))
            for title, entry, colour, style in everyone:
                bins = [b for b in entry["scores"]["reliability"] if b["num_images"] >= FEWEST_IN_BIN]
                label = f"{title}, ECE {entry['scores']['ece']:.3f}"
                axes.plot([b["confidence"] for b in bins], [b["accuracy"] for b in bins], style, marker=".", color=colour, label=label)
            axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", title=name)
            axes.legend(fontsize="x-small", loc="lower right")
        figure.supxlabel("confidence (largest probability)", fontsize="medium")
        figure.supylabel("accuracy", fontsize="medium")

    return draw(paint, width=side * columns + 0.4, height=(side + 0.1) * rows + 0.4)


def waits(totals: dict[str, float]) -> str:
    """Where the students' time went, as one bar."""

    def paint(figure: Figure) -> None:
        axes: Axes = figure.subplots()
        whole = sum(totals[name] for name in WAITS) or 1.0
        start = 0.0
        for name, (title, colour) in WAITS.items():
            share = totals[name] / whole
            axes.barh([0], [share], left=[start], color=colour, label=f"{title} {share:.1%}")
            start += share
        axes.set_axis_off()
        figure.legend(loc="outside upper center", ncols=4, fontsize="small")

    return draw(paint, width=9.0, height=1.0)


def waits_over_time(points: list[dict[str, Any]]) -> str:
    """Shares of the time, as areas over the time of training."""

    def paint(figure: Figure) -> None:
        axes: Axes = figure.subplots()
        edges = _spread([point["seconds"] for point in points], 60)
        unit, unit_s = ("minutes", 60) if points[-1]["seconds"] > 180 else ("seconds", 1)
        times, shares = [], []
        for start, end in pairwise(edges):
            spent = [points[end]["waits"][name] - points[start]["waits"][name] for name in WAITS]
            if sum(spent) > 0:
                times += [points[start]["seconds"] / unit_s, points[end]["seconds"] / unit_s]
                shares += [[100 * seconds / sum(spent) for seconds in spent]] * 2
        colours = [colour for _, colour in WAITS.values()]
        axes.stackplot(times, *zip(*shares, strict=True), colors=colours, labels=[title for title, _ in WAITS.values()], linewidth=0)
        axes.set(xlabel=f"{unit} of training", ylabel="% of the time", ylim=(0, 100), xlim=(times[0], times[-1]))
        axes.grid(False)
        figure.legend(loc="outside upper center", ncols=4, fontsize="small")

    return draw(paint, width=9.0, height=2.6)


def _spread(values: list[float], count: int) -> list[int]:
    """Positions in the rising `values`, the first and the last among them, at most `count` steps that are about equally long."""
    width = (values[-1] - values[0]) / count
    chosen = [0]
    for position, value in enumerate(values):
        if value - values[chosen[-1]] >= width and value > values[chosen[-1]]:
            chosen.append(position)
    return chosen if chosen[-1] == len(values) - 1 else [*chosen, len(values) - 1]
