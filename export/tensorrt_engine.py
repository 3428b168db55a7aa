"""A TensorRT engine as the parity gate sees it: crops and temperatures in, logits and soft labels out.

Unit of data: one batch of crops. Needs a GPU, `tensorrt` and `cuda-python`; both are imported when an engine is opened.
Shapes: B crops, H W pixels, K classes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from distill.errors import BadInput, DistillError
from distill.wire import IMAGES, LOGITS, SOFT_LABELS, TEMPERATURE
from export.label_space import Crops, Logits
from export.tensorrt import require_package


class EngineRunner:
    """A `Runner` (export/runners.py) over one engine on the first GPU."""

    gives_soft_labels = True

    def __init__(self, plan: bytes, name: str) -> None:
        """Raises ConfigError without the packages, DistillError where TensorRT refuses the engine."""
        trt = require_package("tensorrt", "pip install tensorrt, in the version of Triton's image")
        self._cuda = require_package("cuda.bindings.runtime", "pip install cuda-python")
        self._trt = trt
        self._engine = trt.Runtime(trt.Logger(trt.Logger.WARNING)).deserialize_cuda_engine(plan)
        if self._engine is None:
            raise DistillError(f"TensorRT {trt.__version__} does not load {name}: it was built by another version, or for another GPU")
        self._context = self._engine.create_execution_context()
        self._stream = self._checked(self._cuda.cudaStreamCreate())
        self.name = name
        self.engine = f"TensorRT {trt.__version__}, {gpu_name(self._cuda)}"

    @classmethod
    def of_file(cls, path: Path) -> EngineRunner:
        """Raises as the constructor."""
        return cls(path.read_bytes(), path.name)

    def __call__(self, crops_BHWC: Crops, temperature_B1: Logits) -> tuple[Logits, Logits | None]:
        """See Runner."""
        given: dict[str, npt.NDArray[Any]] = {IMAGES: crops_BHWC, TEMPERATURE: temperature_B1.astype(np.float32)}
        for name, array in given.items():
            if not self._context.set_input_shape(name, array.shape):
                raise BadInput(f"the engine does not take {name} of shape {array.shape}: it was built for other batches or crops")
        pointers: dict[str, int] = {}
        try:
            answers = self._run(given, pointers)
        finally:
            for pointer in pointers.values():
                self._checked(self._cuda.cudaFree(pointer))
        return answers[LOGITS], answers[SOFT_LABELS]

    def _run(self, given: dict[str, npt.NDArray[Any]], pointers: dict[str, int]) -> dict[str, npt.NDArray[Any]]:
        """Copy in, run, copy out. Whatever is allocated is noted in `pointers`."""
        kinds = self._cuda.cudaMemcpyKind
        answers: dict[str, npt.NDArray[Any]] = {}
        for number in range(self._engine.num_io_tensors):
            name = self._engine.get_tensor_name(number)
            array = np.ascontiguousarray(given[name]) if name in given else self._empty(name)
            pointers[name] = self._checked(self._cuda.cudaMalloc(array.nbytes))
            self._context.set_tensor_address(name, pointers[name])
            if name in given:
                self._checked(self._cuda.cudaMemcpy(pointers[name], array.ctypes.data, array.nbytes, kinds.cudaMemcpyHostToDevice))
            else:
                answers[name] = array
        if not self._context.execute_async_v3(int(self._stream)):
            raise DistillError(f"TensorRT failed on {len(given[IMAGES])} crops; its log above says why")
        self._checked(self._cuda.cudaStreamSynchronize(self._stream))
        for name, array in answers.items():
            self._checked(self._cuda.cudaMemcpy(array.ctypes.data, pointers[name], array.nbytes, kinds.cudaMemcpyDeviceToHost))
        return answers

    def _empty(self, name: str) -> npt.NDArray[Any]:
        """An array of an output's shape, which is known once the inputs have theirs."""
        return np.empty(tuple(self._context.get_tensor_shape(name)), self._trt.nptype(self._engine.get_tensor_dtype(name)))

    def _checked(self, result: tuple[Any, ...]) -> Any:
        return checked(self._cuda, result)


def checked(cuda: Any, result: tuple[Any, ...]) -> Any:
    """What a call of the CUDA runtime gives beside its status.

    Raises:
        DistillError: the status is an error.
    """
    status, *values = result
    if status != cuda.cudaError_t.cudaSuccess:
        raise DistillError(f"CUDA: {getattr(status, 'name', status)}")
    return values[0] if values else None


def gpu_name(cuda: Any) -> str:
    """Name of the first GPU."""
    name = checked(cuda, cuda.cudaGetDeviceProperties(0)).name
    return (name.decode(errors="replace") if isinstance(name, bytes) else str(name)).rstrip("\0")
