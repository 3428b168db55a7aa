"""What each verb does: brings a stage's inputs together, calls the package that owns the stage, keeps the result.

Every function takes the run and returns the stage's result (plain data). A stage that is finished with the same settings is not done again.
torch, Ray and ONNX are imported inside the functions, so that a verb pays for what it uses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distill.cli.run import Run
from distill.cli.run_crops import crops_of_test_images, sample_crops
from distill.cli.tuning_file import tuned_settings
from distill.errors import ConfigError, ParityError, SourceError
from distill.progress import console
from distill.stages import Stage
from export.settings import TeacherExportSettings
from student_trainer.job import TrainJob
from student_trainer.settings import SELF_DISTILLED
from teacher_server.address import TeacherAddress

Result = dict[str, Any]


def _once(stage: Stage, work: Callable[[Path], Result], check: Callable[[], object] = lambda: None) -> Result:
    """The stage's result: the kept one, or what `work` makes in the stage's folder.

    Args:
        check: refuses bad input; called before anything is moved aside and before a worker is started.
    """
    kept = stage.result()
    if kept is not None:
        console.print(f"[bold]{stage.name}[/bold]: done before with these settings, reused ({stage.folder})")
        return kept
    check()
    console.print(f"[bold]{stage.name}[/bold] -> {stage.folder}")
    return stage.finish(work(stage.begin()))


def pretrain(run: Run) -> Result:
    """Stage 1."""

    def work(folder: Path) -> Result:
        from distill.checkpoint import keep_weights
        from distill.cluster.group import run_workers
        from teacher_trainer.pretrain import pretrain_result, pretrain_worker
        from teacher_trainer.pretrain_job import PretrainJob

        file = run.file
        job = PretrainJob(data=file.data.absolute(), pretrain=file.pretrain, seed=file.seed, rejected_path=run.rejected_path)
        with run_workers(pretrain_worker, job.model_dump(mode="json"), file.ray, folder, "pretrain") as final:
            keep_weights(final, folder / "checkpoint")
        return pretrain_result(folder / "checkpoint")

    def check() -> None:
        from distill.image_sets import open_unlabelled
        from distill.models.classifier import check_image_size
        from teacher_trainer.pretrain_job import check_job

        check_job(run.file.pretrain, open_unlabelled(run.file.data), run.file.ray.num_workers)
        check_image_size(run.file.pretrain.network, run.file.data.image_size)

    return _once(run.pretrain, work, check)


def finetune(run: Run) -> Result:
    """Stage 2.

    Raises:
        StageMissing: there is no pretrained network yet.
        ConfigError: the import brought none.
    """
    (run.imported if run.file.import_ else run.pretrain).require()
    if run.origin.name == "import":
        way_out = "go on with `distill export-teacher`, or set import.take=pretrained where the checkpoint has a projection head, too"
        raise ConfigError(f"{run.imported.folder} brought a teacher that has its classes, nothing to fine-tune; {way_out}")

    def work(folder: Path) -> Result:
        from distill.checkpoint import keep_weights
        from distill.cluster.group import run_workers
        from teacher_trainer.finetune import FinetuneJob, finetune_worker

        file = run.file
        job = FinetuneJob(
            data=file.data.absolute(),
            finetune=file.finetune,
            network=run.backbone,
            pretrained=str(run.pretrained.absolute()),
            seed=file.seed,
            class_names=run.class_names,
            origin={"finetuned": run.finetune.digest, **run.finetune.inputs},
            rejected_path=run.rejected_path,
        )
        with run_workers(finetune_worker, job.model_dump(mode="json"), file.ray, folder, "finetune") as final:
            result: Result = keep_weights(final, folder / "checkpoint")["result"]
        scores = result["scores"]
        title = "linear evaluation" if file.finetune.linear else "teacher"
        console.print(
            f"  {title}: top-1 {scores['top1']:.1%}, top-5 {scores['top5']:.1%}, ECE {scores['ece']:.3f}"
            f" on {scores['num_images']} test images, from {result['num_labelled']} labels"
        )
        return result

    def check() -> None:
        from distill.image_sets import choose_labelled, has_labels, open_labelled
        from distill.models.classifier import check_image_size

        data = run.file.data
        choose_labelled(open_labelled(data.labelled, data), data, run.file.seed, every_class=True)
        if not has_labels(open_labelled(data.test, data)):
            raise SourceError(
                f"{data.test.path} (data.test) has images without labels, and the teacher is scored on them: give their labels"
            )
        check_image_size(run.backbone, run.file.data.image_size)

    return _once(run.finetune, work, check)


def import_teacher(run: Run) -> Result:
    """A teacher from elsewhere."""

    def work(folder: Path) -> Result:
        from distill.cli.import_report import describe
        from distill.cli.teacher_import import crop_notes, import_into

        file = run.file
        assert file.import_ is not None
        result = import_into(
            file.import_,
            folder,
            class_names=run.class_names,
            preprocessing=file.data.preprocessing,
            teacher=file.teacher,
            sample=lambda preprocessing: sample_crops(run, file.teacher.num_crops),
        )
        result["notes"] += crop_notes(result, file.data.preprocessing)
        for line in describe(result, folder):
            console.print(f"  {line}", markup=False)
        return result

    return _once(run.imported, work)


def make_teacher(run: Run) -> None:
    """Every stage up to the exported teacher; those that are finished are reused."""
    if run.file.import_:
        import_teacher(run)
        if run.origin.name == "import":
            export_teacher(run)
            return
    else:
        pretrain(run)
    finetune(run)
    export_teacher(run)


def export_teacher(run: Run) -> Result:
    """The teacher through the parity gate and into Triton's model repository."""
    run.origin.require()
    return _export(run, run.first_teacher, run.origin.folder, "checkpoint", run.file.teacher)


def _export(run: Run, stage: Stage, origin: Path, checkpoint: str, settings: TeacherExportSettings) -> Result:
    """The classifier in `origin / checkpoint`, or the teacher graph in `origin`, into the repository."""

    def work(folder: Path) -> Result:
        import json

        from distill.cli.parity_table import parity_line, table_of_failed_parity
        from distill.cli.publishing import publish_exported
        from distill.models.saved_classifier import load_classifier
        from export.contract import require_input_size
        from export.fingerprint import read_teacher_info
        from export.large_models import model_bytes
        from export.parity_files import REPORT_FILE, report_of
        from export.teacher import TEACHER_FILE
        from export.teacher import export_teacher as export

        ready = origin / TEACHER_FILE
        if not ready.exists():
            saved = load_classifier(origin / checkpoint)
            card = saved.card
            require_input_size(card.preprocessing, settings.input_size, run.file.data.image_size, str(origin))
            crops, ids = sample_crops(run, settings.num_crops)
            with table_of_failed_parity(folder):
                export(saved.network, card.preprocessing, card.class_names, crops, ids, folder, settings)
            ready = folder / TEACHER_FILE
        info = read_teacher_info(ready)
        if (report := report_of(ready, info.fingerprint)) is None:
            raise ParityError(
                f"no {REPORT_FILE} in {ready.parent} says that teacher {info.fingerprint[:12]} passed the parity gate: make that stage anew"
                " with --fresh"
            )
        parity = json.loads(report)
        console.print(f"  parity: {parity_line(parity)}")
        published = publish_exported(ready.parent, run.repository, tuned_settings(settings, run.folder, info.fingerprint))
        console.print(f"  parity gate passed; teacher {info.name}, fingerprint {info.fingerprint[:12]}, {published}", markup=False)
        return {"fingerprint": info.fingerprint, "parity": parity, "size_bytes": model_bytes(ready)}

    return _once(stage, work)


def self_distill(run: Run) -> Result:
    """The teacher teaches a network like itself, which is exported as the teacher of the students."""
    run.first_teacher.require()

    def work(folder: Path) -> Result:
        with _serving(run, run.file.teacher.name) as served:
            return _train(run, run.distill_job(served.address, run.first_teacher, run.self_training), folder, "self-distill")

    result = _once(run.self_distill, work)
    _export(run, run.second_teacher, run.self_distill.folder, f"students/{SELF_DISTILLED}", run.second_name)
    return result


@contextmanager
def served_teacher(run: Run) -> Iterator[Any]:
    """The teacher of the students, running; a `ServedTeacher`. It stops with the block."""
    run.teacher.require()
    with _serving(run, run.teacher_settings.name) as served:
        yield served


@contextmanager
def _serving(run: Run, name: str) -> Iterator[Any]:
    from teacher_server.serve import open_backend

    wanted = run.first_teacher if name == run.file.teacher.name else run.teacher
    fingerprint = wanted.require()["fingerprint"]
    with open_backend(run.file.server, run.repository, name, run.folder / "logs", fingerprint=fingerprint) as served:
        if served.reason:
            console.print(f"  Triton cannot run here: {served.reason}. The teacher runs embedded (ONNX Runtime in each asking process).")
        elif served.address.pool:
            console.print(f"  teacher served by a pool: {', '.join(served.address.pool.urls)}")
        else:
            console.print(f"  teacher served by {served.backend_kind}" + (f" at {served.triton_url} (gRPC)" if served.triton_url else ""))
        yield served


def label(run: Run, teacher: TeacherAddress) -> Result:
    """Fill the store ahead of training."""
    from student_trainer.label import label_images

    console.print("[bold]label[/bold]")
    job = run.distill_job(teacher, run.teacher, run.file.train)
    _say_new_store(job)
    result = label_images(job, run.file.ray)
    store = result["store"]
    mean = store["size_bytes"] / max(1, store["num_labels"])
    console.print(f"  store: {store['num_labels']} labels in {store['num_segments']} segments, {mean:.0f} bytes a label")
    return result


def train(run: Run, teacher: TeacherAddress) -> Result:
    """Stage 3: all students on one stream."""
    job = run.distill_job(teacher, run.teacher, run.file.train)
    return _once(run.train, lambda folder: _train(run, job, folder, "distill"))


def sweep(run: Run, teacher: TeacherAddress) -> Result:
    """Variants of the students on one stream, by successive halving."""
    from distill.cli.sweep_table import sweep_table
    from student_trainer.history import read_history
    from student_trainer.sweep import ranking
    from student_trainer.sweep_report import write_sweep

    training, chosen = run.sweep_training
    job = run.distill_job(teacher, run.teacher, training)

    def work(folder: Path) -> Result:
        from export.student_costs import measure_costs

        result = _train(run, job, folder, "sweep")
        made = {name: folder / "students" / name for name in chosen if result["stopped"].get(name, {}).get("why") != "diverged"}
        costs = measure_costs(made, run.file.data.image_size)
        return {**result, "ranking": ranking(chosen, result, {name: cost.model_dump() for name, cost in costs.items()})}

    result = _once(run.sweep, work)
    console.print(sweep_table(result["ranking"]))
    history = read_history(run.sweep.folder / "metrics.jsonl")
    console.print(f"  all of them: {write_sweep(run.folder / 'report' / 'sweep.html', run.folder.name, result, history)}")
    return result


def _say_new_store(job: TrainJob) -> None:
    """Whoever changed teacher, crops, seed or images may not expect that every label is asked for again."""
    from student_trainer.open_store import is_there

    assert job.store_folder is not None
    if not is_there(job.store_folder):
        console.print(f"  a new label store, of this teacher, seed, crops and images: {job.store_folder}", markup=False)


def _train(run: Run, job: TrainJob, folder: Path, title: str) -> Result:
    from student_trainer.open_store import open_label_store
    from student_trainer.train import train_students

    _say_new_store(job)
    result = train_students(job, run.file.ray, folder, title, run.file.monitor)
    return {**result, "store": open_label_store(job).stats().model_dump(), "store_folder": job.store_folder}


def train_control(run: Run) -> Result:
    """The same students on the labels alone, for at least as many steps as the whole run has (whole epochs)."""

    def work(folder: Path) -> Result:
        from student_trainer.train import train_students

        job = run.job("labels", run.file.train)
        steps = job.epochs * run.job("distill", run.file.train).steps_per_epoch()
        job = job.replace(epochs=math.ceil(steps / job.steps_per_epoch()))
        return train_students(job, run.file.ray, folder, "control", run.file.monitor)

    return _once(run.control, work)


def _made(run: Run, stage: Stage) -> list[str]:
    """Names of the students that a training brought: all but those that diverged."""
    stopped = stage.require().get("stopped", {})
    return [s.name for s in run.file.train.students if stopped.get(s.name, {}).get("why") != "diverged"]


def evaluate(run: Run, teacher: TeacherAddress) -> Result:
    """Everyone on the test images."""
    run.train.require()
    if run.file.train.control:
        train_control(run)

    def work(folder: Path) -> Result:
        from student_trainer.evaluate import evaluate_all, evaluate_teacher

        rejections = run.rejections()
        students = {name: run.train.folder / "students" / name for name in _made(run, run.train)}
        controls = {name: run.control.folder / "students" / name for name in _made(run, run.control)} if run.file.train.control else {}
        result = evaluate_all(teacher, students, controls, run.file.data, rejections)
        if run.file.self_distill:
            with _serving(run, run.file.teacher.name) as first:
                result["first_teacher"] = evaluate_teacher(first.address, run.file.data, rejections)
        rejections.close()
        return result

    return _once(run.evaluate, work)


def export_student(run: Run) -> Result:
    """Each student as files for the edge, measured, with its card."""
    from export.packages import require_formats

    run.train.require()
    require_formats(run.file.edge.formats)

    def work(folder: Path) -> Result:
        from distill.cli.edge_export import export_one

        calibration, _ = sample_crops(run, run.file.edge.num_calibration_images)
        crops, labels = crops_of_test_images(run)
        reports = [export_one(run, name, calibration, crops, labels, folder / name) for name in _made(run, run.train)]
        return {
            "files": [file.model_dump(mode="json") for report in reports for file in report.files],
            "recommended": {report.student.name: {"path": report.recommended, "why": report.why} for report in reports},
        }

    result = _once(run.edge, work)
    from distill.cli.student_cards import write_cards

    write_cards(run)
    return result


def forget(run: Run, verb: str) -> None:
    """Move aside what a verb made, so that it is made afresh; `quickstart` means every stage. The label store stays."""
    made = {
        "make-teacher": ("pretrain", "finetune", "import", "export-teacher"),
        "self-distill": ("self-distill", "export-self-distilled"),
        "quickstart": run.STAGES,
    }
    for name in made.get(verb, (verb,)):
        Stage(run.folder, name, {}, {}).forget()
