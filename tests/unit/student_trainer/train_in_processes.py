"""Run by test_worker.py: the training loop in two processes that gloo joins, with the fake teacher.

    python train_in_processes.py FOLDER JOB_JSON

FOLDER/checkpoint holds the students at the end. One program forks the second worker, so that torch is imported once.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from distill.cluster.worker import LocalWorker
from student_trainer import lessons
from student_trainer.worker import train_worker
from teacher_server.fake import FakeTeacher

WORLD = 2


class GlooWorker(LocalWorker):
    """One of two processes; the first one writes."""

    world = WORLD

    def __init__(self, folder: Path, rank: int) -> None:
        super().__init__(folder, device=torch.device("cpu"))
        self.rank = rank

    def checkpoint(self, write: Callable[[Path], None]) -> None:
        if self.rank == 0:
            super().checkpoint(write)
        self.barrier()

    def barrier(self) -> None:
        dist.barrier()


def work(folder: Path, job: dict[str, Any], rank: int) -> None:
    """One worker, from start to end."""
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=WORLD)
    lessons.open_teacher = lambda address: FakeTeacher(len(job["class_names"]))
    train_worker(job, GlooWorker(folder, rank))
    dist.barrier()
    dist.destroy_process_group()


def main(folder: Path, job: dict[str, Any]) -> int:
    """Both workers; the exit code of the second, unless the first one raises."""
    torch.set_num_threads(1)
    child = os.fork()
    if child == 0:
        work(folder, job, 1)
        os._exit(0)
    work(folder, job, 0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), json.loads(sys.argv[2])))
