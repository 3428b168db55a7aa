"""Stage 3, train: runs the loop in a group of workers and keeps the students that they end with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from distill.cluster.group import run_workers
from distill.cluster.settings import RaySettings
from distill.config import digest_of
from distill.models.saved_classifier import ClassifierCard, save_classifier
from distill.monitor_settings import MonitorSettings
from distill.progress import console
from student_trainer.job import TrainJob
from student_trainer.monitoring import open_sinks
from student_trainer.students import new_students, restore_students
from student_trainer.worker import train_worker

WHERE_THINGS_ARE = {"teacher", "store_folder", "rejected_path", "initial_checkpoints"}
"""Parts of a job that change nothing of what comes out (what initial weights are, `train` says)."""


def train_students(job: TrainJob, settings: RaySettings, folder: Path, title: str, monitor: MonitorSettings) -> dict[str, Any]:
    """Train all students of the job; `folder/students/NAME` holds them at the end.

    If the driver or a worker dies, the same call goes on from the last checkpoint.

    Args:
        monitor: who watches beside the terminal.

    Returns:
        Plain data: `totals` (see `student_trainer.totals`), `epochs`, one row an epoch (loss and test top-1 of each student), `stopped`:
        student -> why it ended before the others (see `Stopped`; one that diverged has no folder), `selection` (see
        `student_trainer.halving.Selection`), `num_workers` of the group, and of each student `num_parameters` and `steps`, those that it
        took: of the control all there are, and of a student that was stopped fewer.

    Raises:
        DistillError: what a worker met, as the class it was there.
    """
    config = job.model_dump(mode="json")
    with open_sinks(monitor, folder, title) as sinks, run_workers(train_worker, config, settings, folder, title, sinks=sinks) as final:
        progress = keep_students(final / "students", job, folder)
    for name, stopped in progress["stopped"].items():
        console.print(f"  {name} ended after {stopped['step']} steps ({stopped['why']}): {stopped['detail']}", markup=False)
    said = {name: progress[name] for name in ("totals", "epochs", "stopped", "selection", "num_parameters", "steps")}
    return {**said, "num_workers": settings.num_workers}


def keep_students(checkpoint: Path, job: TrainJob, folder: Path) -> dict[str, Any]:
    """Write each student of the last checkpoint, but for those that diverged, as a classifier of its own, with its averaged weights if it
    has any; return what the checkpoint, of a run that is over, says of it, with `num_parameters` and `steps` of each student.

    Raises:
        CheckpointError: see `restore_students`.
        SourceError: see `TrainJob.open_images`.
    """
    students = new_students(job, torch.device("cpu"), job.train.global_batch)
    progress = restore_students(checkpoint, students)
    for student in students:
        if student.stopped and student.stopped.why == "diverged":
            continue
        name = student.settings.name
        origin = {
            "objective": job.objective,
            "teacher": job.store_identity.fingerprint if job.store_identity else None,
            "job": digest_of(job.model_dump(mode="json", exclude=WHERE_THINGS_ARE)),
            "store": progress.get("store"),
        }
        card = ClassifierCard(
            network=student.settings.network,
            num_head_layers=student.settings.num_head_layers,
            class_names=job.class_names,
            preprocessing=job.data.preprocessing,
            origin=origin,
        )
        save_classifier(folder / "students" / name, student.judged, card)
    sizes = {s.settings.name: sum(parameter.numel() for parameter in s.network.parameters()) for s in students}
    num_steps = job.epochs * job.steps_per_epoch()
    steps = {s.settings.name: s.stopped.step if s.stopped else num_steps for s in students}
    return {**progress, "num_parameters": sizes, "steps": steps}
