"""student -> files for the edge device: ONNX fp32 and int8, measured where they will run, and shipped only if they pass.

Unit of data: one student, one folder: <name>.fp32.onnx, <name>.int8.onnx, parity.json, edge.json. An int8 file that missed the gate lies in
not_shipped/.

Shapes: N crops, H W pixels, K classes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
from onnxruntime import InferenceSession
from torch import nn

from distill.errors import BadInput, ConfigError, DistillError
from distill.teacher_info import Preprocessing
from export.edge import STUDENT_METADATA_KEY, EdgeFile, EdgeReport, StudentInfo, judge_int8
from export.fingerprint import load_model
from export.graph import IMAGES, LOGITS, export_student_graph, save_model
from export.label_space import Crops, Logits, kl_divergence, top1_agreement
from export.latency import Latency, measure_latency
from export.parity import check_parity, require_parity, torch_reference
from export.quantize import int8_weight_share, quantize_int8
from export.sessions import open_session
from export.settings import StudentExportSettings

Labels = npt.NDArray[np.integer]
Kind = Literal["fp32", "int8"]
EVALUATION_BATCH = 64


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
) -> list[EdgeFile]:
    """Export one student, measure its files, decide what is shipped, and write `edge.json`.

    Args:
        network: uint8 [B,H,W,3] -> logits [B,K]. Exported in evaluation mode whatever mode it is in.
        name: name of the files.
        image_size: H and W.
        class_names: K names.
        preprocessing: how an image becomes a crop, written into the files.
        calibration_crops: uint8 [N,H,W,3], unlabelled; the first `num_calibration_images` set the int8 ranges.
        test_crops: uint8 [N,H,W,3], not used in training; also compare the fp32 file with the network.
        test_labels: N class ids, or None: then the int8 gate looks at the agreement with fp32.
        out_dir: made if it is not there.

    Returns:
        fp32 first; `shipped` and `reason` say which to use. Paths are relative to `out_dir`.

    Raises:
        BadInput: no test crops, or as many labels as crops are not given.
        ParityError: the fp32 file does not say what the network says.
    """
    _check_crops(calibration_crops, test_crops, test_labels, image_size, settings)
    info = StudentInfo(name=name, class_names=tuple(class_names), preprocessing=preprocessing)
    paths: dict[Kind, Path] = {"fp32": out_dir / f"{name}.fp32.onnx"}
    for leftover in (out_dir / f"{name}.int8.onnx", out_dir / "not_shipped" / f"{name}.int8.onnx"):
        leftover.unlink(missing_ok=True)  # of an earlier export, whose verdict does not hold for this one
    export_student_graph(network, image_size, paths["fp32"], opset=settings.opset)
    compared = test_crops[: settings.num_parity_images]
    image_ids = [f"test crop {row}" for row in range(len(compared))]
    report = check_parity(torch_reference(network), paths["fp32"], compared, image_ids, settings.parity)
    require_parity(report, out_dir, paths["fp32"].name)
    if settings.int8:
        paths["int8"] = out_dir / f"{name}.int8.onnx"
        quantize_int8(
            paths["fp32"], paths["int8"], calibration_crops[: settings.num_calibration_images], reduce_range=settings.reduce_range
        )
    for path in paths.values():
        _write_info(path, info)
    files = _measure(paths, info, test_crops, test_labels, settings)
    if settings.int8:
        files[1] = _put_aside(judge_int8(files[1], files[0], settings.gate), out_dir)
    EdgeReport(student=info, engine=f"ONNX Runtime {ort.__version__}, CPU, 1 thread, batch 1", files=tuple(files)).write(out_dir)
    return files


def _check_crops(
    calibration_crops: Crops, test_crops: Crops, test_labels: Labels | None, image_size: int, settings: StudentExportSettings
) -> None:
    needed = [("test", test_crops), *([("calibration", calibration_crops)] if settings.int8 else [])]
    for what, crops in needed:
        if crops.dtype != np.uint8 or crops.ndim != 4 or crops.shape[1:] != (image_size, image_size, 3) or len(crops) == 0:
            wanted = f"at least one uint8 crop of shape ({image_size}, {image_size}, 3)"
            raise BadInput(f"{what} crops are {crops.dtype} {crops.shape}; the export needs {wanted}")
    if test_labels is not None and len(test_labels) != len(test_crops):
        raise BadInput(f"{len(test_crops)} test crops but {len(test_labels)} labels: they must be equal")


def _write_info(path: Path, info: StudentInfo) -> None:
    model = load_model(path)
    last = model.graph.output[0].type.tensor_type.shape.dim[-1]
    if last.dim_value != len(info.class_names):
        raise ConfigError(
            f"student {info.name} has {last.dim_value} logits but {len(info.class_names)} class names are given: they must be equal"
        )
    onnx.helper.set_model_props(model, {STUDENT_METADATA_KEY: info.model_dump_json()})
    save_model(model, path)


def _measure(
    paths: dict[Kind, Path],
    info: StudentInfo,
    test_crops: Crops,
    test_labels: Labels | None,
    settings: StudentExportSettings,
) -> list[EdgeFile]:
    sessions = {kind: open_session(path, num_threads=1) for kind, path in paths.items()}
    logits = {kind: _logits(session, test_crops, paths[kind].name) for kind, session in sessions.items()}
    latency = measure_latency(sessions, test_crops[:1], settings.latency_rounds, settings.latency_repeats)
    fp32_bytes = paths["fp32"].stat().st_size
    return [
        EdgeFile(
            student=info.name,
            kind=kind,
            path=path.name,
            sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
            size_bytes=path.stat().st_size,
            size_ratio=path.stat().st_size / fp32_bytes,
            int8_weight_share=int8_weight_share(path),
            shipped=True,
            reason="shipped: the fp32 file says what the network says (parity.json)",
            **_quality(logits[kind], logits["fp32"], test_labels),
            **_times(latency[kind]),
        )
        for kind, path in paths.items()
    ]


def _quality(logits_NK: Logits, fp32_NK: Logits, labels_N: Labels | None) -> dict[str, float | int | None]:
    return {
        "num_images": len(logits_NK),
        "top1": None if labels_N is None else float((logits_NK.argmax(axis=1) == labels_N).mean()),
        "agreement": top1_agreement(fp32_NK, logits_NK),
        "kl": float(kl_divergence(fp32_NK, logits_NK).mean()),
    }


def _times(latency: Latency) -> dict[str, float]:
    return {"latency_p50_ms": latency.p50_ms, "latency_p99_ms": latency.p99_ms, "latency_ratio": latency.ratio}


def _logits(session: InferenceSession, crops_NHWC: Crops, name: str) -> Logits:
    """Logits [N,K] of all crops.

    Raises:
        DistillError: NaN or infinite logits.
    """
    batches = [crops_NHWC[start : start + EVALUATION_BATCH] for start in range(0, len(crops_NHWC), EVALUATION_BATCH)]
    logits_NK = np.concatenate([session.run([LOGITS], {IMAGES: batch})[0] for batch in batches])
    if not np.isfinite(logits_NK).all():
        raise DistillError(f"{name} gives NaN or infinite logits on {int((~np.isfinite(logits_NK)).any(axis=1).sum())} test crops")
    return logits_NK


def _put_aside(int8: EdgeFile, out_dir: Path) -> EdgeFile:
    """Move a file that is not shipped out of the way, so that nobody deploys it by its name."""
    if int8.shipped:
        return int8
    target = out_dir / "not_shipped" / int8.path
    target.parent.mkdir(exist_ok=True)
    (out_dir / int8.path).replace(target)
    return int8.replace(path=str(target.relative_to(out_dir)))
