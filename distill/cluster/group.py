"""A training loop in a group of Ray Train workers: started, watched, resumed, and its last checkpoint handed back.

The loop is any importable function of (config, `Worker`). If the driver or a worker dies, the same call goes on from the last checkpoint
that Ray Train registered in `folder/ray`.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import ray
import ray.exceptions
import ray.train
import ray.train.torch
import torch
from ray.train import CheckpointUploadMode
from ray.train.torch import TorchConfig, TorchTrainer

from distill.checkpoint import Write, fsync_path
from distill.cluster.board import BoardHandle, raise_failure, report_failure, start_board
from distill.cluster.session import ray_session
from distill.cluster.settings import RaySettings
from distill.cluster.stopping import ASK_EVERY_S, StopAgreement, run_stoppable
from distill.cluster.watch import RowSink, Watch
from distill.cluster.worker import LastWrite, Row, Worker
from distill.errors import DistillError
from distill.progress import RowLine, console

RAY_FOLDER = "ray"
"""In the folder of a stage: what Ray Train keeps of the run, checkpoints among it."""
WAIT_S = 24 * 3600
"""How long workers wait for one of them that waits for the teacher, or evaluates. One that died is noticed by Ray, not by waiting."""

Entry: TypeAlias = Callable[[dict[str, Any], Worker], None]
"""A training loop. Ray pickles it by reference: it must be importable in a worker, so a function at the top of a module of ours."""


@contextmanager
def run_workers(
    entry: Entry,
    config: dict[str, Any],
    settings: RaySettings,
    folder: Path,
    title: str,
    unit: str = "images",
    sinks: Sequence[RowSink] = (),
) -> Iterator[Path]:
    """Run `entry(config, worker)` in every worker to its end; the block gets the folder of the last checkpoint, while it lasts.

    Every row that worker 0 posts becomes a line of `folder/metrics.jsonl`; `step` rows move the progress line.

    Args:
        config: plain data.
        title, unit: what the progress line says is done, and of what.
        sinks: who sees the rows beside the journal and the terminal; closed at the end.

    Ctrl-C and SIGTERM make the workers keep a checkpoint and end; a second one ends at once.

    Raises:
        DistillError: what a worker met, as the class it was there; or no checkpoint at the end.
        KeyboardInterrupt, Terminated: after a signal.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _remove_unregistered(folder / RAY_FOLDER)
    with ray_session(settings):
        console.print("  starting the workers")
        board = start_board()
        trainer = _trainer({"entry": entry, "config": config, "board": board, "threads": settings.threads}, settings, folder)
        with Watch(board, folder / "metrics.jsonl", (RowLine(title, unit), *sinks)):
            try:
                result = run_stoppable(trainer.fit, lambda: _ask_to_stop(board, title))
            except ray.train.TrainingFailedError as error:
                raise_failure(board)
                raise DistillError(f"{title} stopped: {_last_line(error)}; run it again to go on from the last checkpoint") from error
            raise_failure(board)
        if result.checkpoint is None:
            raise DistillError(f"{title} ended without a checkpoint; see {folder / 'ray'}")
        with result.checkpoint.as_directory() as final:
            yield Path(final)


def _remove_unregistered(folder: Path) -> None:
    """Checkpoints that Ray does not know: a process was killed before they were registered, and nobody would ever remove them.

    The file that says what Ray knows is its own affair. Where it names none of the folders that are there, all of them stay.
    """
    snapshot = folder / "checkpoint_manager_snapshot.json"
    if not snapshot.is_file():
        return
    said, found = snapshot.read_text(encoding="utf-8"), list(folder.glob("checkpoint_*/"))
    if any(path.name in said for path in found):
        for path in found:
            if path.name not in said:
                shutil.rmtree(path, ignore_errors=True)


def _ask_to_stop(board: BoardHandle, title: str) -> bool:
    heard: bool = ray.get(board.ask_to_stop.remote())
    if heard:
        console.print(f"  {title}: stopping after this step with a checkpoint; Ctrl-C again stops at once")
    return heard


def _trainer(order: dict[str, Any], settings: RaySettings, folder: Path) -> TorchTrainer:
    return TorchTrainer(
        _work,
        torch_config=TorchConfig(timeout_s=WAIT_S),
        train_loop_config={**order, "folder": str(folder.absolute() / RAY_FOLDER)},
        scaling_config=ray.train.ScalingConfig(
            num_workers=settings.num_workers,
            use_gpu=settings.use_gpu,
            resources_per_worker={"CPU": settings.cpus_per_worker} | ({"GPU": 1} if settings.use_gpu else {}),
        ),
        run_config=ray.train.RunConfig(  # type: ignore[call-arg]  # the stubs show the class of Ray Train V1
            name=RAY_FOLDER,
            storage_path=str(folder.absolute()),
            failure_config=ray.train.FailureConfig(max_failures=settings.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),
        ),
    )


def _work(order: dict[str, Any]) -> None:
    """What Ray Train calls in every worker. A typed error goes to the board and ends the run; others make Ray start the group again.

    A worker that is alone then ends as if it were done: so Ray registers its last checkpoint, and the driver finds the error on the board.
    """
    board: BoardHandle = order["board"]
    if ray.get(board.failure.remote()) is not None:
        return  # restarted after an error that no restart mends
    worker: Worker = RayWorker(board, Path(order["folder"]))
    if worker.device.type == "cpu":
        torch.set_num_threads(order["threads"])  # Ray leaves each worker one
    try:
        order["entry"](order["config"], worker)
    except DistillError as error:
        report_failure(board, error)
        if worker.world > 1:  # the others must not wait for it
            raise


class RayWorker:
    """See `Worker`: this process as Ray Train knows it."""

    def __init__(self, board: BoardHandle, folder: Path) -> None:
        context = ray.train.get_context()
        self.rank: int = context.get_world_rank()
        self.world: int = context.get_world_size()
        self.device: torch.device = ray.train.torch.get_device()
        self._board = board
        self._folder = folder
        self._last = LastWrite()
        self._agreement = StopAgreement(_Wish(board), self.rank, self.world, self.device)

    @contextmanager
    def resume(self) -> Iterator[Path | None]:
        """See `Worker`."""
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            yield None
            return
        with checkpoint.as_directory() as folder:
            yield Path(folder)

    def checkpoint(self, prepare: Callable[[], Write]) -> None:
        """See `Worker`. Ray registers the folder when it is whole; then, and not before, it is what `resume` finds."""
        self.settle()
        if self.rank != 0:
            ray.train.report({}, checkpoint=None, checkpoint_upload_mode=CheckpointUploadMode.ASYNC)
            return
        write, writing = prepare(), Future[None]()

        def upload(_: ray.train.Checkpoint, name: str) -> ray.train.Checkpoint:
            """What Ray calls in its one upload thread: written where it stays, so nothing is copied a second time."""
            target = self._folder / name
            try:
                _write_into(target, write)
            except BaseException as error:
                writing.set_exception(error)
                raise
            writing.set_result(None)
            return ray.train.Checkpoint.from_directory(target)

        self._last.begin(writing)
        ray.train.report(
            {},
            checkpoint=ray.train.Checkpoint.from_directory(self._folder),  # Ray wants to be shown one; `upload` knows better
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            checkpoint_upload_fn=upload,
            delete_local_checkpoint_after_upload=False,
        )

    def settle(self) -> None:
        """See `Worker`. (Ray itself waits for its upload thread before it calls a worker finished.)"""
        self._last.settle()

    def should_stop(self) -> bool:
        """See `Worker`."""
        self._last.check()
        return self._agreement()

    def post(self, row: Row) -> None:
        """See `Worker`."""
        if self.rank == 0:
            self._board.post.remote(row)

    def barrier(self) -> None:
        """See `Worker`."""
        if self.world > 1:
            torch.distributed.barrier()


def _write_into(target: Path, write: Write) -> None:
    """Fill a new folder. What is written sees to its own; the folder's entry in its parent must last as well, or Ray would know a
    checkpoint that a power cut took away."""
    target.mkdir(parents=True, exist_ok=True)
    write(target)
    fsync_path(target.parent)


class _Wish:
    """Whether the driver wants a stop, as the board last said; it is asked now and then, and no step waits for its answer."""

    def __init__(self, board: BoardHandle) -> None:
        self._board = board
        self._asking: ray.ObjectRef[bool] | None = None
        self._ask_at = 0.0
        self._wanted = False

    def __call__(self) -> bool:
        if self._asking is None and time.monotonic() >= self._ask_at:
            self._asking = self._board.stopping.remote()
        if self._asking is not None and ray.wait([self._asking], timeout=0)[0]:
            self._wanted = ray.get(self._asking)
            self._asking, self._ask_at = None, time.monotonic() + ASK_EVERY_S
        return self._wanted


def _last_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
