"""Fixtures for several packages: a teacher small enough to compute by hand, as ONNX in a Triton model repository."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from google.protobuf import text_format
from hypothesis import settings
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from tritonclient.grpc import model_config_pb2

from distill.teacher_info import METADATA_KEY, Preprocessing, TeacherInfo

IMAGE_SIZE = 8

settings.register_profile("beside others", deadline=None)  # how long an example takes says nothing of it here
settings.load_profile("beside others")


@pytest.fixture(scope="session", autouse=True)
def _ctrl_c_is_heard() -> None:
    """A shell without job control lets what it starts in the background, and the children of that, ignore SIGINT."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For tiny tensors: a second thread of torch costs more than it brings, and much more beside other jobs."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True)
class TinyTeacher:
    """logits = mean RGB @ weight + bias; `repository` is what Triton loads."""

    repository: Path
    info: TeacherInfo
    weight_CK: NDArray[np.float32]
    bias_K: NDArray[np.float32]

    def logits(self, crops_BHWC: NDArray[np.uint8]) -> NDArray[np.float64]:
        """The right answer, in float64."""
        means_BC = crops_BHWC.astype(np.float64).mean(axis=(1, 2)) / 255
        return means_BC @ self.weight_CK.astype(np.float64) + self.bias_K

    def soft_labels(self, crops_BHWC: NDArray[np.uint8], temperature_B1: NDArray[np.float32]) -> NDArray[np.float64]:
        """The right answer, in float64."""
        exp_BK = np.exp(self.logits(crops_BHWC) / temperature_B1.astype(np.float64))
        return exp_BK / exp_BK.sum(axis=1, keepdims=True)


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> TinyTeacher:
    """A 10-class teacher of 8 x 8 crops named `tiny`, version 1."""
    random = np.random.default_rng(0)
    weight_CK = random.normal(0, 4, (3, 10)).astype(np.float32)
    bias_K = random.normal(0, 1, 10).astype(np.float32)
    info = TeacherInfo(
        name="tiny",
        fingerprint="ab" * 32,
        class_names=tuple(f"class {k}" for k in range(10)),
        preprocessing=Preprocessing(image_size=IMAGE_SIZE),
    )
    repository = tmp_path_factory.mktemp("repository")
    (repository / "tiny" / "1").mkdir(parents=True)
    onnx.save(_graph(weight_CK, bias_K, info), repository / "tiny" / "1" / "model.onnx")
    (repository / "tiny" / "config.pbtxt").write_text(_config(info))
    return TinyTeacher(repository, info, weight_CK, bias_K)


def _graph(weight_CK: NDArray[np.float32], bias_K: NDArray[np.float32], info: TeacherInfo) -> onnx.ModelProto:
    num_classes = len(bias_K)
    images = helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", IMAGE_SIZE, IMAGE_SIZE, 3])
    temperature = helper.make_tensor_value_info("temperature", TensorProto.FLOAT, ["batch", 1])
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", num_classes]) for name in ("logits", "soft_labels")]
    constants = {"axes": np.array([1, 2], np.int64), "scale": np.array(255, np.float32), "weight": weight_CK, "bias": bias_K}
    nodes = [
        helper.make_node("Cast", ["images"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["pixels", "axes"], ["means"], keepdims=0),
        helper.make_node("Div", ["means", "scale"], ["scaled"]),
        helper.make_node("MatMul", ["scaled", "weight"], ["product"]),
        helper.make_node("Add", ["product", "bias"], ["logits"]),
        helper.make_node("Div", ["logits", "temperature"], ["tempered"]),
        helper.make_node("Softmax", ["tempered"], ["soft_labels"], axis=1),
    ]
    initializers = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "tiny", [images, temperature], outputs, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    helper.set_model_props(model, {METADATA_KEY: info.model_dump_json()})
    onnx.checker.check_model(model)
    return model


def _config(info: TeacherInfo) -> str:
    config = model_config_pb2.ModelConfig(name="tiny", backend="onnxruntime", max_batch_size=32)
    config.input.add(name="images", data_type=model_config_pb2.TYPE_UINT8, dims=[IMAGE_SIZE, IMAGE_SIZE, 3])
    config.input.add(name="temperature", data_type=model_config_pb2.TYPE_FP32, dims=[1])
    config.output.add(name="logits", data_type=model_config_pb2.TYPE_FP32, dims=[info.num_classes])
    config.output.add(name="soft_labels", data_type=model_config_pb2.TYPE_FP32, dims=[info.num_classes])
    config.instance_group.add(kind=model_config_pb2.ModelInstanceGroup.KIND_CPU, count=1)
    config.dynamic_batching.preferred_batch_size.append(32)
    config.dynamic_batching.max_queue_delay_microseconds = 2000
    config.parameters[METADATA_KEY].string_value = info.model_dump_json()
    config.parameters["intra_op_thread_count"].string_value = "1"
    return text_format.MessageToString(config)
