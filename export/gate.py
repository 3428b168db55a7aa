"""Which of a student's files are fit for the edge device, and which of them to take.

Unit of data: one file, compared with the ONNX fp32 file of the same student. The fp32 file has passed the parity gate before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from export.edge import EdgeFile, Figures
from export.settings import Int8Gate

MIN_INT8_WEIGHT_SHARE = 0.9
"""Below this share of int8 weights a file has no right to its name."""
MIN_FP16_WEIGHT_SHARE = 0.9
"""The same of half precision."""
MAX_FP16_SIZE_RATIO = 0.75
"""A larger fp16 file saves too little to be worth a second file."""
MAX_SAME_WEIGHTS_KL = 1e-3
"""A file with the same weights that is further from the ONNX fp32 file, in nats, computes something else. OpenVINO had 2e-14."""
AS_FAST = 1.05
"""Latencies within this factor of the fastest count as equal: a busy machine tells no more."""
_SLACK = 1e-9


def judge_files(files: Sequence[EdgeFile], gate: Int8Gate, drop_in_half: float, native: bool) -> list[EdgeFile]:
    """Every file with its verdict.

    Args:
        files: the ONNX fp32 file first.
        drop_in_half, native: as in `judge_fp16`.
    """
    fp32 = files[0]
    float_of = {file.runtime: file for file in files if file.kind == "fp32"}
    judged = [fp32]
    for file in files[1:]:
        if file.kind == "int8":
            # Latency and size are compared within the runtime, accuracy with the file that has passed the parity gate.
            judged.append(judge_int8(file, float_of.get(file.runtime, fp32).replace(top1=fp32.top1), gate))
        elif file.kind == "fp16":
            judged.append(judge_fp16(file, fp32, gate, drop_in_half, native))
        else:
            judged.append(judge_same_weights(file, fp32, gate))
    return judged


def judge_int8(int8: EdgeFile, fp32: EdgeFile, gate: Int8Gate) -> EdgeFile:
    """`int8` with `shipped` and `reason` decided.

    Args:
        fp32: the ONNX fp32 file, with latency and size of the fp32 file of the same runtime.
    """
    drop, what = accuracy_lost(int8, fp32)
    complaints = int8_complaints(int8, fp32, gate)
    if complaints:
        return int8.replace(shipped=False, reason="not shipped: " + "; ".join(complaints))
    how = f", {len(int8.kept_in_float)} layers in float" if int8.kept_in_float else ""
    how += f", fine-tuned for int8 ({int8.training_steps} steps)" if int8.training_steps else ""
    won = f"latency {_latency(int8, fp32):.2f} and size {_size(int8, fp32):.2f} of fp32, {what} {drop:.4f}{how}"
    return int8.replace(shipped=True, reason=f"shipped: {won}")


def int8_complaints(int8: Figures, fp32: Figures, gate: Int8Gate) -> tuple[str, ...]:
    """What stands against shipping an int8 file, in words and numbers; nothing if it is fit."""
    drop, what = accuracy_lost(int8, fp32)
    latency, size = _latency(int8, fp32), _size(int8, fp32)
    small = f" ({fp32.size_bytes} bytes in fp32: scales and graph weigh much in so small a file)" if fp32.size_bytes < 500_000 else ""
    return tuple(
        complaint
        for failed, complaint in (
            (int8.num_without_answer > 0, _without_answer(int8)),
            (int8.int8_weight_share < MIN_INT8_WEIGHT_SHARE, f"only {int8.int8_weight_share:.0%} of its weights are int8"),
            (latency > gate.max_latency_ratio, f"latency {latency:.2f} of fp32 > {gate.max_latency_ratio:g}"),
            (size > gate.max_size_ratio, f"size {size:.2f} of fp32 > {gate.max_size_ratio:g}{small}"),
            (_loses_too_much(drop, gate), f"{what} {drop:.4f} > {gate.max_accuracy_drop:g}"),
        )
        if failed
    )


def judge_fp16(fp16: EdgeFile, fp32: EdgeFile, gate: Int8Gate, drop_in_half: float, native: bool) -> EdgeFile:
    """`fp16` with `shipped` and `reason` decided.

    Args:
        drop_in_half: accuracy lost (disagreement, without labels) where every layer's result is rounded to half precision, as a processor
            with such arithmetic does; on others the file itself does not show it. Infinite where it gives no logits there.
        native: whether the runtime computes in half precision on this machine.
    """
    drop, what = accuracy_lost(fp16, fp32)
    lost = max(drop, drop_in_half)
    complaints = [
        complaint
        for failed, complaint in (
            (fp16.num_without_answer > 0, _without_answer(fp16)),
            (drop_in_half == math.inf, "infinite logits where every layer's result is rounded to half precision"),
            (fp16.fp16_weight_share < MIN_FP16_WEIGHT_SHARE, f"only {fp16.fp16_weight_share:.0%} of its weights are fp16"),
            (fp16.size_ratio > MAX_FP16_SIZE_RATIO, f"size {fp16.size_ratio:.2f} of fp32 > {MAX_FP16_SIZE_RATIO:g}"),
            (drop_in_half < math.inf and _loses_too_much(lost, gate), f"{what} {lost:.4f} > {gate.max_accuracy_drop:g}"),
        )
        if failed
    ]
    if complaints:
        return fp16.replace(shipped=False, reason="not shipped: " + "; ".join(complaints))
    kept = f", {len(fp16.kept_in_float)} layers in fp32 that would overflow" if fp16.kept_in_float else ""
    speed = f"latency {fp16.latency_ratio:.2f}" if native else f"saves size only: computed in fp32 here, latency {fp16.latency_ratio:.2f}"
    won = f"size {fp16.size_ratio:.2f} of fp32, {what} {lost:.4f}{kept}; {speed}"
    return fp16.replace(shipped=True, reason=f"shipped: {won}")


def judge_same_weights(file: EdgeFile, fp32: EdgeFile, gate: Int8Gate) -> EdgeFile:
    """A file of another runtime with fp32 weights: shipped if it says what the ONNX fp32 file says. Equal accuracy is not enough: the same
    weights give the same answers."""
    drop, what = accuracy_lost(file, fp32)
    disagreement = 1.0 - file.agreement
    complaints = [
        complaint
        for failed, complaint in (
            (file.num_without_answer > 0, _without_answer(file)),
            (_loses_too_much(drop, gate), f"{what} {drop:.4f} > {gate.max_accuracy_drop:g}"),
            (_loses_too_much(disagreement, gate), f"disagreement with fp32 {disagreement:.4f} > {gate.max_accuracy_drop:g}"),
            (file.kl > MAX_SAME_WEIGHTS_KL, f"KL {file.kl:.1e} to the ONNX file > {MAX_SAME_WEIGHTS_KL:g}"),
        )
        if failed
    ]
    if complaints:
        return file.replace(shipped=False, reason="not shipped: " + "; ".join(dict.fromkeys(complaints)))
    said = f"{what} {drop:.4f}, KL {file.kl:.1e} to the ONNX file, latency {file.latency_ratio:.2f} and size {file.size_ratio:.2f} of it"
    return file.replace(shipped=True, reason=f"shipped: {said}")


def accuracy_lost(file: Figures, fp32: Figures) -> tuple[float, str]:
    """How much worse a file is than fp32, as a share, and what that is the share of."""
    if file.top1 is None or fp32.top1 is None:
        return 1.0 - file.agreement, "disagreement with fp32"
    return fp32.top1 - file.top1, "accuracy lost"


def _latency(file: Figures, fp32: Figures) -> float:
    return file.latency_ratio / fp32.latency_ratio


def _size(file: Figures, fp32: Figures) -> float:
    return file.size_ratio / fp32.size_ratio


def is_inaccurate(file: Figures, fp32: Figures, gate: Int8Gate) -> bool:
    """Whether the gate's limit of accuracy is passed, or some crop got no answer at all."""
    return file.num_without_answer > 0 or _loses_too_much(accuracy_lost(file, fp32)[0], gate)


def _loses_too_much(lost: float, gate: Int8Gate) -> bool:
    return lost > gate.max_accuracy_drop + _SLACK


def _without_answer(file: Figures) -> str:
    return f"infinite logits, or no numbers, on {file.num_without_answer} of {file.num_images} test crops"


def recommend(files: Sequence[EdgeFile]) -> tuple[EdgeFile, str]:
    """Of the files that are shipped the smallest of the fastest, and why that one.

    Args:
        files: fp32 first.
    """
    shipped = [file for file in files if file.shipped]
    fastest = min(file.latency_ratio for file in shipped)
    chosen = min((file for file in shipped if file.latency_ratio <= AS_FAST * fastest), key=lambda file: file.size_bytes)
    refused = [file for file in files if file.kind == "int8" and not file.shipped]
    next_best = f"the next best, as {refused[0].path.rpartition('/')[2]} is not shipped; " if refused and chosen.kind != "int8" else ""
    why = (
        f"{next_best}of {len(shipped)} shipped files the smallest among the fastest: latency {chosen.latency_p50_ms:.3f} ms"
        f" ({chosen.latency_ratio:.2f} of fp32) on one thread, {chosen.size_bytes / 1000:.0f} kB"
    )
    return chosen, why
