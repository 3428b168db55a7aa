"""teacher in a model repository -> TensorRT engine beside it, through the same parity gate. Runs where the GPU is: inside Triton's image.

    python -m export.tensorrt --repository models --model teacher --images 'photos/*.jpg'

Unit of data: one version of one teacher. The engine is built in the precision that the ONNX graph was exported in (a strongly typed
network: TensorRT may not choose a lower one), so what passed the gate in ONNX Runtime is what is built. An engine fits one version of
TensorRT and one kind of GPU only. Neither torch nor onnx is imported, and `tensorrt` and `cuda-python` only when an engine is built; beside
them it needs numpy, onnxruntime, pydantic, pyyaml, pillow, simplejpeg, fsspec, and tritonclient[grpc].
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from distill.config import Section
from distill.errors import ConfigError, DistillError, StageMissing
from distill.wire import IMAGES, TEMPERATURE
from export.files import first_line, write_atomically

PLAN_FILE = "model.plan"
CARD_FILE = "model.plan.json"

EnginePrecision = Literal["graph", "fp16", "int8"]

_log = logging.getLogger(__name__)


class Profile(NamedTuple):
    """Batch sizes that an engine takes, and the one that it is tuned for."""

    smallest: int
    best: int
    largest: int


def profile_of(max_batch_size: int, preferred: Sequence[int]) -> Profile:
    """Every batch that Triton may form; tuned for the largest that its batcher prefers, else for the largest of all.

    Raises:
        ConfigError: batch sizes below 1.
    """
    if max_batch_size < 1 or min(preferred, default=1) < 1:
        raise ConfigError(f"batch sizes are at least 1, got max_batch_size {max_batch_size} and preferred {list(preferred)}")
    return Profile(1, max([size for size in preferred if size <= max_batch_size], default=max_batch_size), max_batch_size)


@dataclass(frozen=True)
class BuildOptions:
    """How an engine is built."""

    profile: Profile
    image_size: int
    """Height and width of the crops that travel."""
    precision: EnginePrecision = "graph"
    """`graph`: the types of the ONNX graph, and no lower. `fp16`, `int8`: TensorRT may also choose those (before version 11 only)."""
    workspace_bytes: int = 4 * 2**30
    """GPU memory that TensorRT may use."""
    timing_cache: Path | None = None
    """File that keeps what was measured on this kind of GPU; read if it is there, written afterwards."""


class EngineCard(Section):
    """What an engine was built from and for; `model.plan.json` beside the engine."""

    fingerprint: str
    """Of the teacher."""
    source_sha256: str
    """Of the ONNX file."""
    plan_sha256: str
    """Of the engine."""
    tensorrt: str
    """Version that built it, the only one that loads it."""
    gpu: str
    """Name of the GPU that it was tuned on."""
    precision: EnginePrecision
    """See BuildOptions."""
    batch_sizes: tuple[int, int, int]
    """Smallest, best, largest."""
    workspace_bytes: int
    """See BuildOptions."""


def build_plan(source: Path, options: BuildOptions) -> bytes:
    """Build the engine of an ONNX teacher graph, for the GPU of this machine. Takes minutes.

    Raises:
        StageMissing: there is no such file.
        ConfigError: no `tensorrt` package, or a precision that this TensorRT cannot be given.
        DistillError: TensorRT cannot read or build the graph; its first error.
    """
    if not source.is_file():
        raise StageMissing(f"{source} does not exist; make it with `distill export-teacher`")
    trt = require_package("tensorrt", "pip install tensorrt, in the version of Triton's image")
    builder = trt.Builder(trt.Logger(trt.Logger.WARNING))
    network = builder.create_network(network_flags(trt, options.precision))
    parser = trt.OnnxParser(network, trt.Logger(trt.Logger.WARNING))
    if not parser.parse(source.read_bytes(), str(source)):  # the path: large models have a second file beside it
        errors = [str(parser.get_error(number)) for number in range(parser.num_errors)]
        raise DistillError(f"TensorRT {trt.__version__} cannot read {source}: {errors[0] if errors else 'it does not say why'}")
    config = builder_config(trt, builder, options)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise DistillError(f"TensorRT {trt.__version__} cannot build {source}; its log above says why")
    if options.timing_cache is not None:
        write_atomically(options.timing_cache, bytes(config.get_timing_cache().serialize()))
    return bytes(plan)


def network_flags(trt: Any, precision: EnginePrecision) -> int:
    """Flags of the network: strongly typed unless TensorRT is to choose the precision.

    Raises:
        ConfigError: since version 11 it never chooses.
    """
    if precision == "graph":
        flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        return 0 if flag is None else 1 << int(flag)
    if not hasattr(trt.BuilderFlag, precision.upper()):
        raise ConfigError(
            f"TensorRT {trt.__version__} takes the precision from the graph, so --precision {precision} cannot be given:"
            f" export the teacher with teacher.precision={precision}"
        )
    return 0


def builder_config(trt: Any, builder: Any, options: BuildOptions) -> Any:
    """TensorRT's configuration of one build: profile, memory, precision flags, timing cache."""
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_bytes)
    if hasattr(trt.BuilderFlag, "TF32"):
        config.clear_flag(trt.BuilderFlag.TF32)  # on by default: fp32 products with 10 bits of mantissa, as wrong as fp16
    if options.precision != "graph":
        config.set_flag(getattr(trt.BuilderFlag, options.precision.upper()))
    profile = builder.create_optimization_profile()
    size = options.image_size
    for name, shape in ((IMAGES, (size, size, 3)), (TEMPERATURE, (1,))):
        profile.set_shape(name, *((batch, *shape) for batch in options.profile))
    config.add_optimization_profile(profile)
    if options.timing_cache is not None:
        kept = options.timing_cache.read_bytes() if options.timing_cache.is_file() else b""
        config.set_timing_cache(config.create_timing_cache(kept), ignore_mismatch=False)
    return config


def require_package(name: str, way_out: str) -> Any:
    """A package that only machines with a GPU have.

    Raises:
        ConfigError: it is not installed.
    """
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(f"{name} cannot be imported here ({first_line(error)}): {way_out}") from error


def sha256_of(path: Path) -> str:
    """sha256 (hex) of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m export.tensorrt", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repository", type=Path, required=True, help="Triton's model repository")
    parser.add_argument("--model", required=True, help="the teacher in it")
    parser.add_argument("--version", type=int, help="default: the version that is served")
    parser.add_argument("--name", help="the engine's model in the repository; default: MODEL-tensorrt")
    parser.add_argument("--images", required=True, help="real images for the parity gate: 'photos/*.jpg' (quoted), or a folder")
    parser.add_argument("--num-images", type=int, default=256, help="images that are compared")
    parser.add_argument(
        "--precision",
        choices=("graph", "fp16", "int8"),
        default="graph",
        help="graph (default): the types of the exported graph; others let TensorRT choose lower ones, before version 11 only",
    )
    parser.add_argument("--workspace-mib", type=int, default=4096, help="GPU memory that TensorRT may use while it builds")
    parser.add_argument("--report", type=Path, default=Path("tensorrt-parity"), help="folder for the report of an engine that fails")
    parser.add_argument("--timing-cache", type=Path, help="file that makes the next build on this kind of GPU fast")
    parsed = parser.parse_args(arguments)
    for name in ("num_images", "workspace_mib"):
        if getattr(parsed, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is at least 1")
    return parsed


def main(arguments: Sequence[str]) -> int:
    """The program; its exit code is 0, or that of the error, whose line it writes."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parsed = parse_arguments(arguments)
    try:
        from export.tensorrt_model import build_into_repository

        folder = build_into_repository(parsed)
    except DistillError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    _log.info("engine in %s; serve it as model %s", folder, folder.parent.name)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
