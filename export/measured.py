"""A file of a student and what is measured on it, in its own runtime.

Flow: files on disk -> logits on the test crops, latencies by turns, peak memory -> one `EdgeFile` each, not yet judged.
Unit of data: one file. Shapes: N crops, H W pixels, K classes.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx

from distill.errors import DistillError
from distill.machine import available_cores
from export.edge import EdgeFile, Kind
from export.files import sha256_of
from export.label_space import Crops, Logits, kl_divergence
from export.latency import Latency, measure_latency
from export.memory import peak_memory_bytes
from export.quantize import int8_weight_share, weight_share
from export.runtimes.runtime import Predict, RuntimeName, load_runtime
from export.settings import StudentExportSettings

_log = logging.getLogger(__name__)

Labels = npt.NDArray[np.integer]
EVALUATION_BATCH = 64
NO_CLASS = -2
"""In the place of a class id where there is no answer; no label is that."""


@dataclass(frozen=True)
class MadeFile:
    """A file that lies on the disk, and what its maker knows of it."""

    kind: Kind
    path: Path
    runtime: RuntimeName = "onnxruntime"
    beside: tuple[Path, ...] = ()
    """Further files that belong to it."""
    kept_in_float: tuple[str, ...] = ()
    training_steps: int = 0
    weight_shares: tuple[float, float] | None = None
    """Shares of int8 and of half precision among its weights, where it is no ONNX file."""

    @property
    def size_bytes(self) -> int:
        """Of all its parts."""
        return sum(part.stat().st_size for part in (self.path, *self.beside))

    def shares(self) -> tuple[float, float]:
        """Shares of int8 and of half precision among its weights."""
        if self.weight_shares is not None:
            return self.weight_shares
        return int8_weight_share(self.path), weight_share(self.path, onnx.TensorProto.FLOAT16)

    def open(self, num_threads: int) -> Predict:
        """In its runtime."""
        return load_runtime(self.runtime).open_file(self.path, num_threads)


@dataclass(frozen=True)
class TestSet:
    """What quality is measured on."""

    __test__ = False  # for pytest, which takes the name for its own

    crops: Crops
    labels: Labels | None
    fp32_logits: Logits = field(repr=False)
    """[N,K], of the ONNX fp32 file."""

    def quality(self, logits_NK: Logits) -> dict[str, float | int | None]:
        """Accuracy, agreement and KL, named as in `EdgeFile`, which also says what becomes of logits that are infinite or no numbers."""
        answered_N = np.asarray(np.isfinite(logits_NK).all(axis=1))
        logits_NK = np.where(answered_N[:, None], logits_NK, 0)
        classes_N = np.where(answered_N, logits_NK.argmax(axis=1), NO_CLASS)
        return {
            "num_images": len(logits_NK),
            "num_without_answer": int((~answered_N).sum()),
            "top1": None if self.labels is None else float((classes_N == self.labels).mean()),
            "agreement": float((classes_N == self.fp32_logits.argmax(axis=1)).mean()),
            "kl": float(kl_divergence(self.fp32_logits, logits_NK).mean()),
        }


def logits_of(predict: Predict, crops_NHWC: Crops, name: str) -> Logits:
    """Logits [N,K] of all crops.

    Raises:
        DistillError: NaN or infinite logits.
    """
    logits_NK = answers_of(predict, crops_NHWC)
    if not np.isfinite(logits_NK).all():
        raise DistillError(f"{name} gives NaN or infinite logits on {int((~np.isfinite(logits_NK)).any(axis=1).sum())} test crops")
    return logits_NK


def answers_of(predict: Predict, crops_NHWC: Crops) -> Logits:
    """Logits [N,K] of all crops, also those that are infinite or no numbers."""
    batches = [crops_NHWC[start : start + EVALUATION_BATCH] for start in range(0, len(crops_NHWC), EVALUATION_BATCH)]
    return np.concatenate([predict(batch) for batch in batches])


def measure_files(student: str, files: Sequence[MadeFile], tests: TestSet, settings: StudentExportSettings) -> list[EdgeFile]:
    """Everything that `EdgeFile` has, of each file; all of them count as shipped until somebody judges them.

    Args:
        files: the ONNX fp32 file first.
    """
    rounds, repeats = settings.latency_rounds, settings.latency_repeats
    crop_1HWC = tests.crops[:1]
    on_one = {file.path.name: file.open(num_threads=1) for file in files}
    quality = {name: tests.quality(answers_of(predict, tests.crops)) for name, predict in on_one.items()}
    one = measure_latency(on_one, crop_1HWC, rounds, repeats)
    del on_one
    # One file after the other: threads of a file that waits its turn spin, on the cores of the one that is measured.
    all_cores = {
        file.path.name: measure_latency({"": file.open(num_threads=available_cores())}, crop_1HWC, rounds, repeats)[""] for file in files
    }
    fp32_bytes = files[0].size_bytes
    return [
        EdgeFile(
            student=student,
            kind=file.kind,
            runtime=file.runtime,
            path=file.path.name,
            sha256=sha256_of(file.path),
            beside={part.name: sha256_of(part) for part in file.beside},
            size_bytes=file.size_bytes,
            size_ratio=file.size_bytes / fp32_bytes,
            int8_weight_share=file.shares()[0],
            fp16_weight_share=file.shares()[1],
            kept_in_float=file.kept_in_float,
            training_steps=file.training_steps,
            peak_memory_bytes=_peak_memory(file, tests.crops.shape[1]) if settings.peak_memory else None,
            shipped=True,
            reason="shipped: the fp32 file says what the network says (parity.json)",
            **quality[file.path.name],
            **_times(one[file.path.name], all_cores[file.path.name]),
        )
        for file in files
    ]


def _peak_memory(file: MadeFile, image_size: int) -> int | None:
    try:
        return peak_memory_bytes(file.runtime, file.path, image_size)
    except DistillError as error:  # the answers are measured; a number that is missing is no reason to throw them away
        _log.warning("memory is not known: %s", error)
        return None


def _times(one: Latency, all_cores: Latency) -> dict[str, float]:
    return {
        "latency_p50_ms": one.p50_ms,
        "latency_p99_ms": one.p99_ms,
        "latency_ratio": one.ratio,
        "latency_all_p50_ms": all_cores.p50_ms,
        "latency_all_p99_ms": all_cores.p99_ms,
    }
