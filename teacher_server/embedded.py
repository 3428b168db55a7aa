"""The teacher inside this process: ONNX Runtime on the same model repository that Triton would load.

Flow: crops -> one ONNX Runtime call at a time, in a thread of its own -> soft labels. For machines without a Triton binary (macOS,
Windows), for one command without a server, and as the oracle that Triton is tested against.
Unit of data: one batch of crops. Shapes: B images, H W C pixels, K classes.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from distill.errors import RequestRefused, StageMissing, TeacherAnswerError, TeacherUnavailable
from distill.teacher_info import METADATA_KEY, TeacherInfo
from distill.wire import IMAGES, LOGITS, SOFT_LABELS, TEMPERATURE, TOP_IDS, TOP_LOGITS
from teacher_server.backend import CheckedTeacher, Crops, Floats, parse_info
from teacher_server.model_repository import served_model
from teacher_server.settings import EmbeddedDevice

CUDA = "CUDAExecutionProvider"
CPU = "CPUExecutionProvider"
_QUIET = 3  # errors only: ONNX Runtime warns of every initializer it folds away

logger = logging.getLogger(__name__)


class Engine:
    """One ONNX Runtime session and the one thread that calls it. Clients in several event loops may share it."""

    def __init__(self, model: Path, *, device: EmbeddedDevice = "auto", num_threads: int = 0, max_batch_size: int = 256) -> None:
        """`num_threads` 0 lets ONNX Runtime decide; batches above `max_batch_size` are split to bound memory.

        Raises:
            StageMissing: there is no such file.
            RequestRefused: the file is no teacher graph, or the device asked for is not the one that would compute.
        """
        if not model.is_file():
            raise StageMissing(f"there is no teacher at {model}; make it with `distill export-teacher`")
        self.max_batch_size = max_batch_size
        self._session = _session(model, device, num_threads)
        self.info = _read_info(self._session, model)
        # One call at a time: ONNX Runtime already uses every core for one batch, two at once only share caches.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="teacher-engine")

    async def run(self, crops_BHWC: Crops, temperature_B1: Floats, names: tuple[str, ...]) -> dict[str, Floats]:
        """The named tensors; a call still waiting for its turn is cancelled with its task."""
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._thread, self._run, crops_BHWC, temperature_B1, names)
        except RuntimeError as error:
            if "shutdown" not in str(error):
                raise
            raise TeacherUnavailable(f"the embedded teacher {self.info.name} was closed") from error

    def close(self) -> None:
        """End the thread after the call in progress; waiting calls are dropped."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _run(self, crops_BHWC: Crops, temperature_B1: Floats, names: tuple[str, ...]) -> dict[str, Floats]:
        num_parts = -(-len(crops_BHWC) // self.max_batch_size)
        parts = []
        for crops, temperature in zip(np.array_split(crops_BHWC, num_parts), np.array_split(temperature_B1, num_parts), strict=True):
            try:
                parts.append(self._session.run(list(names), {IMAGES: crops, TEMPERATURE: temperature}))
            except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
                raise TeacherAnswerError(f"ONNX Runtime failed on {len(crops)} crops: {' '.join(str(error).split())}") from error
        return {name: np.concatenate([part[position] for part in parts]) for position, name in enumerate(names)}


class EmbeddedTeacher(CheckedTeacher):
    """TeacherBackend over an `Engine`, which it closes only if it owns it."""

    carries_top_outputs = True

    def __init__(self, engine: Engine, *, owns_engine: bool = True) -> None:
        super().__init__()
        self._engine = engine
        self._owns_engine = owns_engine

    @classmethod
    def from_repository(cls, repository: Path, name: str, *, device: EmbeddedDevice = "auto", num_threads: int = 0) -> EmbeddedTeacher:
        """The served version of a model in a Triton model repository. Raises as `Engine` does."""
        return cls(Engine(served_model(repository, name), device=device, num_threads=num_threads))

    async def _load_info(self) -> TeacherInfo:
        return self._engine.info

    async def _infer(self, crops_BHWC: Crops, temperature_B1: Floats, names: tuple[str, ...]) -> dict[str, Floats]:
        return await self._engine.run(crops_BHWC, temperature_B1, names)

    async def close(self) -> None:
        """See TeacherBackend."""
        if self._owns_engine:
            await asyncio.to_thread(self._engine.close)


def _session(model: Path, device: EmbeddedDevice, num_threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.log_severity_level = _QUIET
    # Idle threads must not spin: decoding and training run on the same cores.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    providers = _providers(device)
    try:
        with _said_to_the_log():
            session = onnxruntime.InferenceSession(str(model), options, providers=providers)
    except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
        raise RequestRefused(f"{model} cannot be loaded: {' '.join(str(error).split())}") from error
    wanted, runs_on = providers[0][0], session.get_providers()[0]  # without a working driver ONNX Runtime takes the CPU, and raises nothing
    if wanted != runs_on:
        why = f"ONNX Runtime would run on {runs_on}; check the driver and CUDA's libraries"
        if device == "cuda":
            raise RequestRefused(f"{wanted} was asked for, but {why}")
        logger.warning("the embedded teacher could use %s, but %s, or say server.embedded_device=cpu", wanted, why)
    session.disable_fallback()  # nor may it change over later, in the middle of its answers
    return session


def _providers(device: EmbeddedDevice) -> list[tuple[str, dict[str, Any]]]:
    """ONNX Runtime's names of what may compute, the preferred one first."""
    known = onnxruntime.get_available_providers()
    if device == "cuda" and CUDA not in known:
        raise RequestRefused(f"this onnxruntime has no {CUDA}, it has {', '.join(known)}; install the extra `gpu` for CUDA")
    if device == "cpu" or CUDA not in known:
        return [(CPU, {})]
    with _said_to_the_log():
        onnxruntime.preload_dlls()  # CUDA's libraries out of the packages that torch brought
    # TF32 rounds the factors of a product to 10 bits: not the fp32 that the parity gate passed. By its own choice ONNX Runtime would
    # try out every algorithm for every new size of a batch, and take memory in powers of two, though others compute on the GPU as well.
    options = {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC", "arena_extend_strategy": "kSameAsRequested"}
    return [(CUDA, options), (CPU, {})]


@contextlib.contextmanager
def _said_to_the_log() -> Iterator[None]:
    """ONNX Runtime prints what is wrong with CUDA to the standard output, which may be somebody's JSON."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            yield
    finally:
        for line in filter(None, map(str.strip, said.getvalue().splitlines())):
            logger.info("ONNX Runtime: %s", line)


def _read_info(session: onnxruntime.InferenceSession, model: Path) -> TeacherInfo:
    inputs = {entry.name for entry in session.get_inputs()}
    outputs = {entry.name for entry in session.get_outputs()}
    if inputs != {IMAGES, TEMPERATURE} or not {LOGITS, SOFT_LABELS} <= outputs:
        raise RequestRefused(f"{model} is no teacher graph: inputs {sorted(inputs)}, outputs {sorted(outputs)}")
    text = session.get_modelmeta().custom_metadata_map.get(METADATA_KEY)
    if text is None:
        raise RequestRefused(f"{model} does not say which teacher it is (no {METADATA_KEY}); make it with `distill export-teacher`")
    info = parse_info(text, origin=str(model))
    if info.top_outputs is not None and not {TOP_IDS, TOP_LOGITS} <= outputs:
        raise RequestRefused(f"{model} says that it gives {info.top_outputs} top outputs, but its outputs are {sorted(outputs)}")
    return info
