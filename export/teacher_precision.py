"""fp32 teacher graph -> the same teacher in the precision that is asked for, and what of it the parity gate has to look at.

Unit of data: one teacher file, rewritten in place.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from export.fingerprint import load_model
from export.graph import save_model
from export.graph_regions import opset_of
from export.half_precision import HalfPrecision, to_half_precision
from export.label_space import Crops
from export.parity import ParityReport, Reference, check_parity
from export.quantize import quantize_int8
from export.runners import OnnxRunner
from export.settings import TeacherExportSettings
from export.simplify import at_least_opset

FEWEST_CALIBRATION_CROPS = 8
PER_CHANNEL_OPSET = 13
"""The first opset that says int8 with a scale for each channel."""
ROUNDED = "fp32 arithmetic rounded to fp16 behind every operator, as a GPU rounds"


@dataclass(frozen=True)
class PreciseTeacher:
    """A teacher file in its final precision."""

    path: Path
    settings: TeacherExportSettings
    opset: int
    half: HalfPrecision | None
    """Of an fp16 teacher."""

    def check(self, reference: Reference, crops_NHWC: Crops, image_ids: list[str]) -> ParityReport:
        """The parity gate. An fp16 teacher passes it twice: as the file is run here, and as a GPU runs it; the report is of the first
        that failed, or of the GPU's."""
        limits, temperatures = self.settings.limits, self.settings.parity_temperatures
        report = check_parity(reference, self.path, crops_NHWC, image_ids, limits, temperatures)
        if self.half is not None and report.passed:
            rounded = OnnxRunner.of_model(self.half.as_rounded, self.path.name, f"{report.engine}, {ROUNDED}")
            report = check_parity(reference, rounded, crops_NHWC, image_ids, limits, temperatures)
        kept = self.half.kept_in_fp32 if self.half else ()
        return report.replace(precision=self.settings.precision, opset=self.opset, kept_in_fp32=kept)


def set_precision(path: Path, crops_NHWC: Crops, settings: TeacherExportSettings) -> PreciseTeacher:
    """Rewrite the fp32 teacher graph in `path`.

    Args:
        path: the file.
        crops_NHWC: uint8 [N,H,W,3], the real crops that ranges are measured on.
        settings: the precision, and whether TensorRT will run it.

    Raises:
        DistillError: the graph does not run, or cannot be quantised.
    """
    half = None
    if settings.precision == "fp16":
        half = to_half_precision(load_model(path), crops_NHWC)
        save_model(half.model, path)
    elif settings.precision == "int8":
        save_model(at_least_opset(load_model(path), PER_CHANNEL_OPSET, "teacher.precision: int8"), path)
        for_tensorrt = settings.repository.acceleration == "tensorrt"
        way_out = "set teacher.precision to fp32 or fp16"
        quantize_int8(path, path, crops_NHWC, float_logits=True, symmetric=for_tensorrt, way_out=way_out)
    return PreciseTeacher(path, settings, opset_of(load_model(path)), half)


def split_crops(crops_NHWC: Crops, num_compared: int) -> tuple[Crops, Crops]:
    """(those that are compared, those that ranges are measured on): different ones, so that the gate sees what was not measured; the
    same where there are too few for both."""
    rest = crops_NHWC[num_compared:]
    return crops_NHWC[:num_compared], rest if len(rest) >= FEWEST_CALIBRATION_CROPS else np.asarray(crops_NHWC)
