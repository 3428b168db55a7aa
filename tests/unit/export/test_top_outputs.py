"""The largest logits and their classes come out of the graph itself, in the order of a sort."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from tritonclient.grpc import model_config_pb2

from distill.errors import ConfigError
from distill.teacher_info import Preprocessing
from export.fingerprint import read_teacher_info
from export.graph import save_model
from export.imports import adopt_teacher
from export.parity import torch_reference
from export.settings import RepositorySettings, TeacherExportSettings
from export.teacher import admit_teacher
from export.teacher_precision import found_precision
from export.top_outputs import add_top_outputs, top_output_failures
from export.triton_repository import model_config

SETTINGS = TeacherExportSettings(name="tiny", top_outputs=3)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_they_are_the_sorted_logits(
    teacher_model: Path, network, preprocessing, class_names, crops, image_ids, tmp_path: Path, precision: str
) -> None:
    path = tmp_path / "unchecked.onnx"
    path.write_bytes(teacher_model.read_bytes())
    settings = SETTINGS.replace(precision=precision)
    info = admit_teacher(path, tmp_path, torch_reference(network), preprocessing, class_names, crops, image_ids, settings)
    assert (info.top_outputs, info.num_classes) == (3, 5)
    names = ["logits", "top_ids", "top_logits", "soft_labels"]
    feed = {"images": crops, "temperature": np.full((len(crops), 1), 7, np.float32)}
    logits_BK, ids_BR, top_BR, _ = ort.InferenceSession(tmp_path / "model.onnx").run(names, feed)
    assert (ids_BR.dtype, ids_BR.shape, top_BR.dtype) == (np.int32, (len(crops), 3), np.float32)
    assert all(len(np.unique(row)) == 5 for row in logits_BK), "the logits must differ for one right order"
    np.testing.assert_array_equal(ids_BR, np.argsort(-logits_BK, axis=1)[:, :3])
    np.testing.assert_array_equal(top_BR, np.take_along_axis(logits_BK, ids_BR, axis=1))


@pytest.mark.parametrize(
    ("name", "operator"),
    [
        ("top_logits", "Neg"),
        ("top_logits", "Floor"),
        ("top_ids", "Neg"),  # all but class 0 are then none of the teacher's
        ("top_ids", "Sign"),  # each names a class, most of them twice
    ],
)
def test_the_gate_looks_at_them(teacher_model: Path, network, crops, image_ids, tmp_path: Path, name: str, operator: str) -> None:
    path = tmp_path / "unchecked.onnx"
    model = onnx.load(teacher_model)
    add_top_outputs(model, 3)
    maker = next(node for node in model.graph.node if name in node.output)
    maker.output[list(maker.output).index(name)] = "right"
    model.graph.node.append(onnx.helper.make_node(operator, ["right"], [name], name="wrong"))
    save_model(model, path)
    failures = top_output_failures(path, crops, 3)
    assert failures == ("top outputs are not the 3 largest logits on 64 of 64 images",)
    teacher = found_precision(path, SETTINGS)
    report = teacher.check(torch_reference(network), crops, image_ids)
    assert report.failures == failures


def test_more_than_there_are_classes(hand_made) -> None:
    with pytest.raises(ConfigError, match=r"teacher.top_outputs: 7 is more than the teacher's 6 classes"):
        add_top_outputs(hand_made(), 7)


def test_the_graph_declares_them(hand_made, tmp_path: Path) -> None:
    model = hand_made()
    add_top_outputs(model, 6)
    save_model(model, tmp_path / "m.onnx")  # ONNX's checker compares the declared shapes with the inferred ones
    shapes = {value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim][1:] for value in model.graph.output}
    assert shapes == {"logits": [6], "soft_labels": [6], "top_ids": [6], "top_logits": [6]}


def test_triton_is_told(stamped) -> None:
    _, info = stamped
    config = model_config(info.replace(top_outputs=3), RepositorySettings())
    outputs = {output.name: (model_config_pb2.DataType.Name(output.data_type), list(output.dims)) for output in config.output}
    assert outputs == {
        "logits": ("TYPE_FP32", [5]),
        "soft_labels": ("TYPE_FP32", [5]),
        "top_ids": ("TYPE_INT32", [3]),
        "top_logits": ("TYPE_FP32", [3]),
    }


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"top_outputs": 3}, "with top_outputs None, so teacher.top_outputs: 3 comes too late"),
        ({"precision": "int8"}, "with precision fp32, so teacher.precision: int8 comes too late"),
        ({"input_size": 64}, "with input_size 16, so teacher.input_size: 64 comes too late"),
    ],
)
def test_a_finished_teacher_is_not_changed(stamped, class_names, tmp_path: Path, changes: dict[str, object], said: str) -> None:
    path, _ = stamped
    with pytest.raises(ConfigError, match=said):
        adopt_teacher(path, tmp_path / "run", class_names, None, TeacherExportSettings(**changes))
    assert not (tmp_path / "run").exists()


def test_teachers_of_before_still_read(stamped) -> None:
    path, info = stamped
    model = onnx.load(path)
    before = info.model_dump_json(exclude={"precision", "top_outputs"})
    onnx.helper.set_model_props(model, {"distill.teacher": before})
    onnx.save(model, path)
    assert read_teacher_info(path) == info
    assert isinstance(info.preprocessing, Preprocessing)
