"""Triton's `onnxruntime` backend where only Triton's python backend is at hand. Triton's stub process runs this file; we never import it.

Flow: Triton forms a dynamic batch of requests -> one ONNX Runtime call over all of them -> one response per request.
Unit of data: one request, tensors with a leading batch dimension.
Model repositories need no change: the files and parameter names are those of the C++ backend of the same name, which production uses.
It runs in an environment of its own (numpy < 2), so it imports numpy, onnxruntime and Triton's own module only.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

Tensors = dict[str, NDArray[Any]]
TEACHER = "distill.teacher"
"""Key of a teacher's description in the graph's metadata and in the configuration's parameters."""

_GRAPH_LEVELS = {
    -1: onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    0: onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    1: onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
}


class TritonPythonModel:
    """The class that Triton's stub looks for: one instance holds one ONNX Runtime session."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load `<model repository>/<version>/model.onnx`; an exception here fails the load with its message."""
        config = json.loads(args["model_config"])
        file_name = config.get("default_model_filename") or "model.onnx"
        path = Path(args["model_repository"]) / args["model_version"] / file_name
        self._session = onnxruntime.InferenceSession(str(path), session_options(config), providers=["CPUExecutionProvider"])
        self._input_names = [entry["name"] for entry in config["input"]]
        self._output_names = [entry["name"] for entry in config["output"]]
        known = {entry.name for entry in self._session.get_outputs()}
        missing = sorted(set(self._output_names) - known)
        if missing:
            raise pb_utils.TritonModelException(f"{path.name} has no output {missing}; it has {sorted(known)}")
        complaint = _identity_complaint(config, self._session.get_modelmeta().custom_metadata_map, args["model_version"])
        if complaint:
            raise pb_utils.TritonModelException(complaint)

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response per request, in order. A bad request gets an error of its own and does not disturb the others."""
        responses: list[Any] = [None] * len(requests)
        accepted: list[tuple[int, Tensors]] = []
        for position, request in enumerate(requests):
            if request.is_cancelled():
                responses[position] = _failure("the client went away", pb_utils.TritonError.CANCELLED)
                continue
            inputs = {name: pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in self._input_names}
            complaint = _complaint(inputs)
            if complaint:
                responses[position] = _failure(complaint, pb_utils.TritonError.INVALID_ARG)
            else:
                accepted.append((position, inputs))
        for position, response in self._answer(requests, accepted):
            responses[position] = response
        return responses

    def _answer(self, requests: list[Any], accepted: list[tuple[int, Tensors]]) -> list[tuple[int, Any]]:
        """One engine call for all accepted requests: that is what the dynamic batcher waited for."""
        if not accepted:
            return []
        wanted = {position: set(requests[position].requested_output_names()) for position, _ in accepted}
        names = [name for name in self._output_names if any(name in some for some in wanted.values())]
        batch = {name: np.concatenate([inputs[name] for _, inputs in accepted]) for name in self._input_names}
        try:
            tensors = dict(zip(names, self._session.run(names, batch), strict=True))
        except Exception as error:  # noqa: BLE001  an exception out of execute would hide the reason from the clients
            failure = f"ONNX Runtime: {' '.join(str(error).split())}"
            return [(position, _failure(failure, pb_utils.TritonError.INTERNAL)) for position, _ in accepted]
        answers = []
        start = 0
        for position, inputs in accepted:
            stop = start + len(inputs[self._input_names[0]])
            rows = {name: tensors[name][start:stop] for name in names if name in wanted[position]}
            answers.append((position, _response(rows)))
            start = stop
        return answers


def session_options(config: dict[str, Any]) -> onnxruntime.SessionOptions:
    """ONNX Runtime options from a model configuration, by the parameter names of Triton's C++ backend."""
    parameters = {name: entry["string_value"] for name, entry in config.get("parameters", {}).items()}
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(parameters.get("intra_op_thread_count", 0))
    options.inter_op_num_threads = int(parameters.get("inter_op_thread_count", 0))
    if parameters.get("execution_mode") == "1":
        options.execution_mode = onnxruntime.ExecutionMode.ORT_PARALLEL
    if parameters.get("enable_mem_arena") == "0":
        options.enable_cpu_mem_arena = False
    if parameters.get("enable_mem_pattern") == "0":
        options.enable_mem_pattern = False
    level = int(config.get("optimization", {}).get("graph", {}).get("level", 1))
    options.graph_optimization_level = _GRAPH_LEVELS.get(level, onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL)
    # Idle sessions must not spin: several models and the decoders share these cores.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def _identity_complaint(config: dict[str, Any], metadata: dict[str, str], version: str) -> str | None:
    """A complaint where file and configuration are of two teachers, as a crash while a version is replaced leaves them."""
    described = json.loads(config.get("parameters", {}).get(TEACHER, {}).get("string_value", "null"))
    stamped = json.loads(metadata.get(TEACHER, "null"))
    # While versions change, the configuration describes the old one only.
    if described and stamped and str(described["version"]) == version and described["fingerprint"] != stamped["fingerprint"]:
        return (
            f"version {version} holds teacher {stamped['fingerprint'][:12]}, config.pbtxt describes {described['fingerprint'][:12]}:"
            " export it again, or run `distill repository activate` on it"
        )
    return None


def _complaint(inputs: Tensors) -> str | None:
    """What is wrong with one request: tensors of different batch sizes, or a temperature that would answer NaN."""
    sizes = {name: len(tensor) for name, tensor in inputs.items()}
    if len(set(sizes.values())) != 1:
        return f"the inputs have different batch sizes: {sizes}"
    temperature = inputs.get("temperature")
    if temperature is not None and not (np.isfinite(temperature).all() and (temperature > 0).all()):
        return f"temperature must be finite and above 0, got {float(temperature.ravel()[0])}"
    return None


def _response(rows: Tensors) -> Any:
    return pb_utils.InferenceResponse([pb_utils.Tensor(name, np.ascontiguousarray(tensor)) for name, tensor in rows.items()])


def _failure(message: str, code: Any) -> Any:
    return pb_utils.InferenceResponse([], pb_utils.TritonError(message, code))
