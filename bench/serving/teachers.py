"""The two teachers that are served: a small one at 32 pixels and ResNet-50 at 224. Their weights are random; speed does not depend on them.

Unit of data: one model repository with one teacher, made by the project's own export and its parity gate.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from distill.models.classifier import Classifier, build_classifier
from distill.models.settings import NetworkSettings
from distill.teacher_info import Preprocessing
from export.settings import RepositorySettings, TeacherExportSettings
from export.teacher import export_teacher, publish_teacher
from teacher_server.model_repository import served_model


@dataclass(frozen=True)
class Teacher:
    """A teacher to be served, and how much of it one cell asks for."""

    name: str
    network: NetworkSettings
    image_size: int
    num_classes: int
    num_images: int
    """Images of one cell: some ten seconds of two cores."""


TEACHERS = {
    teacher.name: teacher
    for teacher in (
        Teacher("small", NetworkSettings(depth=18, width_multiplier=0.25, stem="cifar"), 32, 10, 4096),
        Teacher("resnet50", NetworkSettings(depth=50), 224, 1000, 128),
    )
}


def synthetic_crops(count: int, image_size: int) -> npt.NDArray[np.uint8]:
    """Smooth colour waves with a little noise, uint8 [count,S,S,3]: they compress as photographs do."""
    generator = np.random.default_rng(0)
    rows, columns = np.mgrid[0 : 1 : image_size * 1j, 0 : 1 : image_size * 1j]
    phases, speeds = generator.uniform(0, 6, (2, count, 1, 1, 3))
    waves = 127 + 90 * np.sin(phases + speeds * (3 * rows + 2 * columns)[None, :, :, None])
    return np.clip(waves + generator.normal(0, 6, waves.shape), 0, 255).astype(np.uint8)


def make_repository(teacher: Teacher, folder: Path, threads: int) -> Path:
    """`folder / repository`, made anew where it is not there."""
    repository = folder / "repository"
    if (repository / teacher.name / "config.pbtxt").exists():
        return repository
    torch.manual_seed(0)
    preprocessing = Preprocessing(image_size=teacher.image_size, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    network: Classifier = build_classifier(teacher.network, teacher.num_classes, preprocessing)
    torch.nn.init.normal_(network.body.linear.weight, std=0.05)  # from zero, all labels would be alike
    settings = TeacherExportSettings(name=teacher.name, num_parity_images=8, repository=RepositorySettings(intra_op_threads=threads))
    crops = synthetic_crops(8, teacher.image_size)
    names = [f"class {number}" for number in range(teacher.num_classes)]
    export_teacher(network, preprocessing, names, crops, [f"{number}" for number in range(8)], folder, settings)
    publish_teacher(folder, repository, settings)
    return repository


def model_file(teacher: Teacher, repository: Path) -> Path:
    """The ONNX file that every system loads."""
    return served_model(repository, teacher.name)
