"""A teacher file becomes a model that Triton loads: <repository>/<name>/<version>/model.onnx beside <repository>/<name>/config.pbtxt.

Unit of data: one version of one teacher. The configuration is Triton's own protobuf message, so a misspelt field cannot be written.

Crash safety. `config.pbtxt` names the one version that is served, and it is replaced by a rename after the version's folder is complete.
At any moment Triton sees the old version whole or the new one whole; folders that are not plain numbers it ignores.
"""

from __future__ import annotations

import os
import shutil
import struct
from pathlib import Path
from typing import NamedTuple

from google.protobuf import text_format  # type: ignore[import-untyped]
from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelInstanceGroup, ModelQueuePolicy, ModelWarmup

from distill.errors import ConfigError, FingerprintMismatch
from distill.teacher_info import METADATA_KEY, TeacherInfo
from export.fingerprint import read_teacher_info, write_teacher_info
from export.graph import IMAGES, LOGITS, SOFT_LABELS, TEMPERATURE, write_atomically
from export.settings import RepositorySettings

WARMUP_TEMPERATURE = "temperature_one"
"""File in <name>/warmup: Triton's own zero_data would divide the logits by 0."""


class ServedModel(NamedTuple):
    """Where one version of one teacher lies in the repository."""

    folder: Path
    config: Path
    model: Path


def write_repository(
    repository: Path,
    model: Path,
    info: TeacherInfo,
    settings: RepositorySettings,
    *,
    replace: bool = False,
) -> ServedModel:
    """Put one version of a teacher into a Triton model repository and make it the one that is served.

    Args:
        repository: made if it is not there. Other models in it stay.
        model: a stamped teacher graph.
        info: what it is served as. `version` is the folder; the same weights may be served under any name and version.
        settings: batching, queue and instances.
        replace: put another teacher in the place of a version that is there already.

    Raises:
        FingerprintMismatch: `model` is not the teacher that `info` names, or was altered after its export.
        ConfigError: the version is there with another teacher and `replace` is not set.
    """
    stamped = read_teacher_info(model)
    if stamped.fingerprint != info.fingerprint:
        raise FingerprintMismatch(
            f"{model} is teacher {stamped.fingerprint[:12]}, not {info.fingerprint[:12]}: give the file that belongs to it"
        )
    folder = repository / info.name
    served = ServedModel(folder, folder / "config.pbtxt", folder / str(info.version) / "model.onnx")
    # Triton refuses a configuration with a version that is not there, and would make one up where there is none: first the configuration.
    config = text_format.MessageToString(model_config(info, settings)).encode()
    write_atomically(folder / "warmup" / WARMUP_TEMPERATURE, struct.pack("<f", 1.0))
    if not served.config.exists():
        write_atomically(served.config, config)
    if not _holds(served.model, info, replace):
        _put_version(model, info, served.model.parent)
    write_atomically(served.config, config)
    return served


def served_versions(repository: Path, name: str) -> list[int]:
    """Versions of a model that lie in the repository, ascending; empty if there is none."""
    folder = repository / name
    return sorted(int(path.parent.name) for path in folder.glob("*/model.onnx") if path.parent.name.isdigit()) if folder.is_dir() else []


def model_config(info: TeacherInfo, settings: RepositorySettings) -> ModelConfig:
    """Triton's configuration of one teacher."""
    image_size, classes = info.preprocessing.image_size, info.num_classes
    config = ModelConfig(name=info.name, backend="onnxruntime", max_batch_size=settings.max_batch_size)
    config.input.add(name=IMAGES, data_type="TYPE_UINT8", dims=[image_size, image_size, 3])
    config.input.add(name=TEMPERATURE, data_type="TYPE_FP32", dims=[1])
    config.output.add(name=LOGITS, data_type="TYPE_FP32", dims=[classes])
    config.output.add(name=SOFT_LABELS, data_type="TYPE_FP32", dims=[classes])
    config.version_policy.specific.versions.append(info.version)
    kinds = {"cpu": ModelInstanceGroup.KIND_CPU, "gpu": ModelInstanceGroup.KIND_GPU}
    config.instance_group.add(kind=kinds[settings.instance_kind], count=settings.instance_count)
    batching = config.dynamic_batching
    batching.preferred_batch_size.extend(sorted({size for size in settings.preferred_batch_sizes if size <= settings.max_batch_size}))
    batching.max_queue_delay_microseconds = settings.max_queue_delay_us
    batching.default_queue_policy.CopyFrom(
        ModelQueuePolicy(
            timeout_action=ModelQueuePolicy.REJECT,
            default_timeout_microseconds=settings.queue_timeout_us,
            allow_timeout_override=True,
            max_queue_size=settings.max_queue_size,
        )
    )
    config.parameters[METADATA_KEY].string_value = info.model_dump_json()
    if settings.intra_op_threads:
        config.parameters["intra_op_thread_count"].string_value = str(settings.intra_op_threads)
    for batch_size in settings.warmup_batch_sizes:
        if batch_size <= settings.max_batch_size:
            config.model_warmup.append(_warmup(batch_size, image_size))
    return config


def _warmup(batch_size: int, image_size: int) -> ModelWarmup:
    warmup = ModelWarmup(name=f"batch_{batch_size}", batch_size=batch_size)
    warmup.inputs[IMAGES].CopyFrom(ModelWarmup.Input(data_type="TYPE_UINT8", dims=[image_size, image_size, 3], random_data=True))
    warmup.inputs[TEMPERATURE].CopyFrom(ModelWarmup.Input(data_type="TYPE_FP32", dims=[1], input_data_file=WARMUP_TEMPERATURE))
    return warmup


def _holds(model: Path, info: TeacherInfo, replace: bool) -> bool:
    """Whether the version's file is there already and says exactly `info` of itself."""
    if replace or not model.exists():
        return False
    there = read_teacher_info(model)
    if there.fingerprint != info.fingerprint:
        raise ConfigError(
            f"version {info.version} of {info.name} is there with teacher {there.fingerprint[:12]}, this one is {info.fingerprint[:12]}: "
            "give it the next version, or ask for a replacement"
        )
    return there == info


def _put_version(model: Path, info: TeacherInfo, folder: Path) -> None:
    """Write `model`, saying `info` of itself, into a folder that Triton ignores, then give that folder its number."""
    pending = folder.with_name(f".{folder.name}.{os.getpid()}.pending")
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    for leftover in (pending, old):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        write_teacher_info(model, info, pending / "model.onnx")
        if folder.exists():
            folder.rename(old)
        pending.rename(folder)
    finally:
        shutil.rmtree(pending, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
