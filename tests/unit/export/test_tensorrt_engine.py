"""How an engine is fed and read, with a GPU whose memory is this process's own and an engine that numpy computes."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from distill.errors import BadInput, DistillError
from export.tensorrt import BuildOptions, Profile, build_plan
from export.tensorrt_engine import EngineRunner

OPTIONS = BuildOptions(Profile(1, 2, 4), 4)
CROPS = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 3), np.uint8)
TEMPERATURE = np.array([[1], [2], [4]], np.float32)
DTYPES = {"images": np.uint8, "temperature": np.float32, "soft_labels": np.float32, "logits": np.float32, "top_ids": np.int32}


class Gpu:
    """CUDA's runtime over plain memory; `live` holds what is allocated."""

    cudaError_t = SimpleNamespace(cudaSuccess=0)
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice="in", cudaMemcpyDeviceToHost="out")

    def __init__(self) -> None:
        self.live: dict[int, Any] = {}

    def cudaGetDeviceProperties(self, number: int) -> tuple[int, Any]:  # noqa: N802
        return 0, SimpleNamespace(name=b"GPU 3000")

    def cudaStreamCreate(self) -> tuple[int, int]:  # noqa: N802
        return 0, 7

    def cudaStreamSynchronize(self, stream: int) -> tuple[int]:  # noqa: N802
        return (0 if stream == 7 else 1,)

    def cudaMalloc(self, size: int) -> tuple[int, int]:  # noqa: N802
        buffer = ctypes.create_string_buffer(size)
        self.live[ctypes.addressof(buffer)] = buffer
        return 0, ctypes.addressof(buffer)

    def cudaFree(self, pointer: int) -> tuple[int]:  # noqa: N802
        return (0 if self.live.pop(pointer, None) is not None else 1,)

    def cudaMemcpy(self, target: int, source: int, size: int, kind: str) -> tuple[int]:  # noqa: N802
        device = target if kind == "in" else source
        if len(self.live[device]) != size:
            return (1,)
        ctypes.memmove(target, source, size)
        return (0,)


class Engine:
    """logits = sum of the crop's channels, 3 classes; soft labels are the logits times the temperature, to be told apart."""

    num_io_tensors = len(DTYPES)

    def __init__(self) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.fails = False

    def create_execution_context(self) -> Engine:
        return self

    def get_tensor_name(self, number: int) -> str:
        return list(DTYPES)[number]

    def get_tensor_dtype(self, name: str) -> Any:
        return DTYPES[name]

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return shape[0] <= 4

    def get_tensor_shape(self, name: str) -> tuple[int, int]:
        return (self.shapes["images"][0], 2 if name == "top_ids" else 3)

    def set_tensor_address(self, name: str, address: int) -> None:
        self.addresses[name] = address

    def _at(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        size = int(np.prod(shape)) * np.dtype(DTYPES[name]).itemsize
        return np.frombuffer((ctypes.c_char * size).from_address(self.addresses[name]), DTYPES[name]).reshape(shape)

    def execute_async_v3(self, stream: int) -> bool:
        images, temperature = (self._at(name, self.shapes[name]) for name in ("images", "temperature"))
        sums_B3 = images.sum(axis=(1, 2)).astype(np.float32)
        self._at("logits", sums_B3.shape)[:] = sums_B3
        self._at("soft_labels", sums_B3.shape)[:] = sums_B3 * temperature
        self._at("top_ids", (len(images), 2))[:] = 5
        return not self.fails


def tensorrt_with(**members: Any) -> Any:
    logger = type("Logger", (), {"WARNING": 1, "__init__": lambda self, level: None})
    return SimpleNamespace(__version__="11.4.0", Logger=logger, nptype=lambda kind: kind, **members)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    gpu = Gpu()
    for name in ("cuda", "cuda.bindings"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(__path__=[]))
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", gpu)
    return gpu


@pytest.fixture
def opened(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> Callable[[Engine | None], EngineRunner]:
    def run(engine: Engine | None) -> EngineRunner:
        runtime = SimpleNamespace(deserialize_cuda_engine=lambda plan: engine)
        monkeypatch.setitem(sys.modules, "tensorrt", tensorrt_with(Runtime=lambda logger: runtime))
        return EngineRunner(b"plan", "model.plan")

    return run


def test_what_goes_in_comes_out_and_nothing_stays_allocated(opened, gpu: Gpu) -> None:
    runner = opened(Engine())
    assert runner.engine == "TensorRT 11.4.0, GPU 3000"
    for rows in (slice(0, 3), slice(1, 2)):  # another batch size, and crops that are a view of others
        logits_BK, soft_labels_BK = runner(CROPS[rows], TEMPERATURE[rows])
        expected = CROPS[rows].sum(axis=(1, 2)).astype(np.float32)
        np.testing.assert_array_equal(logits_BK, expected)
        np.testing.assert_array_equal(soft_labels_BK, expected * TEMPERATURE[rows])
        assert gpu.live == {}
    reversed_rows = CROPS[:, ::-1]
    np.testing.assert_array_equal(runner(reversed_rows, TEMPERATURE)[0], CROPS.sum(axis=(1, 2)))


def test_failures_are_ours_and_free_their_memory(opened, gpu: Gpu) -> None:
    with pytest.raises(BadInput, match=r"does not take images of shape \(6, 4, 4, 3\)"):
        opened(Engine())(np.concatenate([CROPS, CROPS]), np.ones((6, 1), np.float32))
    engine = Engine()
    engine.fails = True
    with pytest.raises(DistillError, match="TensorRT failed on 3 crops"):
        opened(engine)(CROPS, TEMPERATURE)
    assert gpu.live == {}
    with pytest.raises(DistillError, match=r"does not load model.plan: it was built by another version"):
        opened(None)


@pytest.mark.parametrize(
    ("parses", "plan", "said"),
    [(False, b"", r"cannot read .*m.onnx: In node 3: no such thing"), (True, None, r"cannot build .*m.onnx; its log above says why")],
)
def test_graphs_that_tensorrt_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parses: bool, plan: bytes | None, said: str) -> None:
    (tmp_path / "m.onnx").write_bytes(b"graph")
    with pytest.raises(DistillError, match=said):
        build_with(monkeypatch, parses, plan, tmp_path / "m.onnx", OPTIONS)


def test_a_build_keeps_what_it_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m.onnx").write_bytes(b"graph")
    options = BuildOptions(Profile(1, 2, 4), 4, timing_cache=tmp_path / "caches" / "gpu")
    assert build_with(monkeypatch, True, b"an engine", tmp_path / "m.onnx", options) == b"an engine"
    assert (tmp_path / "caches" / "gpu").read_bytes() == b"measured"


def build_with(monkeypatch: pytest.MonkeyPatch, parses: bool, plan: bytes | None, source: Path, options: BuildOptions) -> bytes:
    class Told:
        """A builder, its configuration and its profile: all calls are taken; the timing cache has something in it."""

        def __getattr__(self, name: str) -> Any:
            answers = {"serialize": b"measured", "build_serialized_network": plan}
            return lambda *arguments, **named: answers.get(name, self)

    def parse(content: bytes, path: str) -> bool:
        assert (content, path) == (b"graph", str(source))
        return parses

    parser = SimpleNamespace(parse=parse, num_errors=1, get_error=lambda number: "In node 3: no such thing")
    trt = tensorrt_with(
        Builder=lambda logger: Told(),
        OnnxParser=lambda network, logger: parser,
        NetworkDefinitionCreationFlag=SimpleNamespace(STRONGLY_TYPED=1),
        BuilderFlag=SimpleNamespace(TF32=7),
        MemoryPoolType=SimpleNamespace(WORKSPACE=0),
    )
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    return build_plan(source, options)
