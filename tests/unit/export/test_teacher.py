"""Each way to a teacher ends in the same folder, and none gets past the gate."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from distill.errors import ConfigError, ParityError
from distill.teacher_info import Preprocessing
from export import imports, teacher
from export.fingerprint import read_teacher_info
from export.imports import import_onnx
from export.parity import ParityReport
from export.settings import RepositorySettings, StudentExportSettings, TeacherExportSettings
from export.teacher import export_teacher, publish_teacher

SETTINGS = TeacherExportSettings(name="tiny", default_temperature=2.0, num_parity_images=32)


def test_a_trained_network_becomes_a_served_teacher(network, preprocessing, class_names, crops, image_ids, tmp_path: Path) -> None:
    folder = tmp_path / "teacher"
    info = export_teacher(network, preprocessing, class_names, crops, image_ids, folder, SETTINGS)
    assert sorted(path.name for path in folder.iterdir()) == ["model.onnx", "parity.json", "worst"]
    assert read_teacher_info(folder / "model.onnx") == info
    assert info.default_temperature == 2.0
    report = ParityReport.model_validate_json((folder / "parity.json").read_text())
    assert report.num_images == 32
    assert list(report.max_kl) == ["1", "4"]
    served = publish_teacher(folder, tmp_path / "models", SETTINGS)
    assert read_teacher_info(served.model) == info


def test_a_graph_that_fails_the_gate_is_not_kept(
    network, preprocessing, class_names, crops, image_ids, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher, "torch_reference", lambda network: lambda crops_BHWC: np.zeros((len(crops_BHWC), 5)))
    with pytest.raises(ParityError, match="teacher tiny does not say"):
        export_teacher(network, preprocessing, class_names, crops, image_ids, tmp_path, SETTINGS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parity-failed.json", "worst"]


def test_an_older_teacher_keeps_its_own_report_when_a_later_one_fails(
    network, preprocessing, class_names, crops, image_ids, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "teacher"
    info = export_teacher(network, preprocessing, class_names, crops, image_ids, folder, SETTINGS)
    report = (folder / "parity.json").read_bytes()
    assert ParityReport.model_validate_json(report).fingerprint == info.fingerprint
    with monkeypatch.context() as patched:
        patched.setattr(teacher, "torch_reference", lambda network: lambda crops_BHWC: np.zeros((len(crops_BHWC), 5)))
        with pytest.raises(ParityError, match=r"parity-failed\.json"):
            export_teacher(network, preprocessing, class_names, crops, image_ids, folder, SETTINGS)
    served = publish_teacher(folder, tmp_path / "models", SETTINGS)
    assert (served.model.parent / "parity.json").read_bytes() == (folder / "parity.json").read_bytes() == report
    assert not ParityReport.model_validate_json((folder / "parity-failed.json").read_bytes()).passed
    export_teacher(network, preprocessing, class_names, crops, image_ids, folder, SETTINGS)
    assert not (folder / "parity-failed.json").exists(), "it is over"


def test_a_ready_onnx_becomes_a_teacher(preprocessing: Preprocessing, crops, image_ids, tmp_path: Path) -> None:
    source = _pooled_linear(tmp_path / "source.onnx")
    settings = SETTINGS.replace(name="ready")
    info = import_onnx(source, tmp_path / "teacher", preprocessing, ("a", "b", "c"), crops, image_ids, settings, logits="hidden")
    session = ort.InferenceSession(tmp_path / "teacher" / "model.onnx")
    logits = session.run(["logits"], {"images": crops[:3], "temperature": np.ones((3, 1), dtype=np.float32)})[0]
    normalised = (crops[:3] / 255 - np.array(preprocessing.mean)) / np.array(preprocessing.std)
    np.testing.assert_allclose(logits, normalised.mean(axis=(1, 2)) @ _weights(), rtol=0, atol=1e-4)
    assert (info.name, info.num_classes) == ("ready", 3)
    with pytest.raises(ConfigError, match="3 logits a crop, but 2 class names"):
        import_onnx(source, tmp_path / "teacher", preprocessing, ("a", "b"), crops, image_ids, settings, logits="hidden")


def test_a_wrong_mean_in_the_wrapping_is_caught(
    preprocessing: Preprocessing, crops, image_ids, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrap = imports.wrap_classifier
    monkeypatch.setattr(imports, "wrap_classifier", lambda s, t, p, *more: wrap(s, t, p.replace(mean=(0.5, 0.5, 0.5)), *more))
    with pytest.raises(ParityError, match="logit error"):
        import_onnx(
            _pooled_linear(tmp_path / "s.onnx"), tmp_path, preprocessing, ("a", "b", "c"), crops, image_ids, SETTINGS, logits="hidden"
        )


@pytest.mark.parametrize(
    ("kind", "values", "complaint"),
    [
        (TeacherExportSettings, {"parity_temperatures": (1.0, 0.0)}, "above 0"),
        (TeacherExportSettings, {"name": "a b"}, "pattern"),
        (RepositorySettings, {"preferred_batch_sizes": (0,)}, "at least 1"),
        (StudentExportSettings, {"num_calibration_images": 1}, "greater than or equal to 8"),
    ],
)
def test_settings_refuse_what_cannot_be(kind, values, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        kind(**values)


def _weights() -> np.ndarray:
    return np.random.default_rng(5).normal(0, 3, (3, 3))


def _pooled_linear(path: Path) -> Path:
    """One image at a time, float NCHW -> mean of each channel -> linear `hidden` -> Softmax."""
    nodes = [
        helper.make_node("GlobalAveragePool", ["pixels"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("MatMul", ["flat", "w"], ["hidden"]),
        helper.make_node("Softmax", ["hidden"], ["probs"]),
    ]
    graph = helper.make_graph(
        nodes,
        "someone",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, (1, 3, 16, 16))],
        [helper.make_tensor_value_info("probs", TensorProto.FLOAT, (1, 3))],
        [numpy_helper.from_array(_weights().astype(np.float32), "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path
