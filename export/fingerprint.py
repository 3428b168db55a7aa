"""Who a teacher is: one sha256 over what decides its labels, written into its own file.

Unit of data: one teacher file. The fingerprint covers graph, weights, preprocessing and class list; it does not cover name, version,
default temperature or any other metadata, so renaming a teacher keeps every label that it ever gave.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from pydantic import ValidationError

from distill.errors import BadInput, ConfigError, FingerprintMismatch, StageMissing
from distill.teacher_info import METADATA_KEY, Preprocessing, TeacherInfo
from distill.wire import LOGITS, SOFT_LABELS
from export.graph import save_model, strip_descriptions
from export.large_models import canonical_bytes_of, is_large
from export.settings import Precision


def load_model(path: Path) -> onnx.ModelProto:
    """Read an ONNX file.

    Raises:
        StageMissing: there is no such file.
        BadInput: it is not an ONNX model, or keeps its weights in a second file that is not there.
    """
    try:
        model = onnx.load(path)
    except FileNotFoundError as error:
        raise StageMissing(f"{error.filename or path} does not exist; export or import the network first") from error
    except (DecodeError, onnx.checker.ValidationError, ValueError, OSError) as error:
        raise BadInput(f"{path} cannot be read as an ONNX model: {' '.join(str(error).split())[:200]}") from error
    if not model.graph.output:
        raise BadInput(f"{path} is not an ONNX model: it has no graph with an output")
    return model


def canonical_bytes(model: onnx.ModelProto) -> bytes:
    """What a model computes, as bytes: graph and weights, without metadata, descriptions and the names of the tools that wrote it."""
    if is_large(model):
        return canonical_bytes_of(model, strip_descriptions)
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    strip_descriptions(bare)
    return bare.SerializeToString(deterministic=True)


def teacher_fingerprint(model_bytes: bytes, preprocessing: Preprocessing, class_names: Sequence[str]) -> str:
    """sha256 (hex) of a teacher.

    Args:
        model_bytes: graph and weights, from `canonical_bytes`.
        preprocessing: what an image goes through before it is a crop.
        class_names: names of the K classes, in the order of the logits.
    """
    seen = preprocessing.model_dump(mode="json")
    if preprocessing.interpolation == "bilinear":  # as it always was before there was a choice: those teachers keep their labels
        del seen["interpolation"]
    contract = {"preprocessing": seen, "class_names": list(class_names)}
    digest = hashlib.sha256(b"distill.teacher/1\0")
    digest.update(hashlib.sha256(model_bytes).digest())
    digest.update(json.dumps(contract, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode())
    return digest.hexdigest()


def stamp_teacher(
    path: Path,
    *,
    name: str,
    class_names: Sequence[str],
    preprocessing: Preprocessing,
    version: int = 1,
    default_temperature: float = 1.0,
    precision: Precision = "fp32",
    top_outputs: int | None = None,
) -> TeacherInfo:
    """Fingerprint the teacher graph in `path` and write its `TeacherInfo` into the file's metadata.

    Raises:
        ConfigError: a name or number that `TeacherInfo` refuses, or a class list that does not fit the logits.
    """
    model = load_model(path)
    fingerprint = teacher_fingerprint(canonical_bytes(model), preprocessing, class_names)
    try:
        info = TeacherInfo(
            name=name,
            version=version,
            fingerprint=fingerprint,
            class_names=tuple(class_names),
            preprocessing=preprocessing,
            default_temperature=default_temperature,
            precision=precision,
            top_outputs=top_outputs,
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"teacher {name!r}: {'.'.join(map(str, first['loc']))}: {first['msg']} (given: {first['input']!r})") from error
    _check_num_classes(model, info, path)
    _save_with(model, info, path)
    return info


def write_teacher_info(path: Path, info: TeacherInfo, target: Path) -> None:
    """Copy a teacher to `target` with `info` as what it says of itself: another name, version or default temperature."""
    _save_with(load_model(path), info, target)


def read_teacher_info(path: Path) -> TeacherInfo:
    """What the teacher in `path` says of itself, checked against the graph and weights beside it.

    Raises:
        StageMissing: no such file.
        BadInput: not an ONNX model, or one that was never stamped.
        FingerprintMismatch: graph, weights, preprocessing or class list were altered after the stamp.
    """
    model = load_model(path)
    stamped = {entry.key: entry.value for entry in model.metadata_props}.get(METADATA_KEY)
    if stamped is None:
        raise BadInput(f"{path} carries no {METADATA_KEY} metadata: it was not made by `distill export-teacher` or `distill import`")
    try:
        info = TeacherInfo.model_validate_json(stamped)
    except ValidationError as error:
        raise BadInput(f"{path}: the {METADATA_KEY} metadata cannot be read; export the teacher again") from error
    actual = teacher_fingerprint(canonical_bytes(model), info.preprocessing, info.class_names)
    if actual != info.fingerprint:
        raise FingerprintMismatch(
            f"{path} says fingerprint {info.fingerprint[:12]} but its graph, weights, preprocessing and classes give {actual[:12]}: "
            "it was altered after the export; export it again"
        )
    return info


def _save_with(model: onnx.ModelProto, info: TeacherInfo, path: Path) -> None:
    onnx.helper.set_model_props(model, {METADATA_KEY: info.model_dump_json()})
    save_model(model, path)


def _check_num_classes(model: onnx.ModelProto, info: TeacherInfo, path: Path) -> None:
    for output in model.graph.output:
        if output.name not in (LOGITS, SOFT_LABELS):
            continue
        last = output.type.tensor_type.shape.dim[-1:]
        if last and last[0].HasField("dim_value") and last[0].dim_value != info.num_classes:
            raise ConfigError(
                f"{path} has {last[0].dim_value} {output.name} a crop, but {info.num_classes} class names are given: they must be equal"
            )
