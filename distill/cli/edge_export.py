"""One student of a run to its edge files, with what it needs of the run: crops, and the stored labels where int8 has to be trained for.

Unit of data: one student.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch import nn

from distill.cli.run import Run
from distill.errors import DistillError
from distill.models.saved_classifier import load_classifier
from distill.progress import console
from export.edge import EdgeReport
from export.int8 import FineTune, Trained
from export.student import export_student
from student_trainer.quantised import train_quantised
from teacher_server.address import TeacherAddress

Crops = npt.NDArray[np.uint8]


def export_one(
    run: Run, name: str, calibration: Crops, test_crops: Crops, labels: npt.NDArray[np.int64] | None, out_dir: Path
) -> EdgeReport:
    """Export, measure and judge a student; says each verdict aloud.

    Args:
        calibration: uint8 [N,H,W,3], unlabelled.
        test_crops, labels: of the test images; no labels where they have none.
        out_dir: the student's folder.
    """
    saved = load_classifier(run.train.folder / "students" / name)
    card = saved.card
    report = export_student(
        saved.network, name, run.file.data.image_size, card.class_names, card.preprocessing,
        calibration, test_crops, labels, out_dir, run.file.edge, fine_tuning(run),
    )  # fmt: skip
    for note in report.int8_notes:
        console.print(f"  {name}: {note}", markup=False)
    for file in report.files:
        where = "" if file.runtime == "onnxruntime" else f" ({file.runtime})"
        console.print(f"  {name} {file.kind}{where}: {file.size_bytes / 1000:.0f} kB, {file.reason}", markup=False)
    for unmeasured in report.not_measured:
        console.print(f"  {name} {unmeasured.path}: {unmeasured.size_bytes / 1000:.0f} kB, not measured: {unmeasured.reason}", markup=False)
    console.print(f"  {name}: take {report.recommended}: {report.why}", markup=False)
    return report


def fine_tuning(run: Run) -> FineTune:
    """What trains a copy of a student for int8 on the labels that the run has stored."""
    settings = run.file.edge.quantised_training
    # Nobody is asked: the stream reads the store alone, whatever stands here.
    job = run.distill_job(TeacherAddress(model=run.teacher_settings.name, repository=str(run.repository)), run.teacher, run.file.train)

    def fine_tune(network: nn.Module, calibration_crops: Crops, weight_bits: int) -> Trained:
        try:
            tuned = train_quantised(network, job, calibration_crops, settings.steps, settings.learning_rate, weight_bits)
        except DistillError as error:
            return Trained(None, 0, f"not fine-tuned for int8: {error}")
        said = (
            f"fine-tuned for int8 in {tuned.steps} steps ({tuned.seconds:.0f} s) on {tuned.num_labels} stored labels:"
            f" loss {tuned.first_loss:.4f} to {tuned.last_loss:.4f}"
        )
        return Trained(tuned.network, tuned.steps, said)

    return fine_tune
