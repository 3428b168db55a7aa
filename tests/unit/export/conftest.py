"""A network of the form that all of ours have, small enough to export in a second, and crops with structure."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

from distill.teacher_info import Preprocessing, TeacherInfo
from export.fingerprint import stamp_teacher
from export.graph import export_teacher_graph

IMAGE_SIZE = 16
PREPROCESSING = Preprocessing(image_size=IMAGE_SIZE, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))
CLASS_NAMES = ("ant", "bee", "cat", "dog", "eel")


class TinyClassifier(nn.Module):
    """uint8 [B,16,16,3] -> logits [B,5]: normalise, two convolutions with batch norm, pool, dropout, linear."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(PREPROCESSING.mean))
        self.register_buffer("std", torch.tensor(PREPROCESSING.std))
        self.body = nn.Sequential(
            nn.Conv2d(3, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(2 * channels),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Dropout(0.5),
            nn.Linear(2 * channels, len(CLASS_NAMES)),
        )

    def forward(self, crops_BHWC: Tensor) -> Tensor:
        scaled_BHWC = (crops_BHWC.float() / 255 - self.mean) / self.std
        return self.body(scaled_BHWC.permute(0, 3, 1, 2))


def make_network(channels: int = 16) -> TinyClassifier:
    """The same weights on every call, with batch-norm statistics away from 0 and 1."""
    torch.manual_seed(7)
    network = TinyClassifier(channels)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.3, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=3.0)
    return network.eval()


def make_crops(number: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    """Coloured gradients with noise: uint8 [number,16,16,3]."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[0:1:16j, 0:1:16j]
    slopes, base = generator.uniform(-120, 120, (2, number, 1, 1, 3)), generator.uniform(40, 215, (number, 1, 1, 3))
    smooth = base + slopes[0] * y[None, :, :, None] + slopes[1] * x[None, :, :, None]
    return np.clip(smooth + generator.normal(0, 12, smooth.shape), 0, 255).astype(np.uint8)


@pytest.fixture
def network() -> TinyClassifier:
    return make_network()


@pytest.fixture(scope="session")
def crops() -> npt.NDArray[np.uint8]:
    return make_crops(64)


@pytest.fixture(scope="session")
def calibration_crops() -> npt.NDArray[np.uint8]:
    return make_crops(64, seed=1)


@pytest.fixture(scope="session")
def image_ids() -> list[str]:
    return [f"image-{number:03d}" for number in range(64)]


@pytest.fixture(scope="session")
def class_names() -> tuple[str, ...]:
    return CLASS_NAMES


@pytest.fixture(scope="session")
def preprocessing() -> Preprocessing:
    return PREPROCESSING


@pytest.fixture(scope="session")
def teacher_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher graph, not stamped. Copy it before changing it."""
    path = tmp_path_factory.mktemp("teacher") / "model.onnx"
    export_teacher_graph(make_network(), IMAGE_SIZE, path)
    return path


@pytest.fixture
def stamped(teacher_model: Path, tmp_path: Path) -> tuple[Path, TeacherInfo]:
    """A stamped copy of the teacher graph, and what it says of itself."""
    path = tmp_path / "stamped.onnx"
    path.write_bytes(teacher_model.read_bytes())
    return path, stamp_teacher(path, name="tiny", class_names=CLASS_NAMES, preprocessing=PREPROCESSING)
