"""student -> files for the edge device: ONNX fp32, fp16 and int8, and packages of other runtimes; measured where they will run, and shipped
only if they pass.

Unit of data: one student, one folder: <name>.fp32.onnx, <name>.fp16.onnx, <name>.int8.onnx, packages, parity.json, edge.json and
run_student.py. What missed the gate lies in not_shipped/.

Shapes: N crops, H W pixels, K classes.
"""

from __future__ import annotations

import glob
import math
import platform
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from torch import nn

from distill.errors import BadInput, ConfigError
from distill.machine import available_cores, describe_machine, vector_instructions
from distill.teacher_info import Preprocessing
from export.card import CARD_JSON, CARD_MARKDOWN
from export.edge import EDGE_FILE, STUDENT_METADATA_KEY, EdgeFile, EdgeReport, StudentInfo
from export.fingerprint import load_model
from export.gate import judge_files, recommend
from export.graph import export_student_graph, save_model
from export.half_precision import HalfPrecision, to_half_precision
from export.int8 import FineTune, Int8Result, make_int8
from export.label_space import Crops, top1_agreement
from export.measured import Labels, MadeFile, TestSet, answers_of, logits_of, measure_files
from export.packages import Networks, Package, make_packages, require_formats
from export.parity import check_parity, require_parity, torch_reference
from export.runtimes import onnx_runtime
from export.runtimes.runtime import load_runtime
from export.settings import StudentExportSettings
from export.standalone import write_standalone

NOT_SHIPPED = "not_shipped"
_HALF_IS_NATIVE = ("aarch64", "arm64")
"""Where ONNX Runtime's CPU provider multiplies half-precision numbers; elsewhere it computes them in fp32."""


def export_student(
    network: nn.Module,
    name: str,
    image_size: int,
    class_names: Sequence[str],
    preprocessing: Preprocessing,
    calibration_crops: Crops,
    test_crops: Crops,
    test_labels: Labels | None,
    out_dir: Path,
    settings: StudentExportSettings,
    fine_tune: FineTune | None = None,
) -> EdgeReport:
    """Export one student, measure its files, decide what is shipped, and write `edge.json`.

    Args:
        network: uint8 [B,H,W,3] -> logits [B,K]. Exported in evaluation mode whatever mode it is in.
        name: name of the files.
        image_size: H and W.
        class_names: K names.
        preprocessing: how an image becomes a crop, written into the files.
        calibration_crops: uint8 [N,H,W,3], unlabelled; the first `num_calibration_images` set the int8 ranges.
        test_crops: uint8 [N,H,W,3], not used in training; also compare the fp32 file with the network.
        test_labels: N class ids, or None: then the gate looks at the agreement with fp32.
        out_dir: made if it is not there.
        fine_tune: trains a copy of the student for int8 where that is needed; None where no soft labels are at hand.

    Returns:
        what `edge.json` says: fp32 first; `shipped`, `reason` and `recommended` say which to use. Paths are relative to `out_dir`.

    Raises:
        BadInput: no test crops, or as many labels as crops are not given.
        ConfigError: a format is asked for whose package is not installed, or as many class names as logits are not given.
        ParityError: the fp32 file does not say what the network says.
    """
    require_formats(settings.formats)
    _check_crops(calibration_crops, test_crops, test_labels, image_size, settings)
    info = StudentInfo(name=name, class_names=tuple(class_names), preprocessing=preprocessing)
    num_logits = torch_reference(network)(test_crops[:1]).shape[-1]
    if num_logits != len(class_names):
        raise ConfigError(f"student {name} has {num_logits} logits but {len(class_names)} class names are given: they must be equal")
    _clear(out_dir, name)
    fp32 = MadeFile("fp32", out_dir / f"{name}.fp32.onnx")
    export_student_graph(network, image_size, fp32.path, opset=settings.opset)
    compared = test_crops[: settings.num_parity_images]
    image_ids = [f"test crop {row}" for row in range(len(compared))]
    report = check_parity(torch_reference(network), fp32.path, compared, image_ids, settings.parity)
    require_parity(report, out_dir, fp32.path.name)
    _write_info(fp32.path, info)
    calibration_crops = calibration_crops[: settings.num_calibration_images]
    tests = TestSet(test_crops, test_labels, logits_of(fp32.open(num_threads=1), test_crops, fp32.path.name))
    half = _make_half(fp32.path, out_dir / f"{name}.fp16.onnx", calibration_crops, info) if settings.fp16 else None
    int8 = None
    if settings.int8:
        int8 = make_int8(network, fp32.path, out_dir / f"{name}.int8.onnx", calibration_crops, tests, settings, fine_tune)
        _write_info(int8.file.path, info)
    made = [fp32, *([half[0]] if half else []), *([int8.file] if int8 else [])]
    packages = make_packages(settings.formats, Networks(network, int8.network if int8 else network), made, calibration_crops, info, out_dir)
    made += [file for package in packages for file in package.files]
    files = measure_files(name, made, tests, settings)
    return _conclude(info, files, tests, half, int8, packages, out_dir, settings)


def _conclude(
    info: StudentInfo,
    files: list[EdgeFile],
    tests: TestSet,
    half: tuple[MadeFile, HalfPrecision] | None,
    int8: Int8Result | None,
    packages: Sequence[Package],
    out_dir: Path,
    settings: StudentExportSettings,
) -> EdgeReport:
    """Judge every file, put aside what is not shipped, and write what is left to say."""
    drop = _drop_in_half(half[1], tests) if half else 0.0
    judged = judge_files(files, settings.gate, drop, native=platform.machine() in _HALF_IS_NATIVE)
    judged = [_put_aside(file, out_dir) for file in judged]
    chosen, why = recommend(judged)
    write_standalone(out_dir)
    engines = {load_runtime(file.runtime).engine(): None for file in judged}
    report = EdgeReport(
        student=info,
        engine=f"{', '.join(engines)}; CPU, batch 1",
        machine=describe_machine(),
        vector_instructions=vector_instructions(),
        num_threads=available_cores(),
        recommended=chosen.path,
        why=why,
        int8_attempts=int8.attempts if int8 else (),
        int8_notes=int8.notes if int8 else (),
        files=tuple(judged),
        not_measured=tuple(unmeasured for package in packages for unmeasured in package.not_measured),
    )
    report.write(out_dir)
    return report


def _clear(out_dir: Path, name: str) -> None:
    """Take away the files of an earlier export, and first what tells of them: neither holds for this one."""
    told = [path for name in (EDGE_FILE, CARD_JSON, CARD_MARKDOWN) if (path := out_dir / name).is_file()]
    for path in [*told, *out_dir.glob(f"{glob.escape(name)}.*"), *(out_dir / NOT_SHIPPED).glob("*")]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)  # of a student named "edge", edge.json is named twice


def _check_crops(
    calibration_crops: Crops, test_crops: Crops, test_labels: Labels | None, image_size: int, settings: StudentExportSettings
) -> None:
    needed = [("test", test_crops), *([("calibration", calibration_crops)] if settings.int8 or settings.fp16 else [])]
    for what, crops in needed:
        if crops.dtype != np.uint8 or crops.ndim != 4 or crops.shape[1:] != (image_size, image_size, 3) or len(crops) == 0:
            wanted = f"at least one uint8 crop of shape ({image_size}, {image_size}, 3)"
            raise BadInput(f"{what} crops are {crops.dtype} {crops.shape}; the export needs {wanted}")
    if test_labels is not None and len(test_labels) != len(test_crops):
        raise BadInput(f"{len(test_crops)} test crops but {len(test_labels)} labels: they must be equal")


def _write_info(path: Path, info: StudentInfo) -> None:
    model = load_model(path)
    onnx.helper.set_model_props(model, {STUDENT_METADATA_KEY: info.model_dump_json()})
    save_model(model, path)


def _make_half(fp32: Path, target: Path, crops: Crops, info: StudentInfo) -> tuple[MadeFile, HalfPrecision]:
    half = to_half_precision(load_model(fp32), crops)
    save_model(half.model, target)
    _write_info(target, info)
    return MadeFile("fp16", target, kept_in_float=half.kept_in_fp32), half


def _drop_in_half(half: HalfPrecision, tests: TestSet) -> float:
    """Accuracy lost (disagreement, without labels) on a processor that rounds every layer's result to half precision; infinite if any logit
    is."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "as_rounded.onnx"
        onnx.save(half.as_rounded, path)
        logits_NK = answers_of(onnx_runtime.open_file(path, 1), tests.crops)
    if not np.isfinite(logits_NK).all():
        return math.inf
    if tests.labels is None:
        return 1.0 - top1_agreement(tests.fp32_logits, logits_NK)
    return float((tests.fp32_logits.argmax(axis=1) == tests.labels).mean() - (logits_NK.argmax(axis=1) == tests.labels).mean())


def _put_aside(file: EdgeFile, out_dir: Path) -> EdgeFile:
    """Move a file that is not shipped out of the way, so that nobody deploys it by its name."""
    if file.shipped:
        return file
    folder = out_dir / NOT_SHIPPED
    folder.mkdir(exist_ok=True)
    for name in (file.path, *file.beside):
        (out_dir / name).replace(folder / name)
    return file.replace(path=f"{NOT_SHIPPED}/{file.path}", beside={f"{NOT_SHIPPED}/{name}": digest for name, digest in file.beside.items()})
