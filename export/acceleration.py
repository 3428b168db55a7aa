"""How Triton's ONNX Runtime hands a teacher to TensorRT: the `execution_accelerators` of its configuration.

Unit of data: one configuration. The names are those of Triton's C++ onnxruntime backend (`src/onnxruntime.cc`); its python stand-in on
machines without a GPU does not read them.
"""

from __future__ import annotations

from typing import Any

from distill.teacher_info import TeacherInfo
from export.settings import RepositorySettings

_MODES = {"fp32": "FP32", "fp16": "FP16", "int8": "INT8"}


def accelerate(config: Any, info: TeacherInfo, settings: RepositorySettings) -> None:
    """Add TensorRT to a Triton `ModelConfig`, in place.

    TensorRT may use the precision that the graph was exported in and passed the parity gate with, and no lower one.
    """
    parameters = {
        "precision_mode": _MODES[info.precision],
        "max_workspace_size_bytes": str(settings.tensorrt_workspace_bytes),
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": settings.tensorrt_cache,
        # Engines of two teachers, or of two versions of one, must not be taken for each other.
        "trt_engine_cache_prefix": info.fingerprint[:16],
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": settings.tensorrt_cache,
    }
    accelerator = config.optimization.execution_accelerators.gpu_execution_accelerator.add(name="tensorrt")
    for key, value in parameters.items():
        accelerator.parameters[key] = value
