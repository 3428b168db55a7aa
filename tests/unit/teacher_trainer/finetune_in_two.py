"""Run by test_finetune_in_two.py: two processes, joined by gloo, fine-tune one network together.

    python finetune_in_two.py FOLDER

FOLDER holds job.json (a `FinetuneJob`); worker 0 leaves its checkpoint in FOLDER/rank-0, and each worker its weights in FOLDER/rank-N.pt.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from distill.image_sets import open_labelled_subset
from distill.models.saved_classifier import ClassifierCard
from distill.rejections import RejectionLog
from teacher_trainer.finetune import FinetuneJob, network_of
from teacher_trainer.supervised import train_supervised

sys.path.insert(0, str(Path(__file__).parents[2]))  # the folder of the tests
from forked_workers import ForkedWorker, run_forked


def work(worker: ForkedWorker) -> None:
    """This worker's part of the job."""
    folder, rank = worker.folder, worker.rank
    worker.folder = folder / "rank-0"
    job = FinetuneJob.model_validate(json.loads((folder / "job.json").read_text()))
    network = network_of(job)
    card = ClassifierCard(network=job.network, num_head_layers=1, class_names=job.class_names, preprocessing=job.data.preprocessing)
    with RejectionLog(folder / f"rejected-{rank}.jsonl", 1.0) as rejections:
        labelled = open_labelled_subset(job.data, job.seed)
        train_supervised(network, card, labelled, job.data, job.finetune, job.seed, worker, rejections)
    torch.save(network.state_dict(), folder / f"rank-{rank}.pt")


if __name__ == "__main__":
    sys.exit(run_forked(Path(sys.argv[1]), work))
