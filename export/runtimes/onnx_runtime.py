"""Students in ONNX Runtime, on the CPU. Unit of data: one file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort

from distill.wire import IMAGES, LOGITS
from export.label_space import Crops, Logits
from export.runtimes.runtime import Predict
from export.sessions import open_session


def open_file(path: Path, num_threads: int) -> Predict:
    """See `Runtime`."""
    session = open_session(path, num_threads)

    def predict(crops_BHWC: Crops) -> Logits:
        return np.asarray(session.run([LOGITS], {IMAGES: crops_BHWC})[0])

    return predict


def engine() -> str:
    """See `Runtime`."""
    return f"ONNX Runtime {ort.__version__}"
