"""The pictures that compare students: what accuracy costs, and which mistakes changed. Each is one SVG element, as in `plots`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from student_trainer.changed_confusions import Rates, most_changed_classes
from student_trainer.comparison import Candidate, EdgePoint, pareto_front
from student_trainer.plots import COLOURS, draw

MARKERS = "osD^vP"
SIZES = {"fp32": 8, "fp16": 6.5, "int8": 5}
"""Of the mark of each kind of file."""
MOST_NAMED = 12
"""Students; of more, only those that no other beats are named."""
PANEL = np.array([280.0, 220.0])
"""About the width and height of one of two panels, in points."""
NAME_WIDTH = 4.6
"""Of a letter, in points."""

PLACES = [
    ("left", 7, -3),
    ("right", -7, -3),
    *((a, d, dy) for dy in (8, -14, 20, -26, 32, -38, 44, -50) for a, d in (("left", 3), ("right", -3))),
]
"""Of a name, as seen from its point: which of its ends is near, and by how much it is off; the best first."""

Box: TypeAlias = tuple[float, float, float, float]
"""Left, bottom, right, top."""

Costs: tuple[tuple[str, Callable[[EdgePoint], float]], ...] = (
    ("median latency of one crop, one thread, ms", lambda file: file.latency_ms),
    ("size of the file, kB", lambda file: file.size_bytes / 1000),
)


def tradeoffs(students: list[Candidate]) -> str:
    """Accuracy of every edge file against its latency and its size; the line joins those shipped that no other beats."""
    measured = [student for student in students if any(file.top1 is not None for file in student.files)]

    def paint(figure: Figure) -> None:
        panels = figure.subplots(1, 2, sharey=True)
        for axes, (title, cost) in zip(panels, Costs, strict=True):
            costs = [cost(file) for student in measured for file in student.files]
            axes.set(xlabel=title, xscale="log", xlim=(min(costs) / 1.3, 2.6 * max(costs)))  # room for the names
            _tick(axes)
            axes.set_ylim(*_height([100 * file.top1 for student in measured for file in student.files if file.top1 is not None]))
            _scatter(axes, measured, cost)
        panels[0].set_ylabel("top-1 on the test images, %")

    return draw(paint, width=9.0, height=3.8)


def _tick(axes: Axes) -> None:
    """1, 2 and 5 times the powers of ten, as plain numbers."""
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.10g}")
    axes.xaxis.set_minor_formatter(NullFormatter())


def _height(tops: list[float]) -> tuple[float, float]:
    """Ends of the axis: two points at least, so that a difference of nothing does not look like one."""
    middle, half = (min(tops) + max(tops)) / 2, max(1.0, 0.7 * (max(tops) - min(tops)))
    return middle - half, middle + half


def _scatter(axes: Axes, students: list[Candidate], cost: Callable[[EdgePoint], float]) -> None:
    files = [(student, file) for student in students for file in student.files if file.top1 is not None]
    for student, file in files:
        number, size = students.index(student), SIZES.get(file.kind, 5)
        _mark(axes, number, (cost(file), 100 * (file.top1 or 0.0)), size, file.shipped)
    _join_and_name(axes, [(student.name, cost(file), 100 * (file.top1 or 0.0), file.shipped) for student, file in files])


def mark_front(axes: Axes, points: list[tuple[str, float, float, bool]]) -> None:
    """One mark for each of `points` (name, cost, worth, whether it counts; hollow if not), over a logarithmic cost."""
    costs, worths = [x for _, x, _, _ in points], [y for _, _, y, _ in points]
    spread = max(worths) - min(worths) or abs(worths[0]) * 0.02 or 1.0
    axes.set(xscale="log", xlim=(min(costs) / 1.3, 2.6 * max(costs)), ylim=(min(worths) - 0.2 * spread, max(worths) + 0.2 * spread))
    _tick(axes)
    for number, (_, x, y, counts) in enumerate(points):
        _mark(axes, number, (x, y), 7, counts)
    _join_and_name(axes, points)


def _mark(axes: Axes, number: int, at: tuple[float, float], size: float, filled: bool) -> None:
    colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number // len(COLOURS) % len(MARKERS)]
    axes.plot(*at, marker, color=colour, markersize=size, markerfacecolor=colour if filled else "none")


def _join_and_name(axes: Axes, points: list[tuple[str, float, float, bool]]) -> None:
    """A line through those that count and that no other beats; names at the points."""
    counting = [(name, x, y) for name, x, y, counts in points if counts]
    front = [counting[n] for n in pareto_front([(x, y) for _, x, y in counting])]
    axes.plot([x for _, x, _ in front], [y for _, _, y in front], color="#777777", linewidth=1, zorder=0)
    few = len({name for name, *_ in points}) <= MOST_NAMED
    named = {name: (name, x, y) for name, x, y in reversed(counting if few else front)}  # the first of each name stays
    _write_names(axes, list(named.values()), [(x, y) for _, x, y, _ in points])


def _write_names(axes: Axes, names: list[tuple[str, float, float]], points: list[tuple[float, float]]) -> None:
    """Each name near its point where it hides no other name and none of the `points`, and stays inside; one for which there is no room is
    left out (the table has it). Sizes are in 1/72 inch."""
    to_panel = axes.transScale + axes.transLimits
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in (to_panel.transform(point) * PANEL for point in points)]
    for name, x, y in names:
        px, py = to_panel.transform((x, y)) * PANEL
        width = NAME_WIDTH * len(name)
        for align, dx, dy in PLACES:
            left = px + dx - (width if align == "right" else 0)
            box = (left, py + dy - 1, left + width, py + dy + 8)
            if box[0] >= 0 and box[2] <= PANEL[0] and box[1] >= 0 and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                leader = {"arrowstyle": "-", "color": "#999999", "linewidth": 0.6} if abs(dy) > 14 else None
                axes.annotate(name, (x, y), (dx, dy), textcoords="offset points", ha=align, fontsize="small", arrowprops=leader)
                break


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def changed_confusions(panels: list[tuple[str, Rates]], class_names: list[str]) -> str:
    """Heat maps of how much more often (in points) one class is taken for another than by somebody else.

    Args:
        panels: whom it is compared with, and the change of the rates, [K,K].
        class_names: K names.
    """
    shown = most_changed_classes(*(change_KK for _, change_KK in panels))
    names = [class_names[k] for k in shown]

    def paint(figure: Figure) -> None:
        axes_of = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        limit = max(0.1, *(100 * float(abs(change_KK).max()) for _, change_KK in panels))
        for axes, (title, change_KK) in zip(axes_of, panels, strict=True):
            part = 100 * change_KK[shown][:, shown]
            image = axes.imshow(part, cmap="PuOr_r", vmin=-limit, vmax=limit)
            axes.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize="small")
            axes.set_yticks(range(len(names)), names, fontsize="small")
            axes.set(title=title, xlabel="taken for")
            axes.grid(False)
            axes.spines[:].set_visible(False)
        axes_of[0].set_ylabel("class")
        figure.colorbar(image, ax=axes_of, shrink=0.8, label="points of its images")

    return draw(paint, width=9.0, height=2.2 + 0.22 * len(names))
