"""Real crops -> what ONNX Runtime's calibrators ask for, batch by batch. Unit of data: one batch of crops."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationDataReader

from distill.wire import IMAGES, TEMPERATURE
from export.label_space import Crops

CALIBRATION_BATCH = 32


class CropReader(CalibrationDataReader):
    """Crops, batch by batch; a teacher also gets its temperature, which is 1 throughout."""

    def __init__(self, crops_NHWC: Crops, model: onnx.ModelProto) -> None:
        self._batches = iter([crops_NHWC[start : start + CALIBRATION_BATCH] for start in range(0, len(crops_NHWC), CALIBRATION_BATCH)])
        self._asks_temperature = TEMPERATURE in {value.name for value in model.graph.input}

    def get_next(self) -> dict[str, Any] | None:
        """The next batch as a feed; None when there is no more."""
        batch = next(self._batches, None)
        if batch is None:
            return None
        return {IMAGES: batch} | ({TEMPERATURE: np.ones((len(batch), 1), np.float32)} if self._asks_temperature else {})
