"""The pictures of the report, each as one SVG element that stands in the page. Input is the plain data that the stages left behind."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = ("#3366aa", "#cc6633", "#339966", "#aa4499", "#888833", "#666666")
TEACHER = "#222222"
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "distill",
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
}


WAITS = {
    "student": "training",
    "decode": "waiting for crops",
    "teacher": "waiting for the teacher",
    "store": "waiting for the store",
}


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

    def paint(figure: Figure) -> None:
        axes: Axes = figure.subplots()
        teacher = evaluation["teacher"]["scores"]["top1"]
        names = list(evaluation["students"])
        for offset, (group, title) in enumerate((("controls", "labels only (control)"), ("students", "distilled"))):
            if not evaluation[group]:
                continue
            tops = [evaluation[group][name]["scores"]["top1"] for name in names]
            bars = axes.barh([i + 0.38 * offset for i in range(len(names))], tops, 0.36, label=title, color=COLOURS[1 - offset])
            axes.bar_label(bars, [f"{top:.1%}" for top in tops], padding=3)
        axes.axvline(teacher, color=TEACHER, linestyle="--", label=f"teacher {teacher:.1%}")
        axes.set_yticks([i + 0.19 for i in range(len(names))], names)
        axes.set_xlim(0, 1.1)
        axes.set_xlabel("top-1 on the test images")
        figure.legend(loc="outside upper center", ncols=3)

    return draw(paint, height=1.4 + 0.7 * len(evaluation["students"]))


def curves(train: list[dict[str, Any]], control: list[dict[str, Any]]) -> str:
    """Test top-1 after each epoch, distilled and control, over the share of training done."""

    def paint(figure: Figure) -> None:
        axes: Axes = figure.subplots()
        for rows, style, title in ((train, "-", "distilled"), (control, ":", "labels only")):
            for number, name in enumerate(rows[-1]["top1"] if rows else []):
                shares = [100 * row["epoch"] / rows[-1]["epoch"] for row in rows]
                axes.plot(shares, [row["top1"][name] for row in rows], style, color=COLOURS[number], label=f"{name}, {title}")
        axes.set_xlabel("steps done, % (both take the same number)")
        axes.set_ylabel("top-1 on the test images")
        axes.legend()

    return draw(paint)


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
    """Accuracy against confidence: on the diagonal a network means what it says."""

    def paint(figure: Figure) -> None:
        axes: Axes = figure.subplots()
        axes.plot([0, 1], [0, 1], color="#999999", linewidth=0.8)
        everyone = [("teacher", evaluation["teacher"], TEACHER, "-")]
        for number, name in enumerate(evaluation["students"]):
            everyone.append((f"{name}, distilled", evaluation["students"][name], COLOURS[number], "-"))
            if name in evaluation["controls"]:
                everyone.append((f"{name}, labels only", evaluation["controls"][name], COLOURS[number], ":"))
        for title, entry, colour, style in everyone:
            bins = entry["scores"]["reliability"]
            label = f"{title}: ECE {entry['scores']['ece']:.3f}"
            axes.plot([b["confidence"] for b in bins], [b["accuracy"] for b in bins], style, marker=".", color=colour, label=label)
        axes.set(xlabel="confidence (largest probability)", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
        axes.legend(fontsize="small")

    return draw(paint, height=4.0)


def waits(totals: dict[str, float]) -> str:
    """Where the students' time went, as one bar."""

    def paint(figure: Figure) -> None:
        axes: Axes = figure.subplots()
        whole = sum(totals[name] for name in WAITS) or 1.0
        start = 0.0
        for number, (name, title) in enumerate(WAITS.items()):
            share = totals[name] / whole
            axes.barh([0], [share], left=[start], color=COLOURS[number], label=f"{title} {share:.1%}")
            start += share
        axes.set(xlim=(0, 1), yticks=[])
        axes.grid(False)
        figure.legend(loc="outside upper center", ncols=2)

    return draw(paint, height=1.5)


def edge_files(files: list[dict[str, Any]]) -> str:
    """Latency against accuracy of every edge file; hollow points are not shipped."""

    def paint(figure: Figure) -> None:
        axes: Axes = figure.subplots()
        students = list(dict.fromkeys(f["student"] for f in files))
        for file in files:
            colour = COLOURS[students.index(file["student"]) % len(COLOURS)]
            axes.plot(
                file["latency_p50_ms"], file["top1"], "o" if file["kind"] == "fp32" else "s", color=colour,
                markerfacecolor=colour if file["shipped"] else "none", markersize=8,
            )  # fmt: skip
            title = f"{file['student']} {file['kind']}, {file['size_bytes'] / 1000:.0f} kB"
            axes.annotate(title, (file["latency_p50_ms"], file["top1"]), xytext=(7, 4), textcoords="offset points", fontsize="small")
        axes.margins(0.25)
        axes.set(xlabel="median latency of one crop, one thread, ms", ylabel="top-1")

    return draw(paint)
