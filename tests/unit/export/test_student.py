"""The edge files: int8 really is int8, agrees with fp32, still takes uint8 crops, and is shipped only when it wins."""

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from distill.errors import BadInput, ConfigError
from export.edge import EdgeFile, EdgeReport, StudentInfo, judge_int8
from export.latency import measure_latency
from export.quantize import int8_weight_share
from export.settings import Int8Gate, StudentExportSettings
from export.student import export_student

QUICK = StudentExportSettings(
    latency_rounds=2, latency_repeats=5, gate=Int8Gate(max_latency_ratio=1000, max_size_ratio=1000, max_accuracy_drop=1)
)


@pytest.fixture
def export(network, preprocessing, class_names, calibration_crops, crops, tmp_path: Path):
    """Exports the tiny network into `tmp_path` and returns the files."""

    def run(settings: StudentExportSettings = QUICK, labels=None, test_crops=crops, names=class_names) -> list[EdgeFile]:
        return export_student(network, "tiny", 16, names, preprocessing, calibration_crops, test_crops, labels, tmp_path, settings)

    return run


def test_int8_holds_int8_weights_takes_crops_and_agrees(export, network, crops, tmp_path: Path) -> None:
    with torch.inference_mode():
        labels = network(torch.from_numpy(crops)).argmax(dim=1).numpy()
    fp32, int8 = export(labels=labels)
    assert (fp32.kind, fp32.top1, fp32.agreement, fp32.kl, fp32.int8_weight_share) == ("fp32", 1.0, 1.0, 0.0, 0.0)
    assert int8.int8_weight_share == 1.0
    assert int8.agreement >= 0.9
    assert int8.top1 == int8.agreement
    assert 0 < int8.kl < 0.1
    assert int8.shipped
    session = ort.InferenceSession(tmp_path / int8.path)
    assert [(value.name, value.type) for value in session.get_inputs()] == [("images", "tensor(uint8)")]
    for batch_size in (1, 2, 7):
        assert session.run(["logits"], {"images": crops[:batch_size]})[0].shape == (batch_size, 5)
    kernels = [tensor for tensor in onnx.load(tmp_path / int8.path).graph.initializer if list(tensor.dims[2:]) == [3, 3]]
    assert [onnx.TensorProto.DataType.Name(tensor.data_type) for tensor in kernels] == ["INT8", "INT8"]


def test_the_files_say_what_they_are(export, tmp_path: Path, class_names, preprocessing) -> None:
    files = export()
    report = EdgeReport.model_validate_json((tmp_path / "edge.json").read_text())
    assert list(report.files) == files
    assert json.loads((tmp_path / "parity.json").read_text())["failures"] == []
    for file in files:
        path = tmp_path / file.path
        assert path.stat().st_size == file.size_bytes
        assert file.top1 is None
        assert 0 < file.latency_p50_ms <= file.latency_p99_ms
        carried = ort.InferenceSession(path).get_modelmeta().custom_metadata_map["distill.student"]
        assert StudentInfo.model_validate_json(carried) == report.student
    assert report.student == StudentInfo(name="tiny", class_names=class_names, preprocessing=preprocessing)


def test_a_small_file_that_misses_the_size_limit_is_put_aside_with_the_reason(export, tmp_path: Path) -> None:
    strict = QUICK.replace(gate={"max_latency_ratio": 1000, "max_size_ratio": 0.3, "max_accuracy_drop": 1})
    fp32, int8 = export(strict)
    assert fp32.shipped
    assert not int8.shipped
    assert "of fp32 > 0.3" in int8.reason
    assert "so small a file" in int8.reason
    assert int8.path == "not_shipped/tiny.int8.onnx"
    assert (tmp_path / int8.path).exists()
    assert not (tmp_path / "tiny.int8.onnx").exists()
    export(QUICK.replace(int8=False))
    assert sorted(path.name for path in tmp_path.rglob("*.onnx")) == ["tiny.fp32.onnx"]


def test_bad_input_is_refused(export, crops) -> None:
    with pytest.raises(BadInput, match="test crops are uint8"):
        export(test_crops=crops[:0])
    with pytest.raises(BadInput, match="test crops are float64"):
        export(test_crops=crops / 255)
    with pytest.raises(BadInput, match="64 test crops but 3 labels"):
        export(labels=np.zeros(3, dtype=np.int64))
    with pytest.raises(ConfigError, match="5 logits but 2 class names"):
        export(names=("one", "two"))


def test_an_fp32_file_called_int8_is_found_out(teacher_model: Path) -> None:
    assert int8_weight_share(teacher_model) == 0.0


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        ({}, "shipped: latency 0.50 and size 0.25 of fp32, accuracy lost 0.0100"),
        ({"latency_ratio": 0.71}, "not shipped: latency 0.71 of fp32 > 0.7"),
        ({"size_ratio": 0.31}, "not shipped: size 0.31 of fp32 > 0.3"),
        ({"top1": 0.88}, "not shipped: accuracy lost 0.0200 > 0.01"),
        ({"top1": None, "agreement": 0.95}, "not shipped: disagreement with fp32 0.0500 > 0.01"),
        ({"int8_weight_share": 0.1}, "not shipped: only 10% of its weights are int8"),
        ({"latency_ratio": 2.0, "size_ratio": 1.0}, "not shipped: latency 2.00 of fp32 > 0.7; size 1.00 of fp32 > 0.3"),
    ],
)
def test_the_gate(change, verdict: str) -> None:
    fp32 = EdgeFile(
        student="s", kind="fp32", path="s.fp32.onnx", sha256="0", size_bytes=4_000_000, int8_weight_share=0, num_images=100, top1=0.9,
        agreement=1, kl=0, latency_p50_ms=2, latency_p99_ms=3, size_ratio=1, latency_ratio=1, shipped=True, reason="",
    )  # fmt: skip
    int8 = fp32.replace(kind="int8", size_bytes=1_000_000, int8_weight_share=1, top1=0.89, size_ratio=0.25, latency_ratio=0.5)
    judged = judge_int8(int8.replace(**change), fp32, Int8Gate())
    assert judged.reason == verdict
    assert judged.shipped == (not change)


def test_latencies_are_measured_by_turns(crops) -> None:
    calls: list[str] = []

    class Session:
        def __init__(self, name: str) -> None:
            self.name = name

        def run(self, outputs, feed) -> None:
            calls.append(self.name)
            if self.name == "slow":
                for _ in range(20_000):
                    pass

    found = measure_latency({"fast": Session("fast"), "slow": Session("slow")}, crops[:1], rounds=3, repeats=7)
    assert calls[-42:] == ["fast", "slow"] * 21
    assert found["fast"].ratio == 1.0
    assert found["slow"].ratio > 1.0
    assert found["slow"].p50_ms <= found["slow"].p99_ms
