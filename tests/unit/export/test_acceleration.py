"""What TensorRT in Triton is told, read back with Triton's own parser."""

from __future__ import annotations

import pytest
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from distill.config import validate
from distill.errors import ConfigError
from export.settings import RepositorySettings, TeacherExportSettings
from export.triton_repository import model_config

GPU = RepositorySettings(
    instance_kind="gpu", acceleration="tensorrt", max_batch_size=96, tensorrt_workspace_bytes=2**30, tensorrt_cache="/cache/engines"
)


@pytest.mark.parametrize(("precision", "mode"), [("fp32", "FP32"), ("fp16", "FP16"), ("int8", "INT8")])
def test_tensorrt_may_use_the_precision_that_passed_the_gate(stamped, precision: str, mode: str) -> None:
    _, info = stamped
    text = text_format.MessageToString(model_config(info.replace(precision=precision), GPU))
    (accelerator,) = text_format.Parse(text, ModelConfig()).optimization.execution_accelerators.gpu_execution_accelerator
    assert accelerator.name == "tensorrt"
    assert dict(accelerator.parameters) == {
        "precision_mode": mode,
        "max_workspace_size_bytes": "1073741824",
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": "/cache/engines",
        "trt_engine_cache_prefix": info.fingerprint[:16],
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": "/cache/engines",
    }


def test_the_engine_is_built_for_the_largest_batch_before_the_first_request(stamped) -> None:
    config = model_config(stamped[1], GPU)
    assert [warmup.batch_size for warmup in config.model_warmup] == [1, 96]


def test_without_it_nothing_is_said(stamped) -> None:
    assert not model_config(stamped[1], RepositorySettings(instance_kind="gpu")).HasField("optimization")


def test_without_a_gpu_it_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="acceleration: tensorrt needs instance_kind: gpu"):
        validate(TeacherExportSettings, {"repository": {"acceleration": "tensorrt"}}, "run.yaml")
    with pytest.raises(ConfigError, match="tensorrt_cache"):
        validate(RepositorySettings, {"tensorrt_cache": "relative"}, "run.yaml")
