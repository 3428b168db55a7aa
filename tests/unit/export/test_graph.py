"""The exported graph says what the network says, at every batch size and temperature, in the same bytes in every process."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import nn

from distill.errors import ConfigError, DistillError
from export import large_models
from export.graph import export_student_graph


def test_mixed_temperatures_in_one_batch_equal_softmax_in_float64(teacher_model: Path, crops) -> None:
    temperature = np.array([[1.0], [2.0], [0.5], [4.0], [1.0], [20.0], [3.0]], dtype=np.float32)
    session = ort.InferenceSession(teacher_model)
    logits, soft_labels = session.run(["logits", "soft_labels"], {"images": crops[:7], "temperature": temperature})
    tempered = logits.astype(np.float64) / temperature.astype(np.float64)
    exps = np.exp(tempered - tempered.max(axis=1, keepdims=True))
    np.testing.assert_allclose(soft_labels, exps / exps.sum(axis=1, keepdims=True), rtol=0, atol=1e-6)
    assert logits.dtype == soft_labels.dtype == np.float32


@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_every_batch_size_runs_and_equals_torch(teacher_model: Path, network, crops, batch_size: int) -> None:
    session = ort.InferenceSession(teacher_model)
    feed = {"images": crops[:batch_size], "temperature": np.ones((batch_size, 1), dtype=np.float32)}
    with torch.inference_mode():
        expected = network(torch.from_numpy(crops[:batch_size]))
    np.testing.assert_allclose(session.run(["logits"], feed)[0], expected, rtol=0, atol=1e-4)


def test_a_network_in_training_mode_is_exported_in_evaluation_mode(network, crops, tmp_path: Path) -> None:
    with torch.inference_mode():
        expected = network(torch.from_numpy(crops[:4]))
    network.train()
    network.body[1].eval()  # a frozen layer must stay frozen
    export_student_graph(network, 16, tmp_path / "model.onnx")
    logits = ort.InferenceSession(tmp_path / "model.onnx").run(["logits"], {"images": crops[:4]})[0]
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)
    assert network.training
    assert network.body[4].training
    assert not network.body[1].training


def test_another_process_writes_the_same_bytes(teacher_model: Path, tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[2])\n"
        "from conftest import make_network; from export.graph import export_teacher_graph\n"
        "export_teacher_graph(make_network(), 16, Path(sys.argv[1]))"
    )
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": str(here.parents[2])}
    subprocess.run([sys.executable, "-c", script, tmp_path / "other.onnx", here], check=True, cwd=tmp_path, env=environment)
    assert (tmp_path / "other.onnx").read_bytes() == teacher_model.read_bytes()


def test_the_file_holds_no_paths_and_one_file_only(teacher_model: Path) -> None:
    content = teacher_model.read_bytes()
    for word in (b"site-packages", b".py", b"stack_trace", b"TinyClassifier"):
        assert word not in content
    model = onnx.load(teacher_model, load_external_data=False)
    assert [value.name for value in model.graph.input] == ["images", "temperature"]
    assert [value.name for value in model.graph.output] == ["logits", "soft_labels"]
    assert {path.name for path in teacher_model.parent.iterdir()} == {"model.onnx"}


def test_a_student_beyond_one_onnx_file_is_refused(network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_models, "MAX_FILE_BYTES", 1000)
    with pytest.raises(ConfigError, match=r"bytes of weights; one ONNX file holds 1000"):
        export_student_graph(network, 16, tmp_path / "model.onnx")


def test_a_network_that_onnx_cannot_say_is_named_in_one_line(tmp_path: Path) -> None:
    class Moody(nn.Module):
        def forward(self, crops: torch.Tensor) -> torch.Tensor:
            return crops.float().mean((1, 2)) if crops.float().mean().item() > 3 else crops.float().sum((1, 2))

    with pytest.raises(DistillError, match=r"cannot be written as ONNX opset 20: .*") as caught:
        export_student_graph(Moody(), 16, tmp_path / "model.onnx")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_the_graph_is_simple_and_crops_go_into_a_cast(teacher_model: Path) -> None:
    graph = onnx.load(teacher_model).graph
    operators = [node.op_type for node in graph.node]
    # What torch writes for pooling behind channels-last memory, for batch norm, and for the size of the batch.
    assert {"Gather", "Range", "Shape", "BatchNormalization", "Identity", "Dropout", "Constant"}.isdisjoint(operators)
    assert [node.op_type for node in graph.node if "images" in node.input] == ["Cast"], "TensorRT takes uint8 into nothing else"
    assert onnx.load(teacher_model).opset_import[0].version == 20
