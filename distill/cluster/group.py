"""A training loop in a group of Ray Train workers: started, watched, resumed, and its last checkpoint handed back.

The loop is any importable function of (config, `Worker`). If the driver or a worker dies, the same call goes on from the last checkpoint
that Ray Train registered in `folder/ray`.
"""

from __future__ import annotations

import json
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

import ray
import ray.exceptions
import ray.train
import ray.train.torch
import torch
from ray.train.torch import TorchTrainer

from distill.cluster.board import BoardHandle, raise_failure, report_failure, start_board
from distill.cluster.session import ray_session
from distill.cluster.settings import RaySettings
from distill.cluster.worker import Row, Worker
from distill.errors import DistillError
from distill.progress import RowLine, console

WATCH_EVERY_S = 0.5

Entry: TypeAlias = Callable[[dict[str, Any], Worker], None]
"""A training loop. Ray pickles it by reference: it must be importable in a worker, so a function at the top of a module of ours."""


@contextmanager
def run_workers(
    entry: Entry, config: dict[str, Any], settings: RaySettings, folder: Path, title: str, unit: str = "images"
) -> Iterator[Path]:
    """Run `entry(config, worker)` in every worker to its end; the block gets the folder of the last checkpoint, while it lasts.

    Every row that worker 0 posts becomes a line of `folder/metrics.jsonl`; `step` rows move the progress line.

    Args:
        config: plain data.
        title, unit: what the progress line says is done, and of what.

    Raises:
        DistillError: what a worker met, as the class it was there; or no checkpoint at the end.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with ray_session(settings):
        console.print("  starting the workers")
        board = start_board()
        trainer = _trainer({"entry": entry, "config": config, "board": board, "threads": settings.threads}, settings, folder)
        with _Watch(board, title, unit, folder / "metrics.jsonl"), _own_ctrl_c():
            try:
                result = trainer.fit()
            except ray.train.TrainingFailedError as error:
                raise_failure(board)
                raise DistillError(f"{title} stopped: {_last_line(error)}; run it again to go on from the last checkpoint") from error
            raise_failure(board)
        if result.checkpoint is None:
            raise DistillError(f"{title} ended without a checkpoint; see {folder / 'ray'}")
        with result.checkpoint.as_directory() as final:
            yield Path(final)


def _trainer(order: dict[str, Any], settings: RaySettings, folder: Path) -> TorchTrainer:
    return TorchTrainer(
        _work,
        train_loop_config=order,
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


def _work(order: dict[str, Any]) -> None:
    """What Ray Train calls in every worker. A typed error goes to the board and ends the run; others make Ray start the group again."""
    board: BoardHandle = order["board"]
    if ray.get(board.failure.remote()) is not None:
        return  # restarted after an error that no restart mends
    worker: Worker = RayWorker(board)
    if worker.device.type == "cpu":
        torch.set_num_threads(order["threads"])  # Ray leaves each worker one
    try:
        order["entry"](order["config"], worker)
    except DistillError as error:
        report_failure(board, error)
        raise


class RayWorker:
    """See `Worker`: this process as Ray Train knows it."""

    def __init__(self, board: BoardHandle) -> None:
        context = ray.train.get_context()
        self.rank: int = context.get_world_rank()
        self.world: int = context.get_world_size()
        self.device: torch.device = ray.train.torch.get_device()
        self._board = board

    @contextmanager
    def resume(self) -> Iterator[Path | None]:
        """See `Worker`."""
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            yield None
            return
        with checkpoint.as_directory() as folder:
            yield Path(folder)

    def checkpoint(self, write: Callable[[Path], None]) -> None:
        """See `Worker`. Ray copies the folder and registers it; then, and not before, it is what `resume` finds."""
        with tempfile.TemporaryDirectory() as folder:
            if self.rank == 0:
                write(Path(folder))
            ray.train.report({}, checkpoint=ray.train.Checkpoint.from_directory(folder) if self.rank == 0 else None)

    def post(self, row: Row) -> None:
        """See `Worker`."""
        if self.rank == 0:
            self._board.post.remote(row)

    def barrier(self) -> None:
        """See `Worker`."""
        if self.world > 1:
            torch.distributed.barrier()


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


class _Watch:
    """Reads the board in a thread while `fit` blocks: shows the progress, writes the rows to the journal."""

    def __init__(self, board: BoardHandle, title: str, unit: str, journal: Path) -> None:
        self._board = board
        self._journal = journal
        self._line = RowLine(title, unit)
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
        with self._journal.open("a", encoding="utf-8", buffering=1) as journal:  # whole lines: kill -9 leaves no half of one
            while True:
                last_look = self._stop.is_set()
                for row in self._rows():
                    journal.write(json.dumps(row) + "\n")
                    self._line.show(row)
                if last_look:
                    break
                self._stop.wait(WATCH_EVERY_S)
        self._line.close(self._failed)

    def _rows(self) -> list[Row]:
        try:
            return ray.get(self._board.take.remote())
        except ray.exceptions.RayError:
            return []  # the cluster is going down; `fit` says why


def _last_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
