"""Where an engine's teacher comes from and where the engine goes: two models side by side in one repository.

    <repository>/teacher/{config.pbtxt, 3/model.onnx} -> <repository>/teacher-tensorrt/{config.pbtxt, 3/model.plan, 3/model.plan.json}

Unit of data: one version of one teacher. The engine's labels are those of the graph within the limits of its precision, so it bears the
graph's fingerprint. An engine that fails the gate is not written.
"""

from __future__ import annotations

import argparse
import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
from google.protobuf import text_format  # type: ignore[import-untyped]
from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelInstanceGroup

from distill.config import validate
from distill.errors import ConfigError, StageMissing
from distill.teacher_info import METADATA_KEY, TeacherInfo
from export.files import first_line, write_atomically
from export.label_space import Crops, Logits
from export.parity import ParityReport, check_parity, require_parity
from export.parity_images import parity_crops
from export.runners import OnnxRunner, Runner
from export.sessions import open_session
from export.settings import PARITY_OF, Precision
from export.tensorrt import CARD_FILE, PLAN_FILE, BuildOptions, EngineCard, build_plan, profile_of, require_package, sha256_of
from export.tensorrt_engine import EngineRunner, gpu_name

_WARMUP = Path("warmup") / "temperature_one"
_BATCH = 64

Build = Callable[[Path, BuildOptions], bytes]
Open = Callable[[bytes, str], Runner]


def build_into_repository(parsed: argparse.Namespace) -> Path:
    """Build the engine that the command line asks for; the folder of its version.

    Raises:
        StageMissing: no such model or version.
        ConfigError: no `tensorrt`, or a configuration that is not Triton's.
        ParityError: the engine does not say what the graph says.
        DistillError: TensorRT failed.
    """
    trt = require_package("tensorrt", "pip install tensorrt, in the version of Triton's image")
    gpu = gpu_name(require_package("cuda.bindings.runtime", "pip install cuda-python"))
    config = read_config(parsed.repository / parsed.model)
    version = parsed.version or info_of(config, parsed.model).version
    source = parsed.repository / parsed.model / str(version) / "model.onnx"
    if not source.is_file():
        raise StageMissing(f"{source} does not exist; make it with `distill export-teacher`")
    info = info_in(source)  # the configuration tells of the served version only
    crops, names = parity_crops(parsed.images, info.preprocessing, parsed.num_images)
    options = BuildOptions(
        profile=profile_of(config.max_batch_size, list(config.dynamic_batching.preferred_batch_size)),
        image_size=info.preprocessing.image_size,
        precision=parsed.precision,
        workspace_bytes=parsed.workspace_mib * 2**20,
        timing_cache=parsed.timing_cache,
    )
    target = parsed.repository / (parsed.name or f"{parsed.model}-tensorrt")
    return place_engine(source, target, config, info, options, crops, names, failed=parsed.report, versions=(str(trt.__version__), gpu))


def place_engine(
    source: Path,
    target: Path,
    config: ModelConfig,
    info: TeacherInfo,
    options: BuildOptions,
    crops_NHWC: Crops,
    image_ids: list[str],
    *,
    failed: Path,
    versions: tuple[str, str],
    build: Build = build_plan,
    open_engine: Open = EngineRunner,
) -> Path:
    """Build an engine, compare it with its graph, and put it into the repository as a model of its own.

    Args:
        source: the ONNX file.
        target: folder of the engine's model.
        config: of the teacher's model.
        info: who the teacher is.
        options: of the build.
        crops_NHWC: uint8 [N,S,S,3], real crops for the gate.
        image_ids: N names.
        failed: where the report of an engine that fails the gate is written; not in the repository.
        versions: of TensorRT, and name of the GPU, for the card.
        build: makes the engine.
        open_engine: runs it.

    Raises:
        ParityError, DistillError: see `build_into_repository`; nothing is written into the repository.
    """
    folder = target / source.parent.name
    plan = build(source, options)
    report = check_engine(open_engine(plan, PLAN_FILE), source, info, options, crops_NHWC, image_ids)
    # A folder in the repository is a model to Triton, so a failed engine's report stands elsewhere.
    require_parity(report, folder if report.passed else failed, f"engine of {source}", crops_NHWC)
    write_atomically(folder / PLAN_FILE, plan)
    card = EngineCard(
        fingerprint=info.fingerprint,
        source_sha256=sha256_of(source),
        plan_sha256=sha256_of(folder / PLAN_FILE),
        tensorrt=versions[0],
        gpu=versions[1],
        precision=options.precision,
        batch_sizes=tuple(options.profile),
        workspace_bytes=options.workspace_bytes,
    )
    write_atomically(folder / CARD_FILE, (card.model_dump_json(indent=2) + "\n").encode())
    write_atomically(target / _WARMUP, struct.pack("<f", 1.0))
    version = int(source.parent.name)
    write_atomically(target / "config.pbtxt", text_format.MessageToString(plan_config(config, info, target.name, version)).encode())
    return folder


def check_engine(
    engine: Runner, source: Path, info: TeacherInfo, options: BuildOptions, crops_NHWC: Crops, image_ids: list[str]
) -> ParityReport:
    """The parity gate of an engine against the graph that it was built from, in ONNX Runtime on the CPU.

    Raises:
        BadInput: one of them does not take the crops.
    """
    graph = OnnxRunner.of_file(source)

    def reference(crops_BHWC: Crops) -> Logits:
        return graph(crops_BHWC, np.ones((len(crops_BHWC), 1), np.float32))[0]

    precision: Precision = info.precision if options.precision == "graph" else options.precision
    batch_size = min(_BATCH, options.profile.largest)
    report = check_parity(reference, engine, crops_NHWC, image_ids, PARITY_OF[precision], batch_size=batch_size)
    return report.replace(precision=precision)


def read_config(folder: Path) -> ModelConfig:
    """The configuration of a model in the repository.

    Raises:
        StageMissing: there is none.
        ConfigError: it is not Triton's.
    """
    path = folder / "config.pbtxt"
    try:
        return text_format.Parse(path.read_text(encoding="utf-8"), ModelConfig())
    except FileNotFoundError as error:
        raise StageMissing(f"{path} does not exist; make the teacher with `distill export-teacher`") from error
    except (text_format.ParseError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no Triton model configuration: {first_line(error)}") from error


def info_of(config: ModelConfig, model: str) -> TeacherInfo:
    """Who the served teacher is.

    Raises:
        ConfigError: the model is no teacher of ours.
    """
    if METADATA_KEY not in config.parameters:
        raise ConfigError(f"model {model!r} is no teacher of ours: its configuration has no {METADATA_KEY}")
    return validate(TeacherInfo, json.loads(config.parameters[METADATA_KEY].string_value), origin=f"model {model!r}")


def info_in(source: Path) -> TeacherInfo:
    """Who the teacher in a file is, read by ONNX Runtime.

    Raises:
        BadInput: no ONNX model.
        ConfigError: one that is no teacher of ours.
    """
    stamped = open_session(source).get_modelmeta().custom_metadata_map.get(METADATA_KEY)
    if stamped is None:
        raise ConfigError(f"{source} is no teacher of ours: it has no {METADATA_KEY}")
    return validate(TeacherInfo, json.loads(stamped), origin=str(source))


def plan_config(config: ModelConfig, info: TeacherInfo, name: str, version: int) -> ModelConfig:
    """The configuration that serves the engine as the teacher was served: same tensors, batching, queue and warm-up, on the GPU."""
    plan = ModelConfig()
    plan.CopyFrom(config)
    plan.name, plan.backend, plan.platform, plan.default_model_filename = name, "tensorrt", "", PLAN_FILE
    plan.ClearField("optimization")
    plan.ClearField("parameters")  # threads and the like, of ONNX Runtime
    plan.parameters[METADATA_KEY].string_value = info.replace(name=name, version=version).model_dump_json()
    for group in plan.instance_group:
        group.kind = ModelInstanceGroup.KIND_GPU
    plan.version_policy.Clear()
    plan.version_policy.specific.versions.append(version)
    return plan
