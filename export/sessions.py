"""ONNX Runtime sessions on the CPU, with its errors turned into ours. Unit of data: one file, one session."""

from __future__ import annotations

from pathlib import Path

import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from distill.errors import BadInput

# They have no base class of their own; these are the ones that loading and running raise.
ORT_ERRORS: tuple[type[Exception], ...] = (
    ort_errors.EPFail,
    ort_errors.Fail,
    ort_errors.InvalidArgument,
    ort_errors.InvalidGraph,
    ort_errors.InvalidProtobuf,
    ort_errors.NoModel,
    ort_errors.NoSuchFile,
    ort_errors.NotFound,
    ort_errors.NotImplemented,
    ort_errors.RuntimeException,
    RuntimeError,
    ValueError,
)
"""What ONNX Runtime raises when a graph does not load or does not run."""


def open_session(path: Path, num_threads: int = 0) -> ort.InferenceSession:
    """An ONNX Runtime session on the CPU; 0 threads lets ONNX Runtime decide.

    Raises:
        BadInput: the file is missing or ONNX Runtime refuses it.
    """
    return _open(path, str(path), num_threads)


def open_session_of(model_bytes: bytes, name: str) -> ort.InferenceSession:
    """As `open_session`, for a model in memory; `name` is what an error calls it."""
    return _open(model_bytes, name, num_threads=0)


def _open(model: Path | bytes, name: str, num_threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors: its warnings about unused initialisers of other people's graphs help nobody
    try:
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except ORT_ERRORS as error:
        raise BadInput(f"{name} does not load in ONNX Runtime: {short(error)}") from error


def short(error: BaseException) -> str:
    """ONNX Runtime's message in one line of at most 300 characters."""
    return " ".join(str(error).split())[:300]
