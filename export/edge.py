"""What is known of a student's files for the edge device: one `EdgeFile` each, all of them in `edge.json`.

Unit of data: one file. Every number is measured on the file itself in the runtime that will run it, never on the network in torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from distill.config import Section
from distill.errors import BadInput, StageMissing
from distill.teacher_info import Preprocessing
from export.files import write_atomically
from export.runtimes.runtime import RuntimeName

STUDENT_METADATA_KEY = "distill.student"
"""Key of the JSON form of `StudentInfo` in ONNX metadata properties."""

EDGE_FILE = "edge.json"

Kind = Literal["fp32", "fp16", "int8"]


class StudentInfo(Section):
    """What an edge device must know to use a file; it stands in the file's metadata."""

    name: str
    """Name of the student."""
    class_names: tuple[str, ...]
    """Names of the K classes, in the order of the logits."""
    preprocessing: Preprocessing
    """What an image goes through before it is a crop. Normalising is inside the graph."""


class Figures(Section):
    """What the gate looks at."""

    size_bytes: int
    """Of the file and what is beside it."""
    int8_weight_share: float
    """Share of the weights of convolutions and matrix products that are int8."""
    num_images: int
    """Test crops that accuracy, agreement and KL were measured on."""
    num_without_answer: int = 0
    """Test crops whose logits are infinite or no numbers: they count as wrong, and as if all classes were equally likely. fp32 has none."""
    top1: float | None
    """Accuracy on the test crops; null without labels."""
    agreement: float
    """Share of test crops with the same most likely class as the fp32 file."""
    kl: float
    """Mean KL(fp32 || this file) over the test crops, in nats."""
    size_ratio: float
    """Size divided by that of the ONNX fp32 file."""
    latency_ratio: float
    """Median latency on one thread divided by that of the ONNX fp32 file, in the same round; median of the rounds."""


class EdgeFile(Figures):
    """One file of one student, with what was measured on it."""

    student: str
    """Name of the student."""
    kind: Kind
    """Type of the weights."""
    runtime: RuntimeName = "onnxruntime"
    """What runs it, and what it was measured in."""
    path: str
    """The file, relative to the folder of `edge.json`."""
    sha256: str
    """Of the file."""
    beside: dict[str, str] = Field(default_factory=dict)
    """Further files that belong to it -> their sha256."""
    fp16_weight_share: float = 0.0
    """Share of them that are in half precision."""
    kept_in_float: tuple[str, ...] = ()
    """Layers of an int8 file that stay in float because they hurt, or of an fp16 file because they would overflow."""
    training_steps: int = 0
    """Steps of fine-tuning with int8's rounding in the forward pass."""
    latency_p50_ms: float
    """Median time of one crop on one thread; median of the rounds."""
    latency_p99_ms: float
    """99th percentile of the same; median of the rounds."""
    latency_all_p50_ms: float
    """As `latency_p50_ms`, on all cores."""
    latency_all_p99_ms: float
    """As `latency_p99_ms`, on all cores."""
    peak_memory_bytes: int | None
    """Memory that loading and running it added to a fresh process with the runtime alone; null where the system does not tell, nobody
    asked, or that process failed (the log says how)."""
    shipped: bool
    """Whether the file is fit for the edge device. If not it lies in the folder `not_shipped`."""
    reason: str
    """Why it is shipped, or why not, in words and numbers."""


class UnmeasuredFile(Section):
    """A file that cannot run on the machine that made it; nothing is claimed of it."""

    path: str
    """Relative to the folder of `edge.json`; a Core ML package is a folder."""
    files: dict[str, str]
    """Each file of it -> its sha256."""
    size_bytes: int
    """Of all of them."""
    reason: str
    """Why it was not measured."""


class Int8Attempt(Section):
    """One way in which int8 was tried."""

    how: str
    """In words."""
    kept_in_float: tuple[str, ...] = ()
    """Layers that stay in float."""
    training_steps: int = 0
    """Steps of fine-tuning before it."""
    top1: float | None
    """As in `EdgeFile`."""
    agreement: float
    """As in `EdgeFile`."""
    kl: float
    """As in `EdgeFile`."""
    size_ratio: float
    """As in `EdgeFile`."""
    latency_ratio: float
    """As in `EdgeFile`, of a short measurement."""
    calibration_kl: float | None = None
    """Mean KL(fp32 || this file) over the calibration crops, in nats: what the choice among those goes by that the gate likes equally. Null
    in files of an earlier version."""
    complaints: tuple[str, ...]
    """What the gate had against it."""
    chosen: bool = False
    """Whether it is the int8 file."""


class EdgeReport(Section):
    """`edge.json`: all files of one student."""

    student: StudentInfo
    """What the files have in common."""
    engine: str
    """What the numbers were measured with."""
    machine: str
    """Where they were measured."""
    vector_instructions: tuple[str, ...] = ()
    """Instructions for small integers that its processor has; without `avx_vnni` or `avx512_vnni` an x86 gains less from int8."""
    num_threads: int
    """Cores of the measurement on all of them."""
    recommended: str
    """Path of the file to take, as far as this machine can tell."""
    why: str
    """Why this one."""
    int8_attempts: tuple[Int8Attempt, ...] = ()
    """In the order in which they were made."""
    int8_notes: tuple[str, ...] = ()
    """What became of the search for layers that hurt and of fine-tuning for int8, where they were wanted."""
    files: tuple[EdgeFile, ...]
    """fp32 first."""
    not_measured: tuple[UnmeasuredFile, ...] = ()
    """Files that cannot run here."""

    def write(self, folder: Path) -> Path:
        """Write `edge.json` into `folder`."""
        path = folder / EDGE_FILE
        write_atomically(path, (self.model_dump_json(indent=2) + "\n").encode())
        return path


def read_edge_report(folder: Path) -> EdgeReport:
    """What `edge.json` in `folder` says.

    Raises:
        StageMissing: there is none.
        BadInput: it is damaged, or of a version of distill that measured less.
    """
    path = folder / EDGE_FILE
    try:
        return EdgeReport.model_validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise StageMissing(f"{path} is not there; run `distill export-student` first") from error
    except ValidationError as error:
        first = error.errors()[0]
        raise BadInput(
            f"{path} cannot be read ({'.'.join(map(str, first['loc']))}: {first['msg']}): damaged, or of an older distill;"
            " run `distill export-student --fresh` again"
        ) from error
