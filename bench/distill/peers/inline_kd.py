"""Distillation as it is done inline, in fifty lines of torch: the teacher's forward pass inside the student's step.

What timm and torchdistill do, without what they do beside it; it stands in for a peer that cannot run. The argument is that of
torchdistill_kd.py.
"""

from __future__ import annotations

import json
import sys

import torch
import torch.nn.functional as F

from bench.distill import networks  # noqa: F401 - registers the CIFAR ResNets

import timm  # isort: skip
import torchvision  # isort: skip
from torchvision import transforms  # isort: skip


def main() -> None:
    """Train for one epoch; whoever started it ends it when it has seen enough."""
    given = json.loads(sys.argv[1])
    torch.set_num_threads(given["threads"])
    torch.manual_seed(0)
    layout = torch.channels_last if given["channels_last"] else torch.contiguous_format
    teacher = timm.create_model(given["teacher"], num_classes=given["num_classes"])
    teacher.load_state_dict(torch.load(given["weights"], weights_only=True))
    student = timm.create_model(given["student"], num_classes=given["num_classes"])
    device = torch.device(given["device"])
    teacher, student = teacher.to(device, memory_format=layout).eval(), student.to(device, memory_format=layout).train()
    crop = [
        transforms.RandomResizedCrop(given["image_size"]),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(given["mean"], given["std"]),
    ]
    images = torchvision.datasets.ImageFolder(f"{given['folder']}/train", transforms.Compose(crop))
    loader = torch.utils.data.DataLoader(images, given["batch"], shuffle=True, num_workers=given["workers"], drop_last=True)
    optimizer = torch.optim.SGD(student.parameters(), lr=given["learning_rate"], momentum=0.9, weight_decay=1e-4, nesterov=True)
    for step, (batch, _) in enumerate(loader):
        images_BCHW = batch.to(device, memory_format=layout)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            with torch.inference_mode():
                teacher_BK = teacher(images_BCHW).float()
            student_BK = student(images_BCHW).float()
        loss = F.kl_div(F.log_softmax(student_BK, dim=1), F.softmax(teacher_BK.clone(), dim=1), reduction="batchmean")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        print(f"step {step + 1} loss {loss.item():.6f}", flush=True)


if __name__ == "__main__":
    main()
