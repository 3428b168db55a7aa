"""What is known of a student's files for the edge device, and the gate that int8 passes or not.

Unit of data: one file. Every number is measured in ONNX Runtime on the file itself, never on the network in torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from distill.config import Section
from distill.teacher_info import Preprocessing
from export.files import write_atomically
from export.settings import Int8Gate

STUDENT_METADATA_KEY = "distill.student"
"""Key of the JSON form of `StudentInfo` in ONNX metadata properties."""

MIN_INT8_WEIGHT_SHARE = 0.9
"""Below this share of int8 weights a file has no right to its name."""


class StudentInfo(Section):
    """What an edge device must know to use a file; it stands in the file's metadata."""

    name: str
    """Name of the student."""
    class_names: tuple[str, ...]
    """Names of the K classes, in the order of the logits."""
    preprocessing: Preprocessing
    """What an image goes through before it is a crop. Normalising is inside the graph."""


class EdgeFile(Section):
    """One file of one student, with what was measured on it."""

    student: str
    """Name of the student."""
    kind: Literal["fp32", "int8"]
    """Type of the weights."""
    path: str
    """The file, relative to the folder of `edge.json`."""
    sha256: str
    """Of the file."""
    size_bytes: int
    """Of the file."""
    int8_weight_share: float
    """Share of the weights of convolutions and matrix products that are int8."""
    num_images: int
    """Test crops that accuracy, agreement and KL were measured on."""
    top1: float | None
    """Accuracy on the test crops; null without labels."""
    agreement: float
    """Share of test crops with the same most likely class as the fp32 file."""
    kl: float
    """Mean KL(fp32 || this file) over the test crops, in nats."""
    latency_p50_ms: float
    """Median time of one crop on one thread; median of the rounds."""
    latency_p99_ms: float
    """99th percentile of the same; median of the rounds."""
    size_ratio: float
    """Size divided by that of the fp32 file."""
    latency_ratio: float
    """Median latency divided by that of the fp32 file, in the same round; median of the rounds."""
    shipped: bool
    """Whether the file is fit for the edge device. If not it lies in the folder `not_shipped`."""
    reason: str
    """Why it is shipped, or why not, in words and numbers."""


class EdgeReport(Section):
    """`edge.json`: all files of one student."""

    student: StudentInfo
    """What the files have in common."""
    engine: str
    """What the numbers were measured with."""
    files: tuple[EdgeFile, ...]
    """fp32 first."""

    def write(self, folder: Path) -> Path:
        """Write `edge.json` into `folder`."""
        path = folder / "edge.json"
        write_atomically(path, (self.model_dump_json(indent=2) + "\n").encode())
        return path


def judge_int8(int8: EdgeFile, fp32: EdgeFile, gate: Int8Gate) -> EdgeFile:
    """`int8` with `shipped` and `reason` decided."""
    if int8.top1 is None or fp32.top1 is None:
        drop, what = 1.0 - int8.agreement, "disagreement with fp32"
    else:
        drop, what = fp32.top1 - int8.top1, "accuracy lost"
    small = f" ({fp32.size_bytes} bytes in fp32: scales and graph weigh much in so small a file)" if fp32.size_bytes < 500_000 else ""
    complaints = [
        complaint
        for failed, complaint in (
            (int8.int8_weight_share < MIN_INT8_WEIGHT_SHARE, f"only {int8.int8_weight_share:.0%} of its weights are int8"),
            (int8.latency_ratio > gate.max_latency_ratio, f"latency {int8.latency_ratio:.2f} of fp32 > {gate.max_latency_ratio:g}"),
            (int8.size_ratio > gate.max_size_ratio, f"size {int8.size_ratio:.2f} of fp32 > {gate.max_size_ratio:g}{small}"),
            (drop > gate.max_accuracy_drop + 1e-9, f"{what} {drop:.4f} > {gate.max_accuracy_drop:g}"),
        )
        if failed
    ]
    if complaints:
        return int8.replace(shipped=False, reason="not shipped: " + "; ".join(complaints))
    won = f"latency {int8.latency_ratio:.2f} and size {int8.size_ratio:.2f} of fp32, {what} {drop:.4f}"
    return int8.replace(shipped=True, reason=f"shipped: {won}")
