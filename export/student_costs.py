"""What trained students would cost at the edge before any of them is exported: their fp32 files, written, timed by turns and thrown away.

Unit of data: one student.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from distill.config import Section
from distill.errors import DistillError
from distill.models.saved_classifier import load_classifier
from export.graph import export_student_graph
from export.latency import measure_latency
from export.runtimes.onnx_runtime import open_file
from export.runtimes.runtime import Predict

ROUNDS, REPEATS = 3, 20

_log = logging.getLogger(__name__)


class StudentCost(Section):
    """Of one student's ONNX fp32 file on this machine's CPU."""

    size_bytes: int
    """Of the file."""
    latency_ms: float
    """Median of one crop, one thread."""


def measure_costs(folders: Mapping[str, Path], image_size: int) -> dict[str, StudentCost]:
    """Time the students of one run side by side.

    Args:
        folders: student -> its saved classifier.
        image_size: height and width of the crops.

    Returns:
        student -> cost; one that ONNX cannot say is left out, which is said in the log.
    """
    files: dict[str, Predict] = {}
    sizes: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, saved) in enumerate(folders.items()):
            path = Path(folder) / f"{number}.onnx"
            try:
                export_student_graph(load_classifier(saved).network, image_size, path)
                files[name] = open_file(path, num_threads=1)
            except DistillError as error:
                _log.warning("the latency of student %s is not known: %s", name, error)
                continue
            sizes[name] = path.stat().st_size
        crop_1HWC = np.random.default_rng(0).integers(0, 256, (1, image_size, image_size, 3), dtype=np.uint8)
        latencies = measure_latency(files, crop_1HWC, ROUNDS, REPEATS) if files else {}
    return {name: StudentCost(size_bytes=sizes[name], latency_ms=latency.p50_ms) for name, latency in latencies.items()}
