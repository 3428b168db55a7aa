"""torchdistill's DistillationBox, set up and driven as its image_classification example does; a line for each step.

    python torchdistill_kd.py JSON

JSON: folder (with train/CLASS/*), teacher, student, weights, num_classes, image_size, batch, threads, workers, learning_rate, mean, std,
channels_last.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from bench.distill import networks  # noqa: F401 - registers the CIFAR ResNets

import timm  # isort: skip
import torchvision  # isort: skip
from torchdistill.core.distillation import get_distillation_box  # isort: skip
from torchvision import transforms  # isort: skip


def train_config(given: dict[str, Any]) -> dict[str, Any]:
    """What its YAML files hold."""
    kd = {
        "student_module_path": ".",  # the network itself: the box keeps its output by this name
        "student_module_io": "output",
        "teacher_module_path": ".",
        "teacher_module_io": "output",
        "temperature": 1.0,
        "alpha": 0.0,
        "reduction": "batchmean",
    }
    return {
        "num_epochs": 1,
        "train_data_loader": {
            "dataset_id": "train",
            "sampler": {"class_or_func": torch.utils.data.RandomSampler, "kwargs": {}},
            "kwargs": {"batch_size": given["batch"], "num_workers": given["workers"], "drop_last": True},
        },
        "teacher": {"forward_proc": "forward_batch_only", "requires_grad": False},
        "student": {"forward_proc": "forward_batch_only", "requires_grad": True},
        "optimizer": {
            "key": "SGD",
            "kwargs": {"lr": given["learning_rate"], "momentum": 0.9, "weight_decay": 1e-4, "nesterov": True},
        },
        "criterion": {
            "key": "WeightedSumLoss",
            "kwargs": {"sub_terms": {"kd": {"criterion": {"key": "KDLoss", "kwargs": kd}, "weight": 1.0}}},
        },
    }


def main() -> None:
    """Train for one epoch; whoever started it ends it when it has seen enough."""
    given = json.loads(sys.argv[1])
    torch.set_num_threads(given["threads"])
    torch.manual_seed(0)
    layout = torch.channels_last if given["channels_last"] else torch.contiguous_format
    teacher = timm.create_model(given["teacher"], num_classes=given["num_classes"])
    teacher.load_state_dict(torch.load(given["weights"], weights_only=True))
    student = timm.create_model(given["student"], num_classes=given["num_classes"])
    crop = [
        transforms.RandomResizedCrop(given["image_size"]),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(given["mean"], given["std"]),
    ]
    datasets = {"train": torchvision.datasets.ImageFolder(f"{given['folder']}/train", transforms.Compose(crop))}
    device = torch.device("cpu")
    teacher, student = teacher.to(device, memory_format=layout).eval(), student.to(device, memory_format=layout)
    box = get_distillation_box(teacher, student, datasets, train_config(given), device, None, False, 1)
    box.pre_epoch_process(epoch=0)
    for step, (sample_batch, targets, supp_dict) in enumerate(box.train_data_loader):
        sample_batch = sample_batch.to(device, memory_format=layout)
        loss = box.forward_process(sample_batch, targets, supp_dict)
        box.post_forward_process(loss=loss)
        print(f"step {step + 1} loss {loss.item():.6f}", flush=True)


if __name__ == "__main__":
    main()
