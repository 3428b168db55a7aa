"""The live picture of a run on a terminal: how far, how fast, how good, and who waits for whom.

Flow: rows (`distill.cluster.worker.Row`) -> `RunState`, which keeps what was said last -> `draw_run`, a picture of it. A part is there only
if a row spoke of it, so that labelling, which has no students, and training share it. The students come last: of a picture that is higher
than the terminal the end is cut off, and there may be many of them. Unit of data: one row.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from distill.progress import console, duration

SHARE_STYLES = {"student": "blue", "decode": "yellow", "teacher": "magenta", "store": "cyan"}
"""Whom the time went to, and its colour: four that stay apart for colour-blind people too; the bar's legend repeats them in order."""
BAR_WIDTH = 48
LABEL_WIDTH = 10


@dataclass
class RunState:
    """What the rows of one run said last. Times are seconds since 1970."""

    title: str
    unit: str = "images"
    step: dict[str, Any] = field(default_factory=dict)
    """The last `step` row."""
    first: tuple[float, int] | None = None
    """Time and units done of the first `step` row: what the mean rate starts from."""
    top1: dict[str, float] = field(default_factory=dict)
    """Student -> top-1 at the last evaluation."""
    stopped: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Student -> the row that says why it is trained no more."""
    checkpoint: dict[str, Any] | None = None
    """The last `checkpoint` row."""
    silent_s: float = 0.0
    """For how long the teacher has given no answer; 0 while it answers."""

    def take(self, row: dict[str, Any]) -> None:
        """Take in one row, of any kind."""
        if row["kind"] == "step":
            self.step, self.silent_s = row, 0.0
            self.first = self.first or (row.get("time", time.time()), self.done)
        elif row["kind"] == "epoch":
            self.top1 |= row.get("top1", {})
        elif row["kind"] == "checkpoint":
            self.checkpoint = row
        elif row["kind"] == "stopped":
            self.stopped[row["student"]] = row
        elif row["kind"] == "silence":
            self.silent_s = row["seconds"]

    @property
    def done(self) -> int:
        """Units done."""
        return self.step["step"] * self.step["images"]

    @property
    def total(self) -> int:
        """Units in all."""
        return self.step["of"] * self.step["images"]

    def mean_rate(self, now: float) -> float:
        """Units a second since the first row; 0 until a second one came."""
        if self.first is None or self.done <= self.first[1]:
            return 0.0
        return (self.done - self.first[1]) / max(now - self.first[0], 1e-9)


class LiveRun:
    """The picture on the terminal, kept up to date while the block lasts; afterwards it is gone."""

    def __init__(self, state: RunState) -> None:
        self._state = state
        self._spinner = Spinner("dots")
        self._live = Live(get_renderable=self._draw, console=console, refresh_per_second=4, transient=True)

    def start(self) -> None:
        """Begin to draw; the state may change from now on, in any thread."""
        self._live.start()

    def stop(self) -> None:
        """Take the picture away."""
        self._live.stop()

    def _draw(self) -> RenderableType:
        return draw_run(self._state, time.time(), self._spinner)


def draw_run(state: RunState, now: float, spinner: RenderableType | None = None) -> RenderableType:
    """The picture of `state` at the time `now`. `spinner` shows that somebody is alive."""
    parts = [_head(state, now, spinner)]
    facts = _facts(state, now)
    if facts.row_count:
        parts.append(Padding(facts, (1, 0, 0, 0)))
    if state.step.get("pool"):
        parts.append(Padding(_pool(state.step["pool"]["members"]), (1, 0, 0, 0)))
    if state.step.get("losses"):
        parts.append(Padding(_students(state), (1, 0, 0, 0)))
    return Padding(Group(*parts), (0, 0, 0, 2))


def _head(state: RunState, now: float, spinner: RenderableType | None) -> RenderableType:
    row = state.step
    line = Table.grid(padding=(0, 1))
    title = Text(state.title, style="bold")
    bar = ProgressBar(total=max(state.total, 1), completed=state.done, width=30, complete_style="blue", finished_style="blue")
    line.add_row(spinner or "", title, bar, f"{state.done / max(state.total, 1):.0%}", _where(row))
    mean = state.mean_rate(now)
    left_s = (state.total - state.done) / mean if mean else None
    recent = row.get("images_per_s")
    rates = [f"{recent:,.0f} {state.unit}/s now" if recent else "", f"{mean:,.0f} mean" if mean else "", _left(left_s)]
    return Group(line, Text("  " + ", ".join(filter(None, rates)), style="dim"))


def _where(row: dict[str, Any]) -> str:
    if row["images"] == 1:
        return f"{row['step']:,} of {row['of']:,}"
    epoch = f", epoch {row['epoch']}" if "epoch" in row else ""
    return f"step {row['step']:,} of {row['of']:,}{epoch}"


def _left(left_s: float | None) -> str:
    return "" if left_s is None else f"{duration(left_s)} left"


def _students(state: RunState) -> Table:
    row = state.step
    columns: list[tuple[str, Mapping[str, float | None], str]] = [
        ("loss", row["losses"], "{:.3f}"),
        ("agreement", row.get("agreement") or {}, "{:.1%}"),
        ("top-1", state.top1, "{:.1%}"),
        ("learning rate", row.get("learning_rate") or {}, "{:.2g}"),
    ]
    shown = [column for column in columns if column[1]]
    table = _table("student")
    for title, _, _ in shown:
        table.add_column(title, justify="right", no_wrap=True)
    for student in row["losses"]:
        cells = [form.format(values[student]) if values.get(student) is not None else "" for _, values, form in shown]
        table.add_row(student, *cells, style="dim" if student in state.stopped else "")
    return table


def _table(title: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, show_edge=False, header_style="dim", border_style="dim")
    table.add_column(title, no_wrap=True, min_width=LABEL_WIDTH)
    return table


def _facts(state: RunState, now: float) -> Table:
    """Time, labels, teacher, checkpoint: one line each."""
    row = state.step
    grid = Table.grid(padding=(0, 1))
    grid.add_column(style="dim", min_width=LABEL_WIDTH, no_wrap=True)
    grid.add_column()
    shares = shares_of(row.get("waits_recent") or {})
    if shares:
        grid.add_row("time", share_bar(shares))
        if row.get("bottleneck"):
            grid.add_row("", Text(f"waits for {row['bottleneck']['for']}: {row['bottleneck']['scale']}", style="bold"))
    totals = row.get("totals") or {}
    labels = totals.get("asked", 0) + totals.get("from_store", 0)
    if labels:
        share = totals["from_store"] / labels
        grid.add_row("labels", f"{share:.0%} from the store ({totals['from_store']:,.0f}), the teacher asked for {totals['asked']:,.0f}")
    if state.silent_s > 0:
        grid.add_row("teacher", Text(f"silent for {duration(state.silent_s)}; it is asked again and again", style="bold red"))
    if row.get("rejected"):
        grid.add_row("rejected", Text(f"{row['rejected']:,} images, see rejected.jsonl", style="bold"))
    for student, stop in state.stopped.items():
        grid.add_row("stopped", Text(f"{student} at step {stop['step']:,}: {stop['why']}, {stop['detail']}"))
    if state.checkpoint is not None:
        grid.add_row("checkpoint", f"step {state.checkpoint['step']:,}, {duration(max(0, now - state.checkpoint['time']))} ago")
    return grid


def shares_of(seconds: dict[str, float]) -> dict[str, float]:
    """Seconds by whom they went to -> shares that add up to 1; empty if there are none."""
    known = {name: max(0.0, seconds.get(name, 0.0)) for name in SHARE_STYLES}
    whole = sum(known.values())
    return {name: value / whole for name, value in known.items()} if whole > 0 else {}


def share_bar(shares: dict[str, float], width: int = BAR_WIDTH) -> Text:
    """`shares` (adding up to 1) as one coloured bar of `width` cells, and a legend with the numbers."""
    text, edge, sofar = Text(), 0, 0.0
    for name, share in shares.items():
        sofar += share
        until = round(sofar * width)
        text.append("█" * (until - edge), style=SHARE_STYLES[name])
        edge = until
    text.append("\n")
    for name, share in shares.items():
        text.append("■ ", style=SHARE_STYLES[name])
        text.append(f"{name} {share:.0%}   ")
    return text


def _pool(members: list[dict[str, Any]]) -> Table:
    """One line a teacher; what is known of it, `MemberState` in teacher_server/pool_member.py says."""
    table = _table("teacher")
    for name in ("in flight", "latency", "images/s"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    for member in members:
        out = "" if member["standing"] == "in" else f"{member['standing']} for {duration(member['for_s'])}"
        table.add_row(
            member["url"],
            f"{member['in_flight']} of {member['limit']}",
            "" if member["latency_ms"] is None else f"{member['latency_ms']:,.0f} ms",
            "" if member["images_per_s"] is None else f"{member['images_per_s']:,.0f}",
            Text(out, style="dim" if member["standing"] == "new" else "bold red"),
        )
    return table
