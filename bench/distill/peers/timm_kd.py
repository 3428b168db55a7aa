"""timm's own train.py with its distillation task, the bench's teacher and student under timm's names.

    python timm_kd.py TRAIN_PY THREADS TEACHER WEIGHTS NUM_CLASSES [arguments of train.py ...]

TRAIN_PY is a file of timm's repository, not of its wheel. Here nothing is added to it but a model name, `bench_teacher`: train.py asks for
a pretrained teacher by name, and this one has its weights from a local file.
"""

from __future__ import annotations

import runpy
import sys
from typing import Any

import torch

from bench.distill import networks  # noqa: F401 - registers the CIFAR ResNets

import timm  # isort: skip
from timm.models import register_model  # isort: skip

TRAIN_PY, THREADS, TEACHER, WEIGHTS, NUM_CLASSES = sys.argv[1:6]


@register_model
def bench_teacher(pretrained: bool = False, **_: Any) -> torch.nn.Module:
    """The teacher of the bench, with its weights."""
    network = timm.create_model(TEACHER, num_classes=int(NUM_CLASSES))
    network.load_state_dict(torch.load(WEIGHTS, weights_only=True))
    return network


if __name__ == "__main__":
    torch.set_num_threads(int(THREADS))
    sys.argv = [TRAIN_PY, *sys.argv[6:]]
    runpy.run_path(TRAIN_PY, run_name="__main__")
