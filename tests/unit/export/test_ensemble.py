"""An ensemble says what numpy says of its members, each asked by itself; members that do not fit are refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from distill.errors import ConfigError, ParityError
from distill.teacher_info import Preprocessing
from export import ensemble as module
from export.ensemble import ensemble_preprocessing, export_ensemble, mean_reference, merge_teachers, read_members
from export.fingerprint import read_teacher_info, stamp_teacher
from export.graph import export_teacher_graph
from export.half_precision import to_half_precision
from export.parity import ParityReport
from export.settings import PARITY_OF, TeacherExportSettings

Crops = npt.NDArray[np.uint8]
SETTINGS = TeacherExportSettings(name="both", num_parity_images=32)


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory, class_names: tuple[str, ...]) -> list[Path]:
    """A convolution with its own normalisation, and a linear model by hand in another opset, with a large common offset in its logits."""
    folder = tmp_path_factory.mktemp("members")
    torch.manual_seed(3)
    network = Normalised(mean=(0.2, 0.3, 0.4), std=(0.5, 0.4, 0.3), num_classes=len(class_names))
    first, second = folder / "first" / "model.onnx", folder / "second" / "model.onnx"
    export_teacher_graph(network.eval(), 16, first)
    preprocessing = Preprocessing(image_size=16, mean=(0.2, 0.3, 0.4), std=(0.5, 0.4, 0.3))
    stamp_teacher(first, name="first", class_names=class_names, preprocessing=preprocessing)
    by_hand(second, num_classes=len(class_names), opset=17)
    stamp_teacher(second, name="second", version=4, class_names=class_names, preprocessing=Preprocessing(image_size=16))
    return [first, second]


class Normalised(nn.Module):
    """uint8 [B,16,16,3] -> logits [B,K]."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], num_classes: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("std", torch.tensor(std))
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.linear = nn.Linear(8, num_classes)
        nn.init.normal_(self.linear.weight, std=8.0)

    def forward(self, crops_BHWC: torch.Tensor) -> torch.Tensor:
        scaled_BHWC = (crops_BHWC.float() / 255 - self.mean) / self.std
        return self.linear(torch.relu(self.conv(scaled_BHWC.permute(0, 3, 1, 2))).mean(dim=(2, 3)))


def by_hand(path: Path, num_classes: int, opset: int) -> None:
    """logits = mean RGB @ weight + 50, with names that the other member uses, too."""
    images = helper.make_tensor_value_info("images", TensorProto.UINT8, ["n", 16, 16, 3])
    temperature = helper.make_tensor_value_info("temperature", TensorProto.FLOAT, ["n", 1])
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", num_classes]) for name in ("logits", "soft_labels")]
    weight = np.random.default_rng(1).normal(0, 0.05, (3, num_classes)).astype(np.float32)
    nodes = [
        helper.make_node("Cast", ["images"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["pixels"], ["means"], axes=[1, 2], keepdims=0),
        helper.make_node("MatMul", ["means", "linear.weight"], ["product"]),
        helper.make_node("Add", ["product", "offset"], ["logits"]),
        helper.make_node("Div", ["logits", "temperature"], ["tempered"]),
        helper.make_node("Softmax", ["tempered"], ["soft_labels"], axis=1),
    ]
    weights = [numpy_helper.from_array(weight, "linear.weight"), numpy_helper.from_array(np.array(50, np.float32), "offset")]
    graph = helper.make_graph(nodes, "by_hand", [images, temperature], outputs, weights)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8), path)


def ask(path: Path, crops: Crops, temperature: float) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    session = ort.InferenceSession(path)
    logits, probs = session.run(
        ["logits", "soft_labels"], {"images": crops, "temperature": np.full((len(crops), 1), temperature, np.float32)}
    )
    return logits, probs


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 100.0])
def test_soft_labels_are_the_weighted_geometric_mean_of_the_members(
    members: list[Path], crops: Crops, image_ids: list[str], tmp_path: Path, temperature: float
) -> None:
    """Computed another way than the graph does: from the members' own soft labels, at the temperature asked for."""
    chosen = read_members([(members[0].parent, 3.0), (members[1], 1.0)])
    info = export_ensemble(chosen, ensemble_preprocessing(chosen), crops, image_ids, tmp_path, SETTINGS)
    logits_BK, probs_BK = ask(tmp_path / "model.onnx", crops, temperature)
    log_B = [np.log(ask(path, crops, temperature)[1].astype(np.float64)) for path in members]
    mean_BK = np.exp(0.75 * log_B[0] + 0.25 * log_B[1])
    np.testing.assert_allclose(probs_BK, mean_BK / mean_BK.sum(axis=1, keepdims=True), atol=2e-5)
    kept_BK = np.exp(logits_BK.astype(np.float64) / temperature)  # what a store makes of the logits later
    np.testing.assert_allclose(probs_BK, kept_BK / kept_BK.sum(axis=1, keepdims=True), atol=1e-6)
    np.testing.assert_allclose(logits_BK.mean(axis=1), 0, atol=1e-4)
    assert read_teacher_info(tmp_path / "model.onnx") == info
    assert (info.name, info.class_names) == ("both", chosen[0].info.class_names)


@pytest.fixture
def halves(members: list[Path], crops: Crops, tmp_path: Path, class_names: tuple[str, ...]) -> list[Path]:
    """The convolution in fp16, twice, with other weights."""
    made = []
    for number in range(2):
        path = tmp_path / f"half-{number}" / "model.onnx"
        path.parent.mkdir()
        model = onnx.load(members[0])
        for tensor in model.graph.initializer:
            if tensor.data_type == TensorProto.FLOAT and len(tensor.dims) == 2:
                tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1 - 0.5 * number), tensor.name))
        onnx.save(to_half_precision(model, crops).model, path)
        info = read_teacher_info(members[0])
        stamp_teacher(path, name=f"half-{number}", class_names=class_names, preprocessing=info.preprocessing, precision="fp16")
        made.append(path)
    return made


def test_members_in_half_precision_make_an_ensemble_in_half_precision(
    halves: list[Path], members: list[Path], crops: Crops, image_ids: list[str], tmp_path: Path
) -> None:
    chosen = read_members([(path, 1.0) for path in halves])
    info = export_ensemble(chosen, ensemble_preprocessing(chosen), crops[:3], image_ids[:3], tmp_path / "out", SETTINGS)
    assert info.precision == read_teacher_info(tmp_path / "out" / "model.onnx").precision == "fp16"
    report = ParityReport.model_validate_json((tmp_path / "out" / "parity.json").read_text())
    assert (report.precision, report.limits) == ("fp16", PARITY_OF["fp16"])
    with pytest.raises(ConfigError, match=r"model\.onnx computes in fp16, .*model\.onnx in fp32: members have the same precision"):
        read_members([(members[0], 1.0), (halves[1], 1.0)])


def test_a_crop_ratio_that_cannot_be_is_refused(members: list[Path]) -> None:
    chosen = read_members([(members[0], 1.0), (members[1], 1.0)])
    for ratio in (0.0, 5.0, -1.0):
        with pytest.raises(ConfigError, match=r"ensemble: crop_ratio: .*"):
            ensemble_preprocessing(chosen, ratio)


def test_the_folder_says_who_the_members_are(members: list[Path], crops: Crops, image_ids: list[str], tmp_path: Path) -> None:
    chosen = read_members([(members[0], 1.0), (members[1], 4.0)])
    info = export_ensemble(chosen, ensemble_preprocessing(chosen), crops, image_ids, tmp_path, SETTINGS)
    said = json.loads((tmp_path / "members.json").read_text())
    assert [(entry["name"], entry["version"], entry["weight"]) for entry in said] == [("first", 1, 0.2), ("second", 4, 0.8)]
    assert [entry["fingerprint"] for entry in said] == [read_teacher_info(path).fingerprint for path in members]
    assert json.loads((tmp_path / "parity.json").read_text())["failures"] == []
    other = read_members([(members[0], 4.0), (members[1], 1.0)])
    again = export_ensemble(other, ensemble_preprocessing(other), crops, image_ids, tmp_path / "other", SETTINGS)
    assert again.fingerprint != info.fingerprint, "other weights are another teacher"


def test_the_gate_compares_with_the_members_themselves(
    members: list[Path], crops: Crops, image_ids: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = read_members([(members[0], 1.0), (members[1], 1.0)])
    swapped = [chosen[0]._replace(weight=0.4), chosen[1]._replace(weight=0.6)]
    monkeypatch.setattr(module, "merge_teachers", lambda _, path: merge_teachers(swapped, path))
    with pytest.raises(ParityError, match="teacher both does not say"):
        export_ensemble(chosen, ensemble_preprocessing(chosen), crops, image_ids, tmp_path, SETTINGS)
    assert not (tmp_path / "model.onnx").exists()


def test_the_reference_is_the_mean_of_centred_logits(members: list[Path], crops: Crops) -> None:
    chosen = read_members([(members[0], 1.0), (members[1], 1.0)])
    expected = sum((logits - logits.mean(axis=1, keepdims=True)) / 2 for logits, _ in (ask(path, crops, 1.0) for path in members))
    np.testing.assert_allclose(mean_reference(chosen)(crops), expected, atol=1e-4)


def test_preprocessing_states_what_the_members_share(members: list[Path]) -> None:
    chosen = read_members([(members[0], 1.0), (members[1], 1.0)])
    assert ensemble_preprocessing(chosen) == Preprocessing(image_size=16)
    alike = [chosen[0], chosen[0]]
    assert ensemble_preprocessing(alike) == chosen[0].info.preprocessing
    ratio = chosen[1].info.replace(preprocessing=Preprocessing(image_size=16, crop_ratio=0.5))
    with pytest.raises(ConfigError, match="choose one with --crop-ratio"):
        ensemble_preprocessing([chosen[0], chosen[1]._replace(info=ratio)])
    assert ensemble_preprocessing([chosen[0], chosen[1]._replace(info=ratio)], crop_ratio=0.75).crop_ratio == 0.75
    sharp = [
        chosen[0],
        chosen[1]._replace(info=chosen[1].info.replace(preprocessing=Preprocessing(image_size=16, interpolation="bicubic"))),
    ]
    with pytest.raises(ConfigError, match="choose one with --interpolation"):
        ensemble_preprocessing(sharp)
    assert ensemble_preprocessing(sharp, interpolation="bicubic").interpolation == "bicubic"


@pytest.fixture
def stamp(members: list[Path], tmp_path: Path, class_names: tuple[str, ...]) -> Callable[..., Path]:
    """The second member, saying something else of itself."""

    def make(names: tuple[str, ...] = class_names, image_size: int = 16) -> Path:
        path = tmp_path / "stamped.onnx"
        by_hand(path, num_classes=len(names), opset=17)
        stamp_teacher(path, name="x", class_names=names, preprocessing=Preprocessing(image_size=image_size))
        return path

    return make


def test_members_that_do_not_fit_are_refused_by_name(members: list[Path], stamp: Callable[..., Path], class_names: tuple[str, ...]) -> None:
    first = members[0]
    with pytest.raises(ConfigError, match="at least two members, 1 given"):
        read_members([(first, 1.0)])
    for weight in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match=r"model\.onnx: weight .* is not above 0"):
            read_members([(first, 1.0), (members[1], weight)])
    with pytest.raises(ConfigError, match="are the same teacher"):
        read_members([(first, 1.0), (members[1], 1.0), (first, 2.0)])
    with pytest.raises(ConfigError, match=r"stamped\.onnx calls class 1 'bat', .* calls it 'bee'"):
        read_members([(first, 1.0), (stamp(("ant", "bat", *class_names[2:])), 1.0)])
    with pytest.raises(ConfigError, match=r"stamped\.onnx has 4 classes, .* has 5"):
        read_members([(first, 1.0), (stamp(class_names[:4]), 1.0)])
    with pytest.raises(ConfigError, match=r"stamped\.onnx sees crops of 32 pixels, .* of 16"):
        read_members([(first, 1.0), (stamp(image_size=32), 1.0)])
