"""A wrapped classifier says of uint8 crops what the original says of normalised floats."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from distill.errors import ConfigError
from distill.teacher_info import Preprocessing
from export.wrap import wrap_classifier

CIFAR = Path(__file__).parents[4] / "shared/data/models/resnet20_cifar10.onnx"
PRE = Preprocessing(image_size=16, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))


def make_classifier(
    path: Path,
    *,
    shape: tuple[int | str, ...] = ("n", 3, 16, 16),
    element_type: int = TensorProto.FLOAT,
    end: str | None = None,
    batch_in_reshape: int = -1,
    opset: int = 17,
    ir_version: int = 8,
) -> Path:
    """input [Cast] -> Conv -> ReLU -> global pool -> Reshape -> Gemm [-> end]; NHWC input is transposed inside."""
    generator = np.random.default_rng(3)
    weights = {
        "conv": generator.normal(0, 0.5, (8, 3, 3, 3)),
        "linear": generator.normal(0, 2, (8, 4)),
        "bias": generator.normal(0, 1, 4),
        "shape": np.array([batch_in_reshape, 8]),
    }
    tensors = [numpy_helper.from_array(w.astype(np.int64 if name == "shape" else np.float32), name) for name, w in weights.items()]
    nodes, current = [], "pixels"
    if element_type != TensorProto.FLOAT:
        nodes.append(helper.make_node("Cast", [current], ["cast"], to=TensorProto.FLOAT))
        current = "cast"
    if shape[-1] == 3:
        nodes.append(helper.make_node("Transpose", [current], ["planes"], perm=[0, 3, 1, 2]))
        current = "planes"
    nodes += [
        helper.make_node("Conv", [current, "conv"], ["features"]),
        helper.make_node("Relu", ["features"], ["images"]),  # an inner name that is also one of ours
        helper.make_node("GlobalAveragePool", ["images"], ["pooled"]),
        helper.make_node("Reshape", ["pooled", "shape"], ["flat"]),
        helper.make_node("Gemm", ["flat", "linear", "bias"], ["scores"]),
    ]
    output = "scores"
    if end:
        nodes += [helper.make_node(end, ["scores"], ["probabilities"]), helper.make_node("Identity", ["probabilities"], ["result"])]
        output = "result"
    inputs = [helper.make_tensor_value_info("pixels", element_type, shape)]
    if ir_version < 4:  # old files list their weights among the inputs
        inputs += [helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims) for tensor in tensors]
    outputs = [helper.make_tensor_value_info(output, TensorProto.FLOAT, (shape[0], 4))]
    graph = helper.make_graph(nodes, "someone", inputs, outputs, tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version), path)
    return path


def run_wrapped(path: Path, crops):
    temperature = np.resize(np.array([1.0, 2.0, 4.0], dtype=np.float32), (len(crops), 1))
    logits, soft_labels = ort.InferenceSession(path).run(["logits", "soft_labels"], {"images": crops, "temperature": temperature})
    exps = np.exp((logits - logits.max(axis=1, keepdims=True)).astype(np.float64) / temperature)
    np.testing.assert_allclose(soft_labels, exps / exps.sum(axis=1, keepdims=True), rtol=0, atol=1e-6)
    return logits


def normalised(crops, preprocessing: Preprocessing):
    return ((crops / 255 - np.array(preprocessing.mean)) / np.array(preprocessing.std)).astype(np.float32)


def test_nchw_floats(tmp_path: Path, crops) -> None:
    source = make_classifier(tmp_path / "source.onnx")
    wrap_classifier(source, tmp_path / "model.onnx", PRE)
    expected = ort.InferenceSession(source).run(None, {"pixels": normalised(crops, PRE).transpose(0, 3, 1, 2)})[0]
    for batch_size in (1, 2, 7):
        np.testing.assert_allclose(run_wrapped(tmp_path / "model.onnx", crops[:batch_size]), expected[:batch_size], rtol=0, atol=1e-4)


def test_nhwc_floats_and_old_files_that_list_weights_as_inputs(tmp_path: Path, crops) -> None:
    source = make_classifier(tmp_path / "source.onnx", shape=("n", "h", "w", 3), opset=9, ir_version=3)
    wrap_classifier(source, tmp_path / "model.onnx", PRE)
    expected = ort.InferenceSession(source).run(None, {"pixels": normalised(crops, PRE)})[0]
    np.testing.assert_allclose(run_wrapped(tmp_path / "model.onnx", crops), expected, rtol=0, atol=1e-4)


def test_half_floats(tmp_path: Path, crops) -> None:
    source = make_classifier(tmp_path / "source.onnx", element_type=TensorProto.FLOAT16)
    wrap_classifier(source, tmp_path / "model.onnx", PRE)
    expected = ort.InferenceSession(source).run(None, {"pixels": normalised(crops, PRE).transpose(0, 3, 1, 2).astype(np.float16)})[0]
    np.testing.assert_allclose(run_wrapped(tmp_path / "model.onnx", crops), expected, rtol=0, atol=1e-2)


@pytest.mark.parametrize("shape", [("n", 16, 16, 3), ("n", 3, 16, 16)])
def test_uint8_goes_in_untouched(tmp_path: Path, crops, shape) -> None:
    source = make_classifier(tmp_path / "source.onnx", shape=shape, element_type=TensorProto.UINT8)
    wrap_classifier(source, tmp_path / "model.onnx", Preprocessing(image_size=16))
    pixels = crops if shape[-1] == 3 else crops.transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(
        run_wrapped(tmp_path / "model.onnx", crops), ort.InferenceSession(source).run(None, {"pixels": pixels})[0]
    )
    with pytest.raises(ConfigError, match="normalised twice"):
        wrap_classifier(source, tmp_path / "model.onnx", PRE)


def test_a_batch_of_one_is_made_dynamic_where_the_graph_allows(tmp_path: Path, crops) -> None:
    source = make_classifier(tmp_path / "source.onnx", shape=(1, 3, 16, 16))
    wrap_classifier(source, tmp_path / "model.onnx", PRE)
    expected = ort.InferenceSession(source).run(None, {"pixels": normalised(crops[:1], PRE).transpose(0, 3, 1, 2)})[0]
    np.testing.assert_allclose(run_wrapped(tmp_path / "model.onnx", crops)[:1], expected, rtol=0, atol=1e-4)


def test_probabilities_are_refused_and_the_tensor_before_them_is_taken(tmp_path: Path, crops) -> None:
    source = make_classifier(tmp_path / "source.onnx", end="Softmax")
    with pytest.raises(ConfigError, match=r"give the logits, not the probabilities: the tensor before it is 'scores'"):
        wrap_classifier(source, tmp_path / "model.onnx", PRE)
    wrap_classifier(source, tmp_path / "model.onnx", PRE, logits="scores")
    wrap_classifier(make_classifier(tmp_path / "plain.onnx"), tmp_path / "plain_model.onnx", PRE)
    assert (tmp_path / "model.onnx").read_bytes() == (tmp_path / "plain_model.onnx").read_bytes()


@pytest.mark.parametrize(
    ("form", "preprocessing", "complaint"),
    [
        ({"shape": (1, 3, 16, 16), "batch_in_reshape": 1}, PRE, "dynamic batch"),
        ({"shape": (4, 3, 16, 16)}, PRE, "fixed to batches of 4"),
        ({}, PRE.replace(image_size=32), r"shape \[None, 3, 16, 16\].*check image_size"),
        ({"element_type": TensorProto.INT32}, PRE, "pixels is INT32"),
        ({"opset": 6}, PRE, "opset 6, the oldest"),
        ({"end": "Sigmoid"}, PRE, "comes out of a Sigmoid"),
    ],
)
def test_other_forms_are_refused_in_one_line(tmp_path: Path, form, preprocessing: Preprocessing, complaint: str) -> None:
    source = make_classifier(tmp_path / "source.onnx", **form)
    with pytest.raises(ConfigError, match=complaint) as caught:
        wrap_classifier(source, tmp_path / "model.onnx", preprocessing)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "model.onnx").exists()


def test_several_outputs_need_a_choice(tmp_path: Path) -> None:
    source = make_classifier(tmp_path / "source.onnx")
    model = onnx.load(source)
    model.graph.output.append(helper.make_tensor_value_info("pooled", TensorProto.FLOAT, ("n", 8, 1, 1)))
    onnx.save(model, source)
    with pytest.raises(ConfigError, match=r"2 outputs \(scores, pooled\): say which"):
        wrap_classifier(source, tmp_path / "model.onnx", PRE)
    with pytest.raises(ConfigError, match="no tensor 'logitz'"):
        wrap_classifier(source, tmp_path / "model.onnx", PRE, logits="logitz")
    wrap_classifier(source, tmp_path / "model.onnx", PRE, logits="scores")


@pytest.mark.skipif(not CIFAR.exists(), reason="the ready CIFAR-10 classifier is not beside this checkout")
def test_a_real_classifier_made_elsewhere(tmp_path: Path) -> None:
    preprocessing = Preprocessing(image_size=32, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    crops = np.random.default_rng(0).integers(0, 256, (7, 32, 32, 3), dtype=np.uint8)
    wrap_classifier(CIFAR, tmp_path / "model.onnx", preprocessing)
    expected = ort.InferenceSession(CIFAR).run(None, {"image": normalised(crops, preprocessing).transpose(0, 3, 1, 2)})[0]
    np.testing.assert_allclose(run_wrapped(tmp_path / "model.onnx", crops), expected, rtol=0, atol=1e-4)
