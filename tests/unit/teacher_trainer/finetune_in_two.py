"""Run by test_finetune_in_two.py: two processes, joined by gloo, fine-tune one network together.

    python finetune_in_two.py FOLDER

FOLDER holds job.json (a `FinetuneJob`); worker 0 leaves its checkpoint in FOLDER/rank-0, and each worker its weights in FOLDER/rank-N.pt.
One program forks the second worker, so that torch is imported once.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from distill.cluster.worker import LocalWorker
from distill.image_sets import open_labelled_subset
from distill.models.saved_classifier import ClassifierCard
from distill.rejections import RejectionLog
from teacher_trainer.finetune import FinetuneJob, network_of
from teacher_trainer.supervised import train_supervised

WORLD = 2


class GlooWorker(LocalWorker):
    """One of two processes."""

    world = WORLD

    def __init__(self, folder: Path, rank: int) -> None:
        super().__init__(folder / f"rank-{rank}", device=torch.device("cpu"))
        self.rank = rank


def work(folder: Path, rank: int) -> None:
    """This worker's part of the job."""
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=WORLD)
    job = FinetuneJob.model_validate(json.loads((folder / "job.json").read_text()))
    network = network_of(job)
    card = ClassifierCard(network=job.network, num_head_layers=1, class_names=job.class_names, preprocessing=job.data.preprocessing)
    with RejectionLog(folder / f"rejected-{rank}.jsonl", 1.0) as rejections:
        labelled, worker = open_labelled_subset(job.data, job.seed), GlooWorker(folder, rank)
        train_supervised(network, card, labelled, job.data, job.finetune, job.seed, worker, rejections)
    torch.save(network.state_dict(), folder / f"rank-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def main(folder: Path) -> int:
    """Both workers; the exit code is the worse one."""
    torch.set_num_threads(1)
    child = os.fork()
    if child == 0:
        work(folder, 1)
        os._exit(0)
    work(folder, 0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
