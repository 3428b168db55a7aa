"""One member of a group of training workers, as a training loop sees it: who it is, where it goes on, whom it tells, when it is to stop.

A loop is written once, against `Worker`. `distill.cluster.group` runs it in Ray Train workers; `LocalWorker` runs it alone in this process.
A loop runs inside `settling`: however it ends, its last checkpoint is whole. Asked to stop, it keeps a checkpoint and ends as always.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import torch

from distill.checkpoint import Write, recover_folder, replace_folder
from distill.devices import best_device

Row: TypeAlias = dict[str, Any]
"""Something to tell, plain data. `kind` says what it is: `step` rows hold `step` (done so far), `of` (of how many), `images` (of one step,
over all workers) and `note` (what to show behind the rate); `silence` rows hold `seconds`; all others are for the journal only."""


class Worker(Protocol):
    """One of `world` workers; number `rank`, from 0. With more than one, `torch.distributed` is initialised."""

    rank: int
    world: int
    device: torch.device

    def resume(self) -> AbstractContextManager[Path | None]:
        """The folder of the last checkpoint of this group, or None at the start."""
        ...

    def checkpoint(self, prepare: Callable[[], Write]) -> None:
        """Keep a checkpoint. All workers call it at the same step; `prepare` is called at once, in worker 0 only, and copies what is to be
        kept (`distill.checkpoint.prepare_checkpoint`). What it returns fills an empty folder, in a thread, while the loop goes on.

        One checkpoint is written at a time: the next one waits for the last.

        Raises:
            what writing the last one raised.
        """
        ...

    def settle(self) -> None:
        """Wait until the last checkpoint is whole.

        Raises:
            what writing it raised.
        """
        ...

    def should_stop(self) -> bool:
        """Whether the loop is to keep a checkpoint and end. All workers call it at the same steps and get the same answer. Cheap: whoever
        wants the stop is asked about twice a second.

        Raises:
            what writing the last checkpoint raised.
        """
        ...

    def post(self, row: Row) -> None:
        """Tell the driver; only what worker 0 says is heard."""
        ...

    def barrier(self) -> None:
        """Wait until all workers are here."""
        ...


@contextmanager
def settling(worker: Worker) -> Iterator[None]:
    """Around a training loop: its last checkpoint is whole at the end, also where the loop fails."""
    try:
        yield
    finally:
        worker.settle()


class LastWrite:
    """The checkpoint that is being written, if any: at most one."""

    def __init__(self) -> None:
        self._writing: Future[None] | None = None

    def begin(self, writing: Future[None]) -> None:
        """This one is being written from now on."""
        self._writing = writing

    def check(self) -> None:
        """Raise what writing it raised, if that is known by now."""
        if self._writing is not None and self._writing.done():
            self.settle()

    def settle(self) -> None:
        """Wait for it; raise what writing it raised, once."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()


class LocalWorker:
    """The only worker, in this process; its checkpoint is `folder/checkpoint`.

    Args:
        wants_stop: asked before each step whether the loop is to end.
    """

    rank = 0
    world = 1

    def __init__(
        self,
        folder: Path,
        on_row: Callable[[Row], None] = lambda row: None,
        device: torch.device | None = None,
        wants_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.folder = folder
        self.device = device or best_device()
        self.post = on_row
        self._wants_stop = wants_stop
        self._last = LastWrite()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")

    @contextmanager
    def resume(self) -> Iterator[Path | None]:
        """See `Worker`."""
        path = self.folder / "checkpoint"
        recover_folder(path)
        yield path if path.exists() else None

    def checkpoint(self, prepare: Callable[[], Write]) -> None:
        """See `Worker`; the old checkpoint stays until the new one is whole."""
        self.settle()
        self._last.begin(self._writer.submit(self._write, prepare()))

    def _write(self, write: Write) -> None:
        pending = self.folder / ".checkpoint.pending"
        shutil.rmtree(pending, ignore_errors=True)
        pending.mkdir(parents=True)
        write(pending)
        replace_folder(pending, self.folder / "checkpoint")

    def settle(self) -> None:
        """See `Worker`."""
        self._last.settle()

    def should_stop(self) -> bool:
        """See `Worker`."""
        self._last.check()
        return self._wants_stop()

    def barrier(self) -> None:
        """Nobody else to wait for."""
