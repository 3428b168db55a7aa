"""A network of the form that all of ours have, small enough to export in a second, and crops with structure."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from distill.teacher_info import Preprocessing, TeacherInfo
from export.fingerprint import stamp_teacher
from export.graph import export_teacher_graph
from export.settings import Int8Gate, StudentExportSettings
from export.student import export_student

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


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny student's folder, with everything that an export makes, all of it shipped. Copy it before changing it."""
    folder = tmp_path_factory.mktemp("exported")
    lenient = Int8Gate(max_latency_ratio=1000, max_size_ratio=1000, max_accuracy_drop=1)
    settings = StudentExportSettings(latency_rounds=2, latency_repeats=5, gate=lenient)
    export_student(
        make_network(), "tiny", IMAGE_SIZE, CLASS_NAMES, PREPROCESSING, make_crops(64, seed=1), make_crops(64), None, folder, settings
    )  # fmt: skip
    return folder


NUM_HAND_MADE_CLASSES = 6


def make_teacher(middle: list[onnx.NodeProto] | None = None, constants: dict[str, float] | None = None, opset: int = 20) -> onnx.ModelProto:
    """A teacher graph node by node, each with a name; nothing is exported for it.

    images -> /255 -> Conv -> Relu -> `middle` (from `features` to `seen`) -> pool -> Gemm -> logits -> soft labels.
    """
    generator = np.random.default_rng(11)
    arrays = {
        "scale": np.array([255.0]),
        "kernels": generator.normal(0, 0.6, (8, 3, 3, 3)),
        "linear": generator.normal(0, 4, (8, NUM_HAND_MADE_CLASSES)),
        "bias": generator.normal(0, 1, NUM_HAND_MADE_CLASSES),
        **{name: np.array([value]) for name, value in (constants or {}).items()},
    }
    nodes = [
        helper.make_node("Cast", ["images"], ["pixels"], name="cast", to=TensorProto.FLOAT),
        helper.make_node("Div", ["pixels", "scale"], ["scaled"], name="scale_down"),
        helper.make_node("Transpose", ["scaled"], ["planes"], name="planes_first", perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["planes", "kernels"], ["convolved"], name="conv"),
        helper.make_node("Relu", ["convolved"], ["features"], name="relu"),
        *(middle or [helper.make_node("Identity", ["features"], ["seen"], name="nothing")]),
        helper.make_node("GlobalAveragePool", ["seen"], ["pooled"], name="pool"),
        helper.make_node("Flatten", ["pooled"], ["flat"], name="flatten"),
        helper.make_node("Gemm", ["flat", "linear", "bias"], ["logits"], name="classifier"),
        helper.make_node("Div", ["logits", "temperature"], ["tempered"], name="temper"),
        helper.make_node("Softmax", ["tempered"], ["soft_labels"], name="soften", axis=1),
    ]
    graph = helper.make_graph(
        nodes,
        "classifier",
        [
            helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", IMAGE_SIZE, IMAGE_SIZE, 3]),
            helper.make_tensor_value_info("temperature", TensorProto.FLOAT, ["batch", 1]),
        ],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", NUM_HAND_MADE_CLASSES]) for name in ("logits", "soft_labels")],
        [numpy_helper.from_array(array.astype(np.float32), name) for name, array in arrays.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def make_loud_teacher() -> onnx.ModelProto:
    """A teacher whose features are multiplied by 10^6 in two steps, and brought back: 10^6 is beyond fp16, 10^3 is not."""
    steps = [("loud_1", "thousand"), ("loud_2", "thousand"), ("quiet_1", "thousandth"), ("quiet_2", "thousandth")]
    names = ["features", "louder", "loudest", "quieter", "seen"]
    nodes = [helper.make_node("Mul", [names[row], factor], [names[row + 1]], name=name) for row, (name, factor) in enumerate(steps)]
    return make_teacher(nodes, {"thousand": 1000.0, "thousandth": 0.001})


@pytest.fixture
def hand_made() -> Callable[..., onnx.ModelProto]:
    return make_teacher


@pytest.fixture
def loud_teacher() -> onnx.ModelProto:
    return make_loud_teacher()
