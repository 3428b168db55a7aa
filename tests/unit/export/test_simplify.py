"""A ready model gets smaller and says the same; it is rewritten in a later opset only where something needs it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from distill.errors import ConfigError
from distill.teacher_info import Preprocessing
from export.graph_regions import head_and_tail, opset_of
from export.runners import OnnxRunner
from export.settings import TeacherExportSettings
from export.simplify import at_least_opset, simplify
from export.teacher_precision import set_precision
from export.wrap import wrap_classifier


def said(model: onnx.ModelProto, crops: np.ndarray) -> np.ndarray:
    return OnnxRunner.of_model(model, "m", "x")(crops, np.ones((len(crops), 1), np.float32))[0]


def roundabout(hand_made) -> onnx.ModelProto:
    """Times 1/3 by way of constants that are computed, with steps that do nothing and one that nobody reads."""
    return hand_made(
        [
            helper.make_node("Constant", [], ["three"], name="three", value=numpy_helper.from_array(np.float32([3]), "three")),
            helper.make_node("Reciprocal", ["three"], ["third"], name="third"),
            helper.make_node("Identity", ["features"], ["same"], name="same"),
            helper.make_node("Mul", ["same", "third"], ["seen"], name="shrink"),
            helper.make_node("Neg", ["features"], ["unread"], name="unread"),
        ]
    )


def test_less_says_the_same(hand_made, crops) -> None:
    model = roundabout(hand_made)
    smaller = simplify(model)
    operators = [node.op_type for node in smaller.graph.node]
    assert operators.count("Mul") == 1
    assert {"Constant", "Reciprocal", "Identity", "Neg"}.isdisjoint(operators)
    np.testing.assert_allclose(said(smaller, crops), said(model, crops), rtol=0, atol=1e-6)
    assert [value.name for value in [*smaller.graph.input, *smaller.graph.output]] == ["images", "temperature", "logits", "soft_labels"]


def test_head_and_tail_are_what_stands_around_the_network(hand_made) -> None:
    assert head_and_tail(hand_made().graph) == {"cast", "scale_down", "planes_first", "temper", "soften"}


def test_int8_rewrites_an_old_opset(hand_made, crops, tmp_path: Path) -> None:
    model = hand_made(opset=11)
    model.ir_version = 7
    onnx.save(model, tmp_path / "m.onnx")
    precise = set_precision(tmp_path / "m.onnx", crops, TeacherExportSettings(precision="int8"))
    assert precise.opset == 13
    report = precise.check(lambda crops_BHWC: said(model, crops_BHWC), crops, [str(row) for row in range(len(crops))])
    assert report.passed, report.failures
    assert at_least_opset(model, 11, "") is model


def test_what_cannot_be_rewritten_is_named(hand_made) -> None:
    model = hand_made(opset=11)
    model.graph.node[4].op_type = "NoOperator"
    with pytest.raises(ConfigError, match=r"int8 needs opset 13, and a model of opset 11 cannot be rewritten .*: export it anew"):
        at_least_opset(model, 13, "int8")


def test_another_process_wraps_to_the_same_bytes(tmp_path: Path) -> None:
    source = ready(tmp_path / "ready.onnx")
    wrap_classifier(source, tmp_path / "here.onnx", Preprocessing(image_size=16), None, 24)
    script = (
        "import sys; from pathlib import Path; from export.wrap import wrap_classifier; from distill.teacher_info import Preprocessing\n"
        "wrap_classifier(Path(sys.argv[1]), Path(sys.argv[2]), Preprocessing(image_size=16), None, 24)"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": str(Path(__file__).parents[3])}
    subprocess.run([sys.executable, "-c", script, source, tmp_path / "there.onnx"], check=True, cwd=tmp_path, env=environment)
    assert (tmp_path / "here.onnx").read_bytes() == (tmp_path / "there.onnx").read_bytes()
    assert opset_of(onnx.load(tmp_path / "here.onnx")) == 18, "smaller crops need a Resize that averages"


def ready(path: Path) -> Path:
    """float [n,3,16,16] -> computed constant times mean of each channel -> linear, in opset 17."""
    nodes = [
        helper.make_node("GlobalAveragePool", ["pixels"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("Reciprocal", ["three"], ["third"]),
        helper.make_node("Mul", ["flat", "third"], ["less"]),
        helper.make_node("MatMul", ["less", "linear"], ["scores"]),
    ]
    arrays = {"three": np.float32([3]), "linear": np.random.default_rng(0).normal(0, 2, (3, 4)).astype(np.float32)}
    values = [
        helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ("n", 3, 16, 16)),
        helper.make_tensor_value_info("scores", TensorProto.FLOAT, ("n", 4)),
    ]
    tensors = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = helper.make_graph(nodes, "someone", values[:1], values[1:], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path
