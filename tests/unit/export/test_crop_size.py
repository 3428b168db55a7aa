"""Crops of another size: the graph resizes as torch does, the network sees its own size, and the teacher states what travels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from distill.errors import ConfigError
from distill.teacher_info import Preprocessing
from export.contract import require_input_size, require_same_size
from export.crop_size import resize_node, resized_pixels, with_resize
from export.fingerprint import read_teacher_info
from export.imports import adopt_teacher, import_onnx
from export.settings import TeacherExportSettings
from export.teacher import export_teacher

SIZES = [(16, 40), (16, 24), (16, 16), (40, 16), (33, 16), (17, 16)]


def other_size(crops: np.ndarray, size: int) -> np.ndarray:
    return np.stack([np.array(Image.fromarray(crop).resize((size, size), Image.Resampling.BILINEAR)) for crop in crops])


def said(model: Path, crops: np.ndarray) -> np.ndarray:
    return ort.InferenceSession(model).run(["logits"], {"images": crops, "temperature": np.ones((len(crops), 1), np.float32)})[0]


@pytest.mark.parametrize(("from_size", "to_size"), SIZES)
def test_the_node_does_what_pillow_does(crops, from_size: int, to_size: int) -> None:
    node, constant = resize_node("x", "y", from_size, to_size, opset=20)
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["b", 3, None, None]) for name in ("x", "y")]
    graph = helper.make_graph([node], "g", values[:1], values[1:], [constant])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    given = other_size(crops[:4], from_size)
    planes = given.transpose(0, 3, 1, 2).astype(np.float32)
    found = ort.InferenceSession(model.SerializeToString()).run(None, {"x": planes})[0].transpose(0, 2, 3, 1)
    assert np.abs(found - other_size(given, to_size)).max() <= 1.01  # Pillow rounds to uint8 after each of its two passes
    np.testing.assert_allclose(found, resized_pixels(given, to_size), rtol=0, atol=1e-3)


@pytest.mark.parametrize(("from_size", "to_size"), [(96, 224), (28, 32), (7, 64), (32, 33)])
def test_scales_do_not_lose_a_row(from_size: int, to_size: int) -> None:
    node, scales = resize_node("x", "y", from_size, to_size, opset=17)
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 3, None, None]) for name in ("x", "y")]
    graph = helper.make_graph([node], "g", values[:1], values[1:], [scales])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    pixels = np.random.default_rng(0).uniform(0, 255, (1, 3, from_size, from_size)).astype(np.float32)
    found = ort.InferenceSession(model.SerializeToString()).run(None, {"x": pixels})[0]
    assert found.shape == (1, 3, to_size, to_size)
    expected = torch.nn.functional.interpolate(torch.from_numpy(pixels), size=(to_size, to_size), mode="bilinear").numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-2)
    with pytest.raises(ConfigError, match="to 7 in opset 17; export the model anew with opset 18 or later"):
        resize_node("x", "y", 64, 7, opset=17)


@pytest.mark.parametrize("size", [10, 40])
def test_a_teacher_takes_what_travels(network, preprocessing, class_names, crops, image_ids, tmp_path: Path, size: int) -> None:
    travelling = other_size(crops, size)
    settings = TeacherExportSettings(name="tiny", input_size=size)
    info = export_teacher(network, preprocessing, class_names, travelling, image_ids, tmp_path, settings)
    assert info.preprocessing == preprocessing.replace(image_size=size)
    with torch.inference_mode():
        expected = network(torch.from_numpy(resized_pixels(travelling, 16)))
    np.testing.assert_allclose(said(tmp_path / "model.onnx", travelling), expected, rtol=0, atol=1e-4)
    resizes = [node for node in onnx.load(tmp_path / "model.onnx").graph.node if node.op_type == "Resize"]
    averages = [attribute.i for node in resizes for attribute in node.attribute if attribute.name == "antialias" and attribute.i]
    assert (len(resizes), averages) == (1, [1] if size > 16 else [])
    assert adopt_teacher(tmp_path, tmp_path / "run", class_names, size, settings).preprocessing.image_size == size


def test_its_own_size_needs_no_resize(network) -> None:
    assert with_resize(network, 16, 16) is network
    assert with_resize(network, 16, None) is network


@pytest.mark.parametrize("size", [12, 30])
@pytest.mark.parametrize("form", ["float planes", "float rows", "half planes", "uint8 rows"])
def test_a_ready_classifier_takes_what_travels(crops, image_ids, tmp_path: Path, form: str, size: int) -> None:
    source, preprocessing = ready_classifier(tmp_path / "ready.onnx", form)
    # int8 beside a resize is what ONNX Runtime's layout optimiser once stumbled over.
    precision = {"half planes": "fp16", "float rows": "int8"}.get(form, "fp32")
    settings = TeacherExportSettings(name="ready", input_size=size, precision=precision)
    info = import_onnx(source, tmp_path / "teacher", preprocessing, ("a", "b", "c"), other_size(crops, size), image_ids, settings)
    assert info.preprocessing.image_size == size
    assert read_teacher_info(tmp_path / "teacher" / "model.onnx") == info


def test_sizes_that_do_not_fit_name_the_setting() -> None:
    own = Preprocessing(image_size=224)
    with pytest.raises(ConfigError, match=r"sees crops of 224 pixels, data.image_size is 96: .* set teacher.input_size=96"):
        require_same_size(own, 96, "it")
    with pytest.raises(ConfigError, match=r"set teacher.input_size=96"):
        require_input_size(own, None, 96, "it")
    with pytest.raises(ConfigError, match=r"teacher.input_size is 64, data.image_size is 96"):
        require_input_size(own, 64, 96, "it")
    require_input_size(own, 96, 96, "it")
    require_input_size(own, None, 224, "it")


def ready_classifier(path: Path, form: str) -> tuple[Path, Preprocessing]:
    """Someone's model of 16 x 16 pixels: global pool of each quarter's worth of pixels, then linear."""
    kind, layout = form.split()
    types = {"float": TensorProto.FLOAT, "half": TensorProto.FLOAT16, "uint8": TensorProto.UINT8}
    current, nodes = "pixels", []
    if kind != "float":
        nodes.append(helper.make_node("Cast", [current], ["cast"], to=TensorProto.FLOAT))
        current = "cast"
    if layout == "rows":
        nodes.append(helper.make_node("Transpose", [current], ["planes"], perm=[0, 3, 1, 2]))
        current = "planes"
    nodes += [
        helper.make_node("AveragePool", [current], ["pooled"], kernel_shape=[8, 8], strides=[8, 8]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("MatMul", ["flat", "linear"], ["scores"]),
    ]
    linear = np.random.default_rng(2).normal(0, 2 / 255 if kind == "uint8" else 2, (12, 3)).astype(np.float32)
    shape = ["n", 3, 16, 16] if layout == "planes" else ["n", 16, 16, 3]
    inputs = [helper.make_tensor_value_info("pixels", types[kind], shape)]
    outputs = [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["n", 3])]
    graph = helper.make_graph(nodes, "someone", inputs, outputs, [numpy_helper.from_array(linear, "linear")])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), path)
    stated = Preprocessing(image_size=16)
    return path, stated if kind == "uint8" else stated.replace(mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))
