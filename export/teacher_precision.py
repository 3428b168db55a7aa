"""fp32 teacher graph -> the same teacher in the precision that is asked for, and what of it the parity gate has to look at.

Unit of data: one teacher file, rewritten in place.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from onnx import TensorProto

from distill.errors import ConfigError
from export.fingerprint import load_model
from export.graph import save_model
from export.graph_regions import opset_of
from export.half_precision import HalfPrecision, to_half_precision
from export.label_space import Crops, Logits
from export.large_models import is_large
from export.parity import ParityReport, Reference, check_parity
from export.quantize import Quantizer, int8_weight_share
from export.runners import OnnxRunner
from export.settings import Precision, TeacherExportSettings
from export.simplify import at_least_opset
from export.top_outputs import top_output_failures

FEWEST_COMPARED_CROPS = 32
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
    weight_bits: int | None = None
    """Of an int8 teacher that was made here."""

    def check(self, reference: Reference, crops_NHWC: Crops, image_ids: list[str]) -> ParityReport:
        """The parity gate. An fp16 teacher passes it twice: as the file is run here, and as a GPU runs it; the report is of the first
        that failed, or of the GPU's. Top outputs must be the largest of the file's own logits."""
        limits, temperatures = self.settings.limits, self.settings.parity_temperatures
        report = check_parity(reference, self.path, crops_NHWC, image_ids, limits, temperatures)
        if self.half is not None and report.passed:
            rounded = OnnxRunner.of_model(self.half.as_rounded, self.path.name, f"{report.engine}, {ROUNDED}")
            report = check_parity(reference, rounded, crops_NHWC, image_ids, limits, temperatures)
        if self.settings.top_outputs and len(crops_NHWC):
            failures = top_output_failures(self.path, crops_NHWC, self.settings.top_outputs)
            report = report.replace(failures=(*report.failures, *failures))
        kept = self.half.kept_in_fp32 if self.half else ()
        return report.replace(precision=self.settings.precision, opset=self.opset, kept_in_fp32=kept, weight_bits=self.weight_bits)


def set_precision(path: Path, crops_NHWC: Crops, settings: TeacherExportSettings) -> PreciseTeacher:
    """Rewrite the fp32 teacher graph in `path`.

    Args:
        path: the file.
        crops_NHWC: uint8 [N,H,W,3], the real crops that ranges are measured on.
        settings: the precision, and whether TensorRT will run it.

    Raises:
        DistillError: the graph does not run, or cannot be quantised.
        ConfigError: int8 of a graph with more than 2 GB of weights, which ONNX Runtime's quantiser does not take.
    """
    half = weight_bits = None
    if settings.precision == "fp16":
        half = to_half_precision(load_model(path), crops_NHWC)
        save_model(half.model, path)
    elif settings.precision == "int8":
        model = load_model(path)
        if is_large(model):
            raise ConfigError("teacher.precision: int8 is for graphs of up to 2 GB in fp32, and this one is larger; set fp16 or fp32")
        save_model(at_least_opset(model, PER_CHANNEL_OPSET, "teacher.precision: int8"), path)
        weight_bits = _to_int8(path, crops_NHWC, settings)
    return PreciseTeacher(path, settings, opset_of(load_model(path)), half, weight_bits)


def _to_int8(path: Path, crops_NHWC: Crops, settings: TeacherExportSettings) -> int:
    """Rewrite the file; return the bits of its weights: 8, or 7 where the gate would refuse 8 here and 7 are nearer to fp32. So it is on
    x86 processors without VNNI, whose multiply-add of 8-bit numbers saturates."""
    for_tensorrt = settings.repository.acceleration == "tensorrt"
    fp32, ones_N1 = OnnxRunner.of_file(path), np.ones((len(crops_NHWC), 1), np.float32)
    ids = [str(row) for row in range(len(crops_NHWC))]

    def fp32_logits(crops_BHWC: Crops) -> Logits:
        return fp32(crops_BHWC, ones_N1[: len(crops_BHWC)])[0]

    def errors_of(int8: Path) -> ParityReport:
        return check_parity(fp32_logits, int8, crops_NHWC, ids, settings.limits, settings.parity_temperatures)

    with tempfile.TemporaryDirectory() as scratch:
        way_out = "set teacher.precision to fp32 or fp16"
        quantizer = Quantizer(path, crops_NHWC, Path(scratch), float_logits=True, symmetric=for_tensorrt, way_out=way_out)
        quantizer.write(path)
        if for_tensorrt or (at_8 := errors_of(path)).passed:
            return 8
        seven = Path(scratch) / "seven.onnx"
        quantizer.write(seven, reduce_range=True)
        at_7 = errors_of(seven)
        if len(at_7.failures) > len(at_8.failures) or max(at_7.max_kl.values()) >= max(at_8.max_kl.values()):
            return 8
        shutil.copyfile(seven, path)
        return 7


def found_precision(path: Path, settings: TeacherExportSettings) -> PreciseTeacher:
    """A teacher graph that is in `settings.precision` already, as it is."""
    return PreciseTeacher(path, settings, opset_of(load_model(path)), None)


def weights_precision(path: Path) -> Precision:
    """What an ONNX file computes in, as its weights tell: int8 or fp16 where more than half of them are."""
    if int8_weight_share(path) > 0.5:
        return "int8"
    num_weights = {TensorProto.FLOAT: 0, TensorProto.FLOAT16: 0}
    for tensor in load_model(path).graph.initializer:
        if tensor.data_type in num_weights:
            num_weights[tensor.data_type] += math.prod(tensor.dims)
    return "fp16" if num_weights[TensorProto.FLOAT16] > num_weights[TensorProto.FLOAT] else "fp32"


def split_crops(crops_NHWC: Crops, num_compared: int) -> tuple[Crops, Crops]:
    """(those that are compared, those that ranges are measured on): different ones, so that the gate sees what was not measured.

    Where there are too few for both, a fifth of them is measured on.

    Raises:
        ConfigError: fewer than 32 to compare, or than 8 further ones.
    """
    count = len(crops_NHWC)
    num_compared = min(num_compared, count - max(FEWEST_CALIBRATION_CROPS, count // 5))
    if num_compared < FEWEST_COMPARED_CROPS:
        raise ConfigError(
            f"fp16 and int8 need {FEWEST_COMPARED_CROPS} images to compare and {FEWEST_CALIBRATION_CROPS} further ones to measure ranges"
            f" on; of the {count} here, {max(0, num_compared)} would be compared: give more images and teacher.num_parity_images of at"
            f" least {FEWEST_COMPARED_CROPS}, or take precision fp32"
        )
    return crops_NHWC[:num_compared], crops_NHWC[num_compared:]
