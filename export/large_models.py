"""Models whose weights do not fit into one ONNX file: a protobuf message ends at 2 GiB, and the paper's largest teacher has 3.4 GB.

    model.onnx                 graph, and of every large tensor where it lies
    2c6d6993df914d36.weights   the tensors, one after the other (ONNX's external data), named by what is in it

The file of weights is written first and has a name of its own, so a crash leaves the old model with its weights or the new one with its
own, and at most one file of weights that the next `sweep_weights` takes away. Unit of data: one model.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError, Message  # type: ignore[import-untyped]
from onnx import TensorProto, numpy_helper

MAX_FILE_BYTES = 2**31 - 2**20
"""A protobuf message ends at 2 GiB; the rest is left for the graph around the weights."""
LARGE_TENSOR_BYTES = 1024
"""Smaller tensors stay in the graph: shapes, axes and scales, which shape inference reads."""
ALIGNMENT = 4096
"""Of a tensor in the file, in bytes: ONNX Runtime maps it into memory."""
SUFFIX = ".weights"
PENDING = ".weights.pending"
"""What is being written; one name, so that the next try writes over what a crash left."""
_OURS = re.compile(rf"[0-9a-f]{{16}}{re.escape(SUFFIX)}")


def is_large(model: onnx.ModelProto) -> bool:
    """Whether it needs a second file."""
    return sum(tensor.ByteSize() for tensor in model.graph.initializer) > MAX_FILE_BYTES


def without_weights(model: onnx.ModelProto, place: Callable[[bytes], dict[str, str]]) -> onnx.ModelProto:
    """A copy of the model in which `place` has taken each large tensor.

    Args:
        place: bytes of a tensor -> what the copy says of where they are.
    """
    light = onnx.ModelProto()
    _copy_but(model, light, "graph")
    _copy_but(model.graph, light.graph, "initializer")
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.STRING or tensor.ByteSize() < LARGE_TENSOR_BYTES:
            light.graph.initializer.append(tensor)
            continue
        placed = light.graph.initializer.add(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
        placed.data_location = TensorProto.EXTERNAL
        for key, value in place(tensor.raw_data or numpy_helper.to_array(tensor).tobytes()).items():
            placed.external_data.add(key=key, value=value)
    return light


def save_weights(model: onnx.ModelProto, path: Path) -> onnx.ModelProto:
    """Write the weights of `model` beside `path`; returns what is left of it, to be written to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pending = path.with_name(PENDING)
    digest = hashlib.sha256()
    try:
        with pending.open("wb") as file:

            def place(data: bytes) -> dict[str, str]:
                file.write(bytes(-file.tell() % ALIGNMENT))
                digest.update(len(data).to_bytes(8, "big"))
                digest.update(data)
                offset = file.tell()
                file.write(data)
                return {"offset": str(offset), "length": str(len(data))}

            light = without_weights(model, place)
            file.flush()
            os.fsync(file.fileno())
        name = f"{digest.hexdigest()[:16]}{SUFFIX}"
        pending.replace(path.with_name(name))
    finally:
        pending.unlink(missing_ok=True)
    for tensor in light.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            tensor.external_data.add(key="location", value=name)
    return light


def canonical_bytes_of(model: onnx.ModelProto, strip: Callable[[onnx.ModelProto], None]) -> bytes:
    """What a large model computes, as bytes; instead of each large tensor stands its sha256. `strip` takes away what computes nothing."""
    light = without_weights(model, lambda data: {"sha256": hashlib.sha256(data).hexdigest()})
    strip(light)
    return bytes(light.SerializeToString(deterministic=True))


def weights_of(path: Path) -> set[str]:
    """Names of the files of weights that the model in `path` needs.

    Raises:
        DecodeError: it is no ONNX model.
    """
    tensors = onnx.load(path, load_external_data=False).graph.initializer
    return {entry.value for tensor in tensors for entry in tensor.external_data if entry.key == "location"}


def model_bytes(path: Path) -> int:
    """Size of a model with its file of weights, if it has one."""
    beside = [path.with_name(name) for name in weights_of(path)] if any(path.parent.glob(f"*{SUFFIX}")) else []
    return sum(file.stat().st_size for file in (path, *beside) if file.exists())


def sweep_weights(folder: Path) -> None:
    """Remove our files of weights that no model in the folder needs. What cannot be told or removed now stays for the next time."""
    left = {path.name for path in folder.glob(f"*{SUFFIX}") if _OURS.fullmatch(path.name)}
    with suppress(DecodeError, OSError):
        if left:
            left -= {name for path in folder.glob("*.onnx") for name in weights_of(path)}
        for name in left:
            (folder / name).unlink(missing_ok=True)


def _copy_but(source: Message, target: Message, left_out: str) -> None:
    for field, value in source.ListFields():
        if field.name == left_out:
            continue
        ours: Any = getattr(target, field.name)
        if hasattr(value, "extend") or hasattr(value, "MergeFrom"):
            ours.MergeFrom(value)
        else:
            setattr(target, field.name, value)
