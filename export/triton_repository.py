"""A teacher file becomes a model that Triton loads: <repository>/<name>/<version>/model.onnx beside <repository>/<name>/config.pbtxt.

Unit of data: one version of one teacher. The configuration is Triton's own protobuf message, so a misspelt field cannot be written.

Crash safety. `config.pbtxt` names the one version that is served, and it is replaced by a rename after the version's folder is complete.
At any moment Triton sees the old version whole or the new one whole; folders that are not plain numbers it ignores. Whoever changes a
repository holds its lock, so what a crash left behind can be told from work in progress. `repository_versions.py` manages the versions.
"""

from __future__ import annotations

import contextlib
import copy
import os
import shutil
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from google.protobuf import text_format  # type: ignore[import-untyped]
from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelInstanceGroup, ModelQueuePolicy, ModelWarmup

from distill.config import validate
from distill.errors import BadInput, ConfigError, FingerprintMismatch
from distill.teacher_info import METADATA_KEY, TeacherInfo
from distill.wire import IMAGES, LOGITS, SOFT_LABELS, TEMPERATURE, TOP_IDS, TOP_LOGITS
from export.acceleration import accelerate
from export.files import write_atomically
from export.fingerprint import read_teacher_info, write_teacher_info
from export.large_models import sweep_weights
from export.parity_files import REPORT_FILE, report_of
from export.settings import RepositorySettings

WARMUP_TEMPERATURE = "temperature_one"
"""File in <name>/warmup: Triton's own zero_data would divide the logits by 0."""
_LEFTOVERS = (".pending", ".removed")


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
    config = model_config(info, settings)
    with changing(repository):
        sweep(folder)
        write_atomically(folder / "warmup" / WARMUP_TEMPERATURE, struct.pack("<f", 1.0))
        # Triton refuses a configuration whose version is not there, and would make one up where there is none: first the configuration.
        if not served.config.exists():
            write_config(folder, config)
        if not _holds(served.model, info, replace):
            put_version(model, info, served.model.parent)
        write_config(folder, config)
    return served


@contextlib.contextmanager
def changing(repository: Path) -> Iterator[None]:
    """One at a time: a second process that wants to change the repository waits. The kernel lets go of the lock of a process that died."""
    repository.mkdir(parents=True, exist_ok=True)
    if sys.platform == "win32":  # knows no locks on folders, and runs no Triton
        yield
        return
    import fcntl

    folder = os.open(repository, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def sweep(folder: Path) -> None:
    """Remove what a crash left half made in a model's folder. For holders of the lock."""
    for entry in folder.glob(".*"):
        if entry.suffix in _LEFTOVERS:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def read_config(folder: Path) -> ModelConfig | None:
    """The configuration of a model; None where it has none.

    Raises:
        BadInput: it is not Triton's.
    """
    path = folder / "config.pbtxt"
    try:
        return text_format.Parse(path.read_text(encoding="utf-8"), ModelConfig())
    except FileNotFoundError:
        return None
    except (text_format.ParseError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} is no Triton model configuration: {' '.join(str(error).split())[:200]}") from error


def write_config(folder: Path, config: ModelConfig) -> None:
    """Make `config` the model's configuration, in one step."""
    write_atomically(folder / "config.pbtxt", text_format.MessageToString(config).encode())


def config_for(info: TeacherInfo, current: ModelConfig) -> ModelConfig:
    """The configuration that serves `info` as `current` says a teacher is to be run: batching, queue, instances, threads, warm-up.

    Raises:
        ConfigError: `current` says something that no configuration of ours says.
    """
    warmup = tuple(entry.batch_size for entry in current.model_warmup)
    tree = {"max_batch_size": current.max_batch_size, "warmup_batch_sizes": warmup, **_acceleration_in(current)}
    settings = validate(RepositorySettings, tree, origin=f"config.pbtxt of {current.name!r}")
    config = model_config(info, settings)
    # TensorRT's engines and precision are this teacher's own; everything else of the optimisation stays.
    accelerators = copy.deepcopy(config.optimization.execution_accelerators)
    for field in ("dynamic_batching", "instance_group", "optimization"):
        config.ClearField(field)
    config.dynamic_batching.CopyFrom(current.dynamic_batching)
    config.instance_group.extend(current.instance_group)
    if current.HasField("optimization"):
        config.optimization.CopyFrom(current.optimization)
    if settings.acceleration != "none":
        config.optimization.execution_accelerators.CopyFrom(accelerators)
    for key, parameter in current.parameters.items():
        if key != METADATA_KEY:
            config.parameters[key].CopyFrom(parameter)
    return config


def _acceleration_in(config: ModelConfig) -> dict[str, Any]:
    """The fields of `RepositorySettings` that say how a GPU is used, out of a configuration of ours; empty where none is."""
    for accelerator in config.optimization.execution_accelerators.gpu_execution_accelerator:
        if accelerator.name == "tensorrt":
            names = {"tensorrt_workspace_bytes": "max_workspace_size_bytes", "tensorrt_cache": "trt_engine_cache_path"}
            given = {field: accelerator.parameters[name] for field, name in names.items() if name in accelerator.parameters}
            return {"instance_kind": "gpu", "acceleration": "tensorrt", **given}
    return {}


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
    if info.top_outputs is not None:
        config.output.add(name=TOP_IDS, data_type="TYPE_INT32", dims=[info.top_outputs])
        config.output.add(name=TOP_LOGITS, data_type="TYPE_FP32", dims=[info.top_outputs])
    config.version_policy.specific.versions.append(info.version)
    kinds = {"cpu": ModelInstanceGroup.KIND_CPU, "gpu": ModelInstanceGroup.KIND_GPU}
    config.instance_group.add(kind=kinds[settings.instance_kind], count=settings.instance_count)
    batching = config.dynamic_batching
    batching.preferred_batch_size.extend(sorted({size for size in settings.preferred_batch_sizes if size <= settings.max_batch_size}))
    batching.max_queue_delay_microseconds = settings.max_queue_delay_us
    # With one copy and any queue policy, Triton 2.51 lets up to a fifth of all requests wait half a second (measured): an idle copy is
    # noticed late. The bounds of the gateway and of the clients hold in any case.
    if settings.instance_count > 1:
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
    warmup = set(settings.warmup_batch_sizes)
    if settings.acceleration == "tensorrt":
        accelerate(config, info, settings)
        # The engine is built for the batch sizes seen so far, which takes minutes: it must see the largest before the first request.
        warmup.add(settings.max_batch_size)
    for batch_size in sorted(warmup):
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


def put_version(model: Path, info: TeacherInfo, folder: Path) -> None:
    """Write `model`, saying `info` of itself, into a folder that Triton ignores, then give that folder its number. For holders of the lock.

    A version that is there already gets the new file in one step: without its folder, Triton could not start.
    """
    if folder.exists():
        (folder / REPORT_FILE).unlink(missing_ok=True)  # it is about the old file
        write_teacher_info(model, info, folder / "model.onnx")
        _copy_parity(model, info, folder)
        sweep_weights(folder)
        return
    pending = folder.with_name(f".{folder.name}.{os.getpid()}.pending")
    try:
        write_teacher_info(model, info, pending / "model.onnx")
        _copy_parity(model, info, pending)
        pending.rename(folder)
    finally:
        shutil.rmtree(pending, ignore_errors=True)


def _copy_parity(model: Path, info: TeacherInfo, folder: Path) -> None:
    """Only a report about this teacher: beside a file, one of another may lie."""
    if (report := report_of(model, info.fingerprint)) is not None:
        write_atomically(folder / REPORT_FILE, report)
