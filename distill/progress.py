"""Long work shows itself: one line with what is done, the rate and the time left.

On a terminal it is a live bar; anywhere else (a log, CI) a plain line every few seconds.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn

if TYPE_CHECKING:
    from distill.live_view import LiveRun, RunState

console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 120)
"""Where the command line speaks to its user. A log has no width of its own: 120 columns hold our tables."""

PLAIN_EVERY_S = 10.0


class ProgressLine:
    """`with ProgressLine("pretrain", total=1000, unit="images") as line: line.update(64, "loss 2.31")`.

    Args:
        live: False where something else draws on the terminal: then only `close` speaks.
    """

    def __init__(self, title: str, total: int, unit: str = "images", live: bool = True) -> None:
        self.title = title
        self.total = total
        self.unit = unit
        self._drawn = live
        self.done = 0
        self._skipped = 0
        self._note = ""
        self._started = self._said = time.monotonic()
        self._live: Progress | None = None

    def __enter__(self) -> Self:
        self._started = self._said = time.monotonic()
        if console.is_terminal and self._drawn:
            columns = (
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                TextColumn("{task.fields[note]}"),
            )
            self._live = Progress(*columns, console=console, transient=True)
            self._task = self._live.add_task(self.title, total=self.total, note="")
            self._live.start()
        return self

    def skip(self, count: int) -> None:
        """Count work that was done before (a resumed run) without letting it into the rate."""
        self.done += count
        self._skipped += count

    def update(self, count: int, note: str = "") -> None:
        """`count` more units are done; `note` is shown behind the rate."""
        self.done += count
        self._note = note or self._note
        if self._live is not None:
            self._live.update(self._task, completed=self.done, note=self.describe())
        elif self._drawn and time.monotonic() - self._said >= PLAIN_EVERY_S:
            self._said = time.monotonic()
            console.print(f"  {self.title}: {self.done}/{self.total} {self.unit}, {self.describe()}")

    @property
    def rate(self) -> float:
        """Units a second since the start."""
        return (self.done - self._skipped) / max(time.monotonic() - self._started, 1e-9)

    def describe(self) -> str:
        """Rate, time left and the note."""
        left_s = (self.total - self.done) / self.rate if self.rate > 0 else 0.0
        return f"{self.rate:.0f} {self.unit}/s, {duration(left_s)} left" + (f", {self._note}" if self._note else "")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close(failed=error is not None)

    def close(self, failed: bool) -> None:
        """Take the live bar away and say what was done, unless it failed."""
        if self._live is not None:
            self._live.stop()
        if not failed and self.done > self._skipped:
            took = duration(time.monotonic() - self._started)
            console.print(
                f"  {self.title}: {self.done} {self.unit} in {took}, {self.rate:.0f}/s" + (f", {self._note}" if self._note else "")
            )


class RowLine:
    """Shows the rows of a worker group (`distill.cluster.worker.Row`) from the first `step` row on, which says where the work goes on.

    On a terminal rows that tell of `totals` become the live picture of `distill.live_view`; all others, and a log, get the progress line.

    Args:
        exact: every unit is told of in a `step` row. Otherwise these come now and then, and a good end was at the step of the last
            `checkpoint` row (it may be an early one); where no such row ever came, all units are taken for done.
    """

    def __init__(self, title: str, unit: str = "images", exact: bool = False) -> None:
        self._title = title
        self._exact = exact
        self._unit = unit
        self._line: ProgressLine | None = None
        self._picture: LiveRun | None = None
        self._state: RunState | None = None
        self._images_per_step = 1
        self._kept: int | None = None
        """Units done at the last checkpoint."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close(failed=error is not None)

    def show(self, row: dict[str, Any]) -> None:
        """Move on, if the row says how far the work is."""
        if row["kind"] == "step":
            self._line = self._line or self._start(row)
            self._images_per_step = row["images"]
            self._line.update(row["step"] * row["images"] - self._line.done, row["note"])
        elif row["kind"] == "checkpoint":
            self._kept = row["step"] * self._images_per_step
        elif row["kind"] == "silence" and self._line is not None:
            self._line.update(0, f"the teacher has been silent for {duration(row['seconds'])}; it is asked again and again")
        if self._state is not None:
            self._state.take(row)

    def close(self, failed: bool) -> None:
        """The work ended."""
        if self._picture is not None:
            self._picture.stop()
        if self._line is not None:
            if not failed and not self._exact:
                self._line.update((self._line.total if self._kept is None else self._kept) - self._line.done)
            self._line.close(failed)

    def _start(self, row: dict[str, Any]) -> ProgressLine:
        pictured = console.is_terminal and "totals" in row
        line = ProgressLine(self._title, row["of"] * row["images"], self._unit, live=not pictured)
        line.__enter__()
        line.skip(row["step"] * row["images"])
        if pictured:
            self._draw(row)
        return line

    def _draw(self, row: dict[str, Any]) -> None:
        from distill.live_view import LiveRun, RunState  # it builds on this module

        self._state = RunState(self._title, self._unit)
        self._state.take(row)
        self._picture = LiveRun(self._state)
        self._picture.start()


def duration(seconds: float) -> str:
    """Seconds as a person says them: 8 s, 3 min 20 s, 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
