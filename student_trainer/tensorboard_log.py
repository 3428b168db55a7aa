"""The rows of a run as TensorBoard event files, in `tensorboard` in the stage's folder.

A run that goes on from a checkpoint says some steps a second time. Before the first of them a session start with its step is written, which
is TensorBoard's own word for "what came from here on does not count any more", so no step is shown twice.

Unit of data: one row -> one event. The writer is tensorboardX's, which Ray Train brings along; `tensorboard` itself is only for looking.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from distill.cluster.worker import Row
from student_trainer.history import SaidAgain

FLUSH_EVERY_S = 5.0


class TensorBoardLog:
    """A `RowSink` that writes what can be drawn over steps. The files are begun with the first such row.

    Args:
        folder: of the event files; a resumed run adds a file.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: EventsWriter | None = None
        self._again = SaidAgain()
        self._flushed = time.monotonic()

    def show(self, row: Row) -> None:
        """Write what the row holds."""
        scalars = scalars_of(row)
        if not scalars:
            return
        self._begin_at(row)
        self._write(Event(step=row["step"], summary=Summary(value=[Summary.Value(tag=t, simple_value=v) for t, v in scalars.items()])), row)
        if time.monotonic() - self._flushed >= FLUSH_EVERY_S:
            self._flush()

    def close(self, failed: bool) -> None:
        """Everything is on the disk."""
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()

    def _begin_at(self, row: Row) -> None:
        """A new session, where this is the first row of the process or the run went back to a checkpoint before it."""
        again = self._again.is_said(row)
        if self._writer is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            # Its own name holds the second only: a run that is resumed at once would write over the file before.
            self._writer = EventsWriter(str(self._folder / "events"), f".{time.time_ns()}")
            again = True
        if again:
            self._write(Event(step=row["step"], session_log=SessionLog(status=SessionLog.START)), row)

    def _write(self, event: Any, row: Row) -> None:
        assert self._writer is not None
        event.wall_time = row["time"]
        self._writer.write_event(event)

    def _flush(self) -> None:
        assert self._writer is not None
        self._writer.flush()
        self._flushed = time.monotonic()


def scalars_of(row: Row) -> dict[str, float]:
    """Tag -> value of a `step` row (losses, agreement, learning rates, rate, labels, waits) or an `epoch` row (top-1); none of others."""
    if row["kind"] == "epoch":
        return {f"top1/{student}": value for student, value in row.get("top1", {}).items()}
    if row["kind"] != "step" or "losses" not in row:
        return {}
    found = {
        f"{tag}/{s}": v
        for tag, key in (("loss", "losses"), ("agreement", "agreement"), ("lr", "learning_rate"))
        for s, v in row[key].items()
    }
    found["rate/images_per_s"] = row["images_per_s"]
    totals, waits = row["totals"], row["waits_recent"]
    labels = totals["asked"] + totals["from_store"]
    if labels:
        found["labels/hit_rate"] = totals["from_store"] / labels
    whole = sum(waits.values())
    if whole > 0:
        found |= {f"waits/{name}": seconds / whole for name, seconds in waits.items()}
    return {tag: value for tag, value in found.items() if value is not None}
