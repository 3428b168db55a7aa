"""Stage 3, train: starts the workers, shows how far they are, and keeps the students they end with.

If the driver or a worker dies, the same call goes on from the last checkpoint that Ray Train registered in `folder/ray`.
"""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import ray
import ray.exceptions
import ray.train
import torch
from ray.train.torch import TorchTrainer

from distill.config import digest_of
from distill.errors import DistillError
from distill.models.saved_classifier import ClassifierCard, save_classifier
from distill.progress import ProgressLine, console, duration
from student_trainer.board import BoardHandle, raise_failure, start_board
from student_trainer.job import TrainJob
from student_trainer.ray_session import ray_session
from student_trainer.settings import RaySettings
from student_trainer.students import Student, restore_students
from student_trainer.waits import Waits
from student_trainer.worker import train_worker

WATCH_EVERY_S = 0.5


def train_students(job: TrainJob, settings: RaySettings, folder: Path, title: str) -> dict[str, Any]:
    """Train all students of the job; `folder/students/NAME` holds them at the end.

    Returns:
        Plain data: totals (images, labels asked and read, seconds, waits) and one row an epoch (loss and test top-1 of each student).

    Raises:
        DistillError: what a worker met, as the class it was there.
    """
    with ray_session(settings):
        console.print("  starting the workers")
        board = start_board()
        trainer = TorchTrainer(
            train_worker,
            train_loop_config={"job": job.model_dump(mode="json"), "board": board},
            scaling_config=ray.train.ScalingConfig(
                num_workers=settings.num_workers,
                use_gpu=settings.use_gpu,
                resources_per_worker={"CPU": settings.cpus_per_worker} | ({"GPU": 1} if settings.use_gpu else {}),
            ),
            run_config=ray.train.RunConfig(  # type: ignore[call-arg]  # the stubs show the class of Ray Train V1
                name="ray",
                storage_path=str(folder.absolute()),
                failure_config=ray.train.FailureConfig(max_failures=settings.max_failures),
                checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
                logging_config=ray.train.LoggingConfig(log_level="ERROR"),
            ),
        )
        with _Watch(board, title, job.train.global_batch, folder / "metrics.jsonl"), _own_ctrl_c():
            try:
                result = trainer.fit()
            except ray.train.TrainingFailedError as error:
                raise_failure(board)
                raise DistillError(f"training stopped: {_last_line(error)}; run it again to go on from the last checkpoint") from error
            raise_failure(board)
        if result.checkpoint is None:
            raise DistillError(f"training ended without a checkpoint; see {folder / 'ray'}")
        with result.checkpoint.as_directory() as final:
            progress = _keep_students(Path(final) / "students", job, folder)
        return {"totals": progress["totals"], "epochs": progress["epochs"]}


@contextmanager
def _own_ctrl_c() -> Iterator[None]:
    """Ray Train answers Ctrl-C itself, by ending this process with exit code 0, and leaves its handler behind: make it Ctrl-C again."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals go to the main thread; Ray leaves them alone here
        return
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as stop:
        raise KeyboardInterrupt from stop
    finally:
        signal.signal(signal.SIGINT, before)


def _keep_students(checkpoint: Path, job: TrainJob, folder: Path) -> dict[str, Any]:
    """Write each student of the last checkpoint as a classifier of its own; return the run's totals and epochs."""
    device = torch.device("cpu")
    students = [Student(s, len(job.class_names), job.data.preprocessing, job.seed, device) for s in job.train.students]
    progress = restore_students(checkpoint, students)
    for student in students:
        origin = {
            "objective": job.objective,
            "teacher": job.store_identity.fingerprint if job.store_identity else None,
            "job": digest_of(job.model_dump(mode="json", exclude={"teacher", "store_folder", "rejected_path", "num_threads"})),
            "store": progress.get("store"),
        }
        card = ClassifierCard(
            network=student.settings.network, class_names=job.class_names, preprocessing=job.data.preprocessing, origin=origin
        )
        save_classifier(folder / "students" / student.settings.name, student.network, card)
    return progress


class _Watch:
    """Reads the board in a thread while `fit` blocks: shows the progress, writes the rows to metrics.jsonl."""

    def __init__(self, board: BoardHandle, title: str, global_batch: int, journal: Path) -> None:
        self._batch = global_batch
        self._board = board
        self._journal = journal
        self._title = title
        self._stop = threading.Event()
        self._failed = False
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)

    def __enter__(self) -> _Watch:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._failed = error is not None
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        line: ProgressLine | None = None
        with self._journal.open("a", encoding="utf-8", buffering=1) as journal:  # whole lines: kill -9 leaves no half of one
            while True:
                last_look = self._stop.is_set()
                for row in self._rows():
                    journal.write(json.dumps(row) + "\n")
                    if row["kind"] == "step":
                        line = line or self._start_line(row)
                        line.update(row["step"] * self._batch - line.done, _describe(row))
                    elif row["kind"] == "silence" and line is not None:
                        line.update(0, f"the teacher has been silent for {duration(row['seconds'])}; it is asked again and again")
                if last_look:
                    break
                self._stop.wait(WATCH_EVERY_S)
        if line is not None:
            if not self._failed:
                line.update(line.total - line.done)
            line.__exit__(None, DistillError("stopped") if self._failed else None, None)

    def _rows(self) -> list[dict[str, Any]]:
        try:
            return ray.get(self._board.take.remote())
        except ray.exceptions.RayError:
            return []  # the cluster is going down; `fit` says why

    def _start_line(self, row: dict[str, Any]) -> ProgressLine:
        line = ProgressLine(self._title, row["of"] * self._batch)
        line.__enter__()
        line.skip(row["step"] * self._batch)
        return line


def _describe(row: dict[str, Any]) -> str:
    losses = ", ".join(f"{name} {loss:.3f}" for name, loss in row["losses"].items())
    totals = row["totals"]
    known = totals["asked"] + totals["from_store"]
    reuse = f", {totals['from_store'] / known:.0%} of labels from the store" if known else ""
    waits = Waits.model_validate(row["waits"])
    busy = f", {waits.describe()}" if known else ""
    return f"loss {losses}{reuse}{busy}"


def _last_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
