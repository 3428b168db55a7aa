"""The file that runs inside Triton's stub, with Triton's own module played by a few classes."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import teacher_server


@dataclass
class Tensor:
    name: str
    values: np.ndarray

    def as_numpy(self) -> np.ndarray:
        return self.values


@dataclass
class TritonError:
    message: str
    code: str
    CANCELLED = "CANCELLED"
    INVALID_ARG = "INVALID_ARG"
    INTERNAL = "INTERNAL"


@dataclass
class Response:
    tensors: list[Tensor]
    error: TritonError | None = None

    def __getitem__(self, name: str) -> np.ndarray:
        return next(tensor.values for tensor in self.tensors if tensor.name == name)


@dataclass
class Request:
    images: np.ndarray
    temperature: np.ndarray
    wanted: tuple[str, ...] = ("soft_labels",)
    cancelled: bool = field(default=False)

    def is_cancelled(self) -> bool:
        return self.cancelled

    def requested_output_names(self) -> tuple[str, ...]:
        return self.wanted


class CountingSession:
    """Notes the batch and the outputs of each engine call."""

    def __init__(self, session: Any) -> None:
        self.session = session
        self.calls: list[tuple[int, list[str]]] = []

    def run(self, names: list[str], feed: dict[str, np.ndarray]) -> Any:
        self.calls.append((len(feed["images"]), names))
        return self.session.run(names, feed)


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch, tiny_teacher: Any) -> Any:
    utils = ModuleType("triton_python_backend_utils")
    vars(utils).update(
        Tensor=Tensor,
        TritonError=TritonError,
        InferenceResponse=Response,
        TritonModelException=RuntimeError,
        get_input_tensor_by_name=lambda request, name: Tensor(name, getattr(request, name)),
    )
    monkeypatch.setitem(sys.modules, utils.__name__, utils)
    assert teacher_server.__file__ is not None
    path = Path(teacher_server.__file__).parent / "triton_backends" / "onnxruntime" / "model.py"
    spec = importlib.util.spec_from_file_location("triton_backend_model", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = {
        "input": [{"name": "images"}, {"name": "temperature"}],
        "output": [{"name": "logits"}, {"name": "soft_labels"}],
        "parameters": {"intra_op_thread_count": {"string_value": "1"}},
    }
    loaded = module.TritonPythonModel()
    loaded.initialize({"model_config": json.dumps(config), "model_repository": str(tiny_teacher.repository / "tiny"), "model_version": "1"})
    loaded._session = CountingSession(loaded._session)
    assert module.session_options(config).intra_op_num_threads == 1
    return loaded


def test_a_file_of_another_teacher_than_the_configuration_describes_is_not_loaded(model: Any, tiny_teacher: Any) -> None:
    info = tiny_teacher.info
    args = {"model_repository": str(tiny_teacher.repository / "tiny"), "model_version": "1"}
    config = {"input": [{"name": "images"}], "output": [{"name": "logits"}]}

    def load(described: Any) -> None:
        parameters = {"distill.teacher": {"string_value": described.model_dump_json()}}
        type(model)().initialize({**args, "model_config": json.dumps({**config, "parameters": parameters})})

    load(info)
    load(info.replace(version=2, fingerprint="f" * 64))  # while versions change, the configuration describes another version
    with pytest.raises(RuntimeError, match=r"version 1 holds teacher abababababab, config\.pbtxt describes ffffffffffff"):
        load(info.replace(fingerprint="f" * 64))


def crops(count: int) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, 8, 8, 3), np.uint8)


def test_a_dynamic_batch_is_one_engine_call(model: Any, tiny_teacher: Any) -> None:
    requests = [
        Request(crops(2), np.full((2, 1), 1, np.float32)),
        Request(crops(1), np.full((1, 1), 4, np.float32), wanted=("logits",)),
        Request(crops(3), np.array([[1], [2], [8]], np.float32), wanted=("logits", "soft_labels")),
    ]
    first, second, third = model.execute(requests)
    assert model._session.calls == [(6, ["logits", "soft_labels"])]
    assert [tensor.name for tensor in first.tensors] == ["soft_labels"]
    assert [tensor.name for tensor in second.tensors] == ["logits"]
    np.testing.assert_allclose(first["soft_labels"], tiny_teacher.soft_labels(crops(2), requests[0].temperature), atol=1e-6)
    np.testing.assert_allclose(second["logits"], tiny_teacher.logits(crops(1)), atol=1e-5)
    np.testing.assert_allclose(third["soft_labels"], tiny_teacher.soft_labels(crops(3), requests[2].temperature), atol=1e-6)


def test_only_the_outputs_asked_for_are_computed(model: Any) -> None:
    model.execute([Request(crops(1), np.ones((1, 1), np.float32), wanted=("logits",))])
    assert model._session.calls == [(1, ["logits"])]


def test_a_bad_request_does_not_disturb_the_others(model: Any, tiny_teacher: Any) -> None:
    ones = np.ones((1, 1), np.float32)
    good, zero, uneven, gone = model.execute(
        [
            Request(crops(1), ones),
            Request(crops(1), ones * 0),
            Request(crops(2), ones),
            Request(crops(1), ones, cancelled=True),
        ]
    )
    np.testing.assert_allclose(good["soft_labels"], tiny_teacher.soft_labels(crops(1), ones), atol=1e-6)
    assert (zero.error.code, "above 0" in zero.error.message) == ("INVALID_ARG", True)
    assert (uneven.error.code, "batch sizes" in uneven.error.message) == ("INVALID_ARG", True)
    assert gone.error.code == "CANCELLED"
    assert model._session.calls == [(1, ["soft_labels"])]


def test_a_failing_engine_answers_every_request(model: Any) -> None:
    wrong_size = Request(np.zeros((1, 9, 9, 3), np.uint8), np.ones((1, 1), np.float32))
    responses = model.execute([wrong_size, wrong_size])
    assert [response.error.code for response in responses] == ["INTERNAL", "INTERNAL"]
    assert model.execute([Request(crops(1), np.zeros((1, 1), np.float32))])[0].error.code == "INVALID_ARG"
