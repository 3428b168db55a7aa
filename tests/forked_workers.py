"""A group of workers without Ray: forked processes of one machine, joined by gloo. For tests of what several workers do together.

    start -> fork -> work(worker 0) ... work(worker N - 1) -> the worst exit code

Unit of data: one group, from start to end.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from distill.checkpoint import Write
from distill.cluster.stopping import StopAgreement
from distill.cluster.worker import LocalWorker


class ForkedWorker(LocalWorker):
    """One of `world` processes that share `folder`; worker 0 keeps the checkpoint. Alone in its world it needs no others."""

    def __init__(self, folder: Path, rank: int, world: int, wants_stop: Callable[[], bool] = lambda: False) -> None:
        super().__init__(folder, device=torch.device("cpu"))
        self.rank, self.world = rank, world
        self._wants_stop = StopAgreement(wants_stop, rank, world, self.device)

    def checkpoint(self, prepare: Callable[[], Write]) -> None:
        """See `Worker`."""
        if self.rank == 0:
            super().checkpoint(prepare)
        self.barrier()

    def barrier(self) -> None:
        """See `Worker`."""
        if self.world > 1:
            dist.barrier()


def run_forked(folder: Path, work: Callable[[ForkedWorker], None], world: int = 2, wants_stop: Callable[[], bool] = lambda: False) -> int:
    """Run `work` in `world` processes, this one among them, each with one thread of torch; the worst of their exit codes.

    To be called before this process has started a thread: the others are its copies, so that torch is imported once.

    Args:
        wants_stop: asked in worker 0 only; see `StopAgreement`.
    """
    torch.set_num_threads(1)
    children = []
    for rank in range(1, world):
        child = os.fork()
        if child == 0:
            os._exit(_member(folder, work, rank, world, wants_stop))
        children.append(child)
    own = _member(folder, work, 0, world, wants_stop)
    return max(own, *(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))


def _member(folder: Path, work: Callable[[ForkedWorker], None], rank: int, world: int, wants_stop: Callable[[], bool]) -> int:
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=world)
    try:
        work(ForkedWorker(folder, rank, world, wants_stop))
        dist.barrier()
        dist.destroy_process_group()
    except Exception:  # noqa: BLE001 - a forked copy must end here, and not go on as its parent
        traceback.print_exc()
        return 1
    return 0
