"""One member of a group of training workers, as a training loop sees it: who it is, where it goes on, whom it tells.

A loop is written once, against `Worker`. `distill.cluster.group` runs it in Ray Train workers; `LocalWorker` runs it alone in this process.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import torch

from distill.checkpoint import recover_folder, replace_folder
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

    def checkpoint(self, write: Callable[[Path], None]) -> None:
        """Keep a checkpoint. All workers call it at the same step; `write` fills an empty folder and is called in worker 0 only."""
        ...

    def post(self, row: Row) -> None:
        """Tell the driver; only what worker 0 says is heard."""
        ...

    def barrier(self) -> None:
        """Wait until all workers are here."""
        ...


class LocalWorker:
    """The only worker, in this process; its checkpoint is `folder/checkpoint`."""

    rank = 0
    world = 1

    def __init__(self, folder: Path, on_row: Callable[[Row], None] = lambda row: None, device: torch.device | None = None) -> None:
        self.folder = folder
        self.device = device or best_device()
        self.post = on_row

    @contextmanager
    def resume(self) -> Iterator[Path | None]:
        """See `Worker`."""
        path = self.folder / "checkpoint"
        recover_folder(path)
        yield path if path.exists() else None

    def checkpoint(self, write: Callable[[Path], None]) -> None:
        """See `Worker`; the old checkpoint stays until the new one is whole."""
        pending = self.folder / ".checkpoint.pending"
        shutil.rmtree(pending, ignore_errors=True)
        pending.mkdir(parents=True)
        write(pending)
        replace_folder(pending, self.folder / "checkpoint")

    def barrier(self) -> None:
        """Nobody else to wait for."""
