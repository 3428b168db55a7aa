"""The edge files: int8 really is int8, fp16 half; they agree with fp32, still take uint8 crops, and are shipped only when they win."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, numpy_helper
from torch import nn

from distill.errors import BadInput, ConfigError, DistillError, StageMissing
from export.edge import EdgeFile, EdgeReport, StudentInfo, read_edge_report
from export.gate import judge_files, judge_fp16, judge_int8, judge_same_weights, recommend
from export.int8 import Trained
from export.latency import measure_latency
from export.measured import TestSet
from export.memory import peak_memory_bytes
from export.quantize import int8_weight_share, weight_share
from export.settings import Int8Gate, StudentExportSettings
from export.student import export_student

LENIENT = Int8Gate(max_latency_ratio=1000, max_size_ratio=1000, max_accuracy_drop=1)
QUICK = StudentExportSettings(latency_rounds=2, latency_repeats=5, gate=LENIENT, peak_memory=False)
FP32 = EdgeFile(
    student="s", kind="fp32", path="s.fp32.onnx", sha256="0", size_bytes=4_000_000, int8_weight_share=0, num_images=100, top1=0.9,
    agreement=1, kl=0, latency_p50_ms=2, latency_p99_ms=3, latency_all_p50_ms=1, latency_all_p99_ms=2, peak_memory_bytes=5_000_000,
    size_ratio=1, latency_ratio=1, shipped=True, reason="",
)  # fmt: skip
INT8 = FP32.replace(
    kind="int8", path="s.int8.onnx", size_bytes=1_000_000, int8_weight_share=1, top1=0.89, size_ratio=0.25, latency_ratio=0.5
)
FP16 = FP32.replace(kind="fp16", path="s.fp16.onnx", size_bytes=2_000_000, fp16_weight_share=1, top1=0.9, size_ratio=0.5)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def export(network, preprocessing, class_names, calibration_crops, crops, tmp_path: Path):
    """Exports the tiny network into `tmp_path` and returns what edge.json says."""

    def run(settings: StudentExportSettings = QUICK, labels=None, test_crops=crops, names=class_names, of=network, tune=None) -> EdgeReport:
        return export_student(of, "tiny", 16, names, preprocessing, calibration_crops, test_crops, labels, tmp_path, settings, tune)

    return run


def test_int8_holds_int8_weights_takes_crops_and_agrees(export, network, crops, tmp_path: Path) -> None:
    with torch.inference_mode():
        labels = network(torch.from_numpy(crops)).argmax(dim=1).numpy()

    def tune(of, crops, bits) -> Trained:
        raise AssertionError("int8 is accurate: nobody needs to train")

    fp32, _, int8 = export(labels=labels, tune=tune).files
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


def test_fp16_holds_half_the_bytes_takes_crops_and_says_what_it_saves(exported: Path, crops) -> None:
    fp32, fp16, _ = read_edge_report(exported).files
    assert fp16.fp16_weight_share == 1.0
    assert (fp32.fp16_weight_share, fp16.int8_weight_share) == (0.0, 0.0)
    assert 0.45 < fp16.size_ratio < 0.6
    assert 0 < fp16.kl < 1e-4
    assert fp16.shipped
    session = ort.InferenceSession(exported / fp16.path)
    assert [(value.name, value.type) for value in session.get_inputs()] == [("images", "tensor(uint8)")]
    assert session.run(["logits"], {"images": crops[:2]})[0].dtype == np.float32


def test_the_files_say_what_they_are(exported: Path, class_names, preprocessing) -> None:
    report = read_edge_report(exported)
    assert json.loads((exported / "parity.json").read_text())["failures"] == []
    for file in report.files:
        path = exported / file.path
        assert path.stat().st_size == file.size_bytes
        assert file.top1 is None
        assert 0 < file.latency_p50_ms <= file.latency_p99_ms
        assert 0 < file.latency_all_p50_ms <= file.latency_all_p99_ms
        assert file.peak_memory_bytes is not None
        assert 1_000_000 < file.peak_memory_bytes < 500_000_000
        carried = ort.InferenceSession(path).get_modelmeta().custom_metadata_map["distill.student"]
        assert StudentInfo.model_validate_json(carried) == report.student
    assert report.student == StudentInfo(name="tiny", class_names=class_names, preprocessing=preprocessing)
    assert report.machine.endswith("Linux")
    assert report.recommended in [file.path for file in report.files if file.shipped]


def test_a_small_file_that_misses_the_size_limit_is_put_aside_and_the_next_best_is_recommended(export, tmp_path: Path) -> None:
    strict = QUICK.replace(gate={"max_latency_ratio": 1000, "max_size_ratio": 0.3, "max_accuracy_drop": 1})
    report = export(strict)
    fp32, _, int8 = report.files
    assert fp32.shipped
    assert not int8.shipped
    assert "of fp32 > 0.3" in int8.reason
    assert "so small a file" in int8.reason
    assert int8.path == "not_shipped/tiny.int8.onnx"
    assert (tmp_path / int8.path).exists()
    assert not (tmp_path / "tiny.int8.onnx").exists()
    assert report.recommended in ("tiny.fp32.onnx", "tiny.fp16.onnx")
    assert report.why.startswith("the next best, as tiny.int8.onnx is not shipped; ")
    for told in ("card.json", "card.md"):
        (tmp_path / told).write_text("of the export before")
    report = export(QUICK.replace(int8=False, fp16=False))
    assert not {"card.json", "card.md"} & {path.name for path in tmp_path.iterdir()}
    assert sorted(path.name for path in tmp_path.rglob("*.onnx")) == ["tiny.fp32.onnx"]
    assert report.recommended == "tiny.fp32.onnx"


def test_bad_input_is_refused(export, crops) -> None:
    with pytest.raises(BadInput, match="test crops are uint8"):
        export(test_crops=crops[:0])
    with pytest.raises(BadInput, match="test crops are float64"):
        export(test_crops=crops / 255)
    with pytest.raises(BadInput, match="64 test crops but 3 labels"):
        export(labels=np.zeros(3, dtype=np.int64))
    with pytest.raises(ConfigError, match="5 logits but 2 class names"):
        export(names=("one", "two"))


def test_a_format_that_is_not_installed_is_refused_before_anything_is_made(export, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"openvino needs openvino, which is not installed: pip install -e '\.\[openvino\]'"):
        export(QUICK.replace(formats=["onnx", "openvino"]))
    assert list(tmp_path.iterdir()) == []


def test_an_edge_json_of_before_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(StageMissing, match="run `distill export-student` first"):
        read_edge_report(tmp_path)
    (tmp_path / "edge.json").write_text('{"engine": "ONNX Runtime 1.20", "files": []}')
    with pytest.raises(BadInput, match="of an older distill; run `distill export-student --fresh` again"):
        read_edge_report(tmp_path)


def test_an_fp32_file_called_int8_is_found_out(teacher_model: Path) -> None:
    assert int8_weight_share(teacher_model) == 0.0


def with_float_weights(path: Path) -> None:
    """Put the int8 weights back as floats, in place: the name and the nodes around them still say int8."""
    model = onnx.load(path)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in [node for node in model.graph.node if node.op_type == "DequantizeLinear" and node.input[0] in constants]:
        values, scale = numpy_helper.to_array(constants[node.input[0]]), numpy_helper.to_array(constants[node.input[1]])
        shape = (-1, *[1] * (values.ndim - 1)) if scale.ndim else ()
        floats = values.astype(np.float32) * scale.reshape(shape)
        model.graph.initializer.append(numpy_helper.from_array(floats.astype(np.float32), node.output[0]))
        model.graph.node.remove(node)
    onnx.save(model, path)


def test_a_file_that_says_int8_and_holds_float_is_not_shipped(exported: Path, tmp_path: Path) -> None:
    path = tmp_path / "tiny.int8.onnx"
    path.write_bytes((exported / "tiny.int8.onnx").read_bytes())
    with_float_weights(path)
    assert int8_weight_share(path) == 0.0
    assert weight_share(path, TensorProto.FLOAT) == 1.0
    judged = judge_int8(INT8.replace(int8_weight_share=int8_weight_share(path)), FP32, Int8Gate())
    assert not judged.shipped
    assert "only 0% of its weights are int8" in judged.reason


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
    judged = judge_int8(INT8.replace(**change), FP32, Int8Gate())
    assert judged.reason == verdict
    assert judged.shipped == (not change)


def test_a_float_that_is_rounded_when_it_runs_is_a_float(exported: Path, tmp_path: Path) -> None:
    """Through QuantizeLinear and DequantizeLinear, a Transpose, a Constant node or a sum: the share is of what the file holds."""
    path = tmp_path / "rounded.onnx"
    source = onnx.load(exported / "tiny.fp32.onnx")
    convolutions = [node for node in source.graph.node if node.op_type == "Conv"]
    scale = [numpy_helper.from_array(np.float32(0.01), "step"), numpy_helper.from_array(np.int8(0), "zero")]
    round_trip = [("QuantizeLinear", ["step", "zero"]), ("DequantizeLinear", ["step", "zero"])]
    for chain in (round_trip, [("Identity", [])], [("Transpose", []), ("Transpose", [])], [("Add", ["zero_sum"])]):
        model = onnx.load(exported / "tiny.int8.onnx")
        conv = next(node for node in model.graph.node if node.op_type == "Conv")
        weight = next(tensor for tensor in source.graph.initializer if tensor.name == convolutions[0].input[1])
        made, name = [onnx.helper.make_node("Constant", [], ["held as float"], value=weight)], "held as float"
        for number, (operator, others) in enumerate(chain):
            made.append(onnx.helper.make_node(operator, [name, *others], [f"step {number}"]))
            name = f"step {number}"
        conv.input[1] = name
        model.graph.initializer.extend([*scale, numpy_helper.from_array(np.zeros(1, np.float32), "zero_sum")])
        nodes = [*made, *model.graph.node]
        del model.graph.node[:]
        model.graph.node.extend(nodes)
        onnx.save(model, path)
        num_float, num_other = 16 * 3 * 9, 32 * 16 * 9 + 32 * 5
        assert int8_weight_share(path) == pytest.approx(num_other / (num_other + num_float), abs=1e-3)


def test_accuracy_of_another_runtime_is_compared_with_the_onnx_file() -> None:
    """A runtime whose fp32 file is already wrong is no measure of its int8 file."""
    wrong = FP32.replace(runtime="openvino", top1=0.5)
    int8 = INT8.replace(runtime="openvino", top1=0.5)
    judged = judge_files([FP32, wrong, int8], Int8Gate(), 0.0, native=True)
    assert [file.shipped for file in judged] == [True, False, False]
    assert judged[2].reason == "not shipped: accuracy lost 0.4000 > 0.01"


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        ({}, True),
        ({"agreement": 0.4}, "not shipped: disagreement with fp32 0.6000 > 0.01"),
        ({"kl": 3.0}, "not shipped: KL 3.0e+00 to the ONNX file > 0.001"),
        ({"top1": None, "agreement": 0.5}, "not shipped: disagreement with fp32 0.5000 > 0.01"),
        ({"num_without_answer": 2}, "not shipped: infinite logits, or no numbers, on 2 of 100 test crops"),
    ],
)
def test_the_same_weights_say_the_same_whatever_the_accuracy(change, verdict) -> None:
    judged = judge_same_weights(FP32.replace(runtime="openvino", **change), FP32, Int8Gate())
    assert judged.shipped == (verdict is True)
    assert judged.shipped or judged.reason == verdict


def test_a_crop_without_an_answer_counts_as_wrong_and_the_file_is_not_shipped() -> None:
    fp32_NK = np.array([[2.0, 0.0], [0.0, 2.0], [2.0, 0.0], [0.0, 2.0]], np.float32)
    tests = TestSet(np.zeros((4, 4, 4, 3), np.uint8), fp32_NK.argmax(axis=1), fp32_NK)
    broken_NK = fp32_NK.copy()
    broken_NK[0], broken_NK[1, 0] = np.nan, np.inf
    quality = tests.quality(broken_NK)
    assert (quality["num_without_answer"], quality["top1"], quality["agreement"]) == (2, 0.5, 0.5)
    assert quality["kl"] == pytest.approx(np.log(2) / 2 + (0.8808 * np.log(0.8808) + 0.1192 * np.log(0.1192)) / 2, abs=1e-3)
    infinite = INT8.replace(num_without_answer=2)
    assert judge_int8(infinite, FP32, Int8Gate()).reason == "not shipped: infinite logits, or no numbers, on 2 of 100 test crops"
    assert "infinite logits where every layer" in judge_fp16(FP16, FP32, Int8Gate(), np.inf, native=True).reason


def test_fp16_that_overflows_on_a_test_crop_is_put_aside_and_the_export_goes_on(export, network, crops) -> None:
    """A filter for pixels unlike their neighbours, times 3600: on a checkerboard beyond half precision, on no calibration crop."""
    loud = 3600.0
    with torch.no_grad():
        conv, norm = network.body[0], network.body[1]
        conv.weight[0] = 0.0
        conv.weight[0, 0] = torch.tensor([[0.0, -1, 0], [-1, 4, -1], [0, -1, 0]])
        norm.running_mean[0], norm.running_var[0], norm.weight[0], norm.bias[0] = 0.0, 1.0, loud, 0.0
        network.body[3].weight[:, 0] /= loud
    checkered = np.zeros((1, 16, 16, 3), np.uint8)
    checkered[0, ::2, ::2], checkered[0, 1::2, 1::2] = 255, 255
    report = export(QUICK.replace(int8=False), test_crops=np.concatenate([crops, checkered]))
    fp32, fp16 = report.files
    assert fp32.shipped
    assert fp16.kept_in_float == ()
    assert not fp16.shipped
    assert "infinite logits" in fp16.reason


def test_int8_of_another_runtime_is_compared_with_fp32_of_that_runtime() -> None:
    slow = FP32.replace(runtime="openvino", latency_ratio=3, size_ratio=1.2)
    int8 = INT8.replace(runtime="openvino", latency_ratio=1.5, size_ratio=0.3)
    assert judge_int8(int8, slow, Int8Gate()).reason == "shipped: latency 0.50 and size 0.25 of fp32, accuracy lost 0.0100"
    assert judge_same_weights(slow, FP32, Int8Gate()).shipped
    assert not judge_same_weights(slow.replace(top1=0.8), FP32, Int8Gate()).shipped


@pytest.mark.parametrize(
    ("change", "in_half", "native", "verdict"),
    [
        ({}, 0.0, True, "shipped: size 0.50 of fp32, accuracy lost 0.0000; latency 1.00"),
        ({}, 0.0, False, "shipped: size 0.50 of fp32, accuracy lost 0.0000; saves size only: computed in fp32 here, latency 1.00"),
        ({}, 0.05, False, "not shipped: accuracy lost 0.0500 > 0.01"),
        ({"fp16_weight_share": 0.2}, 0.0, False, "not shipped: only 20% of its weights are fp16"),
        ({"size_ratio": 0.9}, 0.0, False, "not shipped: size 0.90 of fp32 > 0.75"),
    ],
)
def test_the_gate_of_fp16(change, in_half: float, native: bool, verdict: str) -> None:
    judged = judge_fp16(FP16.replace(**change), FP32, Int8Gate(), in_half, native)
    assert judged.reason == verdict
    assert judged.shipped == verdict.startswith("shipped")


def test_the_smallest_of_the_fastest_is_recommended() -> None:
    assert recommend([FP32, FP16, INT8])[0] is INT8
    chosen, why = recommend([FP32, FP16.replace(latency_ratio=1.04), INT8.replace(shipped=False)])
    assert chosen.kind == "fp16"
    assert why.startswith("the next best, as s.int8.onnx is not shipped; of 2 shipped files")
    assert recommend([FP32, FP16.replace(latency_ratio=1.2)])[0] is FP32


def test_memory_is_that_of_the_file_in_a_process_without_torch(exported: Path, tmp_path: Path) -> None:
    """32 MiB of weights more are 30 MiB of memory more at least."""
    model = onnx.load(exported / "tiny.fp32.onnx")
    features = next(node for node in model.graph.node if node.op_type == "Gemm").input[0]
    ballast = np.random.default_rng(0).normal(size=(32, 2**18)).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(ballast, "ballast"))
    model.graph.node.append(onnx.helper.make_node("MatMul", [features, "ballast"], ["many"]))
    model.graph.node.append(onnx.helper.make_node("ReduceMax", ["many"], ["peak"], keepdims=0))
    model.graph.output.append(onnx.helper.make_tensor_value_info("peak", TensorProto.FLOAT, []))
    onnx.save(model, tmp_path / "large.onnx")
    small, large = (peak_memory_bytes("onnxruntime", path, 16) for path in (exported / "tiny.fp32.onnx", tmp_path / "large.onnx"))
    assert small is not None
    assert large is not None
    assert large - small > 30 * 2**20
    code = "import export.memory_probe, export.runtimes.onnx_runtime, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    with pytest.raises(DistillError, match=r"nothing\.onnx does not run in a process of its own"):
        peak_memory_bytes("onnxruntime", tmp_path / "nothing.onnx", 16)


@pytest.fixture
def a_layer_that_hurts(network) -> None:
    """A 1x1 convolution has one huge weight a channel, for an input that is always 0: in float it does nothing, in int8 its scale rounds
    all other weights to 0."""
    torch.manual_seed(0)
    squeeze = nn.Conv2d(16, 16, 1)
    with torch.no_grad():
        nn.init.normal_(squeeze.weight, std=0.5)
        network.body[1].weight[3], network.body[1].bias[3] = 0.0, -1.0  # a channel that the ReLU shuts
        squeeze.weight[:, 3] = 300.0
    network.body = nn.Sequential(*network.body[:3], squeeze, nn.ReLU(), *network.body[3:]).eval()


@pytest.mark.usefixtures("a_layer_that_hurts")
def test_layers_that_hurt_are_found_and_stay_in_float(export) -> None:
    def tune(of, crops, bits) -> Trained:
        raise AssertionError("a file passes the gate: nobody needs to train")

    settings = QUICK.replace(gate={"max_latency_ratio": 1000, "max_size_ratio": 1000, "max_accuracy_drop": 0.05})
    report = export(settings, tune=tune)
    plain, *_, last = report.int8_attempts
    int8 = report.files[2]
    assert plain.agreement < 0.9
    assert last.chosen
    assert len(int8.kept_in_float) == 1
    assert int8.kept_in_float == last.kept_in_float
    assert report.int8_notes[0].startswith(f"in float: {int8.kept_in_float[0]} (4 of 4 layers tried alone)")
    assert int8.agreement >= 0.95
    assert int8.kl < plain.kl / 10
    assert 0.9 <= int8.int8_weight_share < 1
    assert int8.shipped
    assert "1 layers in float" in int8.reason


@pytest.mark.usefixtures("a_layer_that_hurts")
def test_the_student_is_trained_where_layers_in_float_are_accurate_and_too_slow(export) -> None:
    slow = QUICK.replace(fp16=False, gate={"max_latency_ratio": 1e-6, "max_size_ratio": 1000, "max_accuracy_drop": 0.05})
    report = export(slow, tune=lambda of, crops, bits: Trained(None, 0, "was asked"))
    assert report.int8_attempts[-1].kept_in_float
    assert [complaint.partition(" ")[0] for complaint in report.int8_attempts[-1].complaints] == ["latency"]
    assert report.int8_notes[-1] == "was asked"


def test_of_plain_and_fine_tuned_the_better_file_is_kept(export, network) -> None:
    asked = []

    def harmful(of, crops, bits) -> Trained:
        asked.append((of is network, crops.shape, bits))
        return Trained(type(of)().eval(), 7, "made worse")

    report = export(QUICK.replace(fp16=False, quantised_training={"when": "always"}), tune=harmful)
    assert asked == [(True, (64, 16, 16, 3), 8)]
    assert [(attempt.training_steps, attempt.chosen) for attempt in report.int8_attempts] == [(0, True), (7, False)]
    assert report.int8_attempts[1].agreement < report.int8_attempts[0].agreement
    plain_kl, harmed_kl = (attempt.calibration_kl for attempt in report.int8_attempts)
    assert plain_kl is not None
    assert harmed_kl is not None
    assert 0 < plain_kl < harmed_kl
    assert report.int8_notes == ("made worse",)
    assert not report.files[1].training_steps


def test_latencies_are_measured_by_turns(crops) -> None:
    calls: list[str] = []

    def fast(crops_BHWC) -> None:
        calls.append("fast")

    def slow(crops_BHWC) -> None:
        calls.append("slow")
        for _ in range(20_000):
            pass

    found = measure_latency({"fast": fast, "slow": slow}, crops[:1], rounds=3, repeats=7)
    turns = [tuple(calls[start : start + 2]) for start in range(len(calls) - 42, len(calls), 2)]
    assert set(turns) == {("fast", "slow"), ("slow", "fast")}
    assert found["fast"].ratio == 1.0
    assert found["slow"].ratio > 1.0
    assert found["slow"].p50_ms <= found["slow"].p99_ms
