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

import numpy as np
import numpy.typing as npt

from distill.cli.run import Run
from distill.errors import ConfigError
from distill.progress import console
from distill.stages import Stage
from teacher_server.address import TeacherAddress

Result = dict[str, Any]


def _once(stage: Stage, work: Callable[[Path], Result]) -> Result:
    """The stage's result: the kept one, or what `work` makes in the stage's folder."""
    kept = stage.result()
    if kept is not None:
        console.print(f"[bold]{stage.name}[/bold]: done before with these settings, reused ({stage.folder})")
        return kept
    console.print(f"[bold]{stage.name}[/bold] -> {stage.folder}")
    return stage.finish(work(stage.begin()))


def pretrain(run: Run) -> Result:
    """Stage 1."""

    def work(folder: Path) -> Result:
        from distill.image_sets import open_unlabelled
        from teacher_trainer.pretrain import pretrain as train

        rejections = run.rejections()
        source = open_unlabelled(run.file.data)
        result = train(source, run.file.data, run.file.pretrain, run.file.seed, folder, rejections)
        rejections.close()
        return result

    return _once(run.pretrain, work)


def finetune(run: Run) -> Result:
    """Stage 2."""
    run.pretrain.require()

    def work(folder: Path) -> Result:
        from distill.evaluation import evaluate_on, network_logits
        from distill.image_sets import open_labelled, open_labelled_subset
        from distill.label_metrics import score
        from distill.models.saved_classifier import ClassifierCard, save_classifier
        from teacher_trainer.finetune import classifier_from_pretrained
        from teacher_trainer.finetune import finetune as train

        file, rejections = run.file, run.rejections()
        checkpoint = run.pretrain.folder / "checkpoint"
        network = classifier_from_pretrained(checkpoint, file.data, file.pretrain, file.finetune.num_head_layers, len(run.class_names))
        labelled = open_labelled_subset(file.data, file.seed)
        result = train(network, labelled, file.data, file.finetune, file.seed, rejections)
        scores = score(*evaluate_on(network_logits(network), open_labelled(file.data.test, file.data), file.data, rejections))
        card = ClassifierCard(
            network=file.pretrain.network,
            num_head_layers=file.finetune.num_head_layers,
            class_names=run.class_names,
            preprocessing=file.data.preprocessing,
            origin={"pretrained": run.pretrain.digest, "finetuned": run.finetune.digest},
        )
        save_classifier(folder / "checkpoint", network, card)
        rejections.close()
        console.print(f"  teacher: top-1 {scores.top1:.1%} on {scores.num_images} test images, from {labelled.num_images} labels")
        return {**result, "scores": scores.model_dump()}

    return _once(run.finetune, work)


def import_teacher(run: Run) -> Result:
    """A teacher from elsewhere."""

    def work(folder: Path) -> Result:
        from export.imports import import_onnx, import_timm

        file = run.file
        assert file.import_ is not None
        if file.import_.kind == "timm":
            name = str(file.import_.timm_name)
            card = import_timm(name, Path(file.import_.path), run.class_names, folder / "checkpoint", file.data.preprocessing)
            return {"kind": "timm", "card": card.model_dump(mode="json")}
        crops, ids = _sample_crops(run, file.teacher.num_parity_images)
        info = import_onnx(
            Path(file.import_.path), folder, file.data.preprocessing, run.class_names, crops, ids, file.teacher, logits=file.import_.logits
        )
        return {"kind": "onnx", "fingerprint": info.fingerprint}

    return _once(run.imported, work)


def export_teacher(run: Run) -> Result:
    """The teacher through the parity gate and into Triton's model repository."""
    origin = run.imported if run.file.import_ else run.finetune
    origin.require()

    def work(folder: Path) -> Result:
        import json

        from distill.models.saved_classifier import load_classifier
        from export.fingerprint import read_teacher_info
        from export.teacher import TEACHER_FILE, publish_teacher
        from export.teacher import export_teacher as export

        settings, ready = run.file.teacher, origin.folder / TEACHER_FILE
        if not ready.exists():
            saved = load_classifier(origin.folder / "checkpoint")
            crops, ids = _sample_crops(run, settings.num_parity_images)
            card = saved.card
            export(saved.network, card.preprocessing, card.class_names, crops, ids, folder, settings)
            ready = folder / TEACHER_FILE
        info = read_teacher_info(ready)
        publish_teacher(ready.parent, run.repository, settings, replace=True)
        parity = json.loads((ready.parent / "parity.json").read_text(encoding="utf-8"))
        console.print(f"  parity gate passed; teacher {info.name}, fingerprint {info.fingerprint[:12]}, in {run.repository}")
        return {"fingerprint": info.fingerprint, "parity": parity, "size_bytes": ready.stat().st_size}

    return _once(run.teacher, work)


def _sample_crops(run: Run, count: int) -> tuple[npt.NDArray[np.uint8], list[str]]:
    """The evaluation crops of the first `count` usable unlabelled images, and their ids."""
    from distill.evaluation import evaluation_batches
    from distill.image_sets import open_unlabelled

    crops, ids = [], list[str]()
    for batch in evaluation_batches(open_unlabelled(run.file.data), run.file.data, run.rejections()):
        crops.append(batch.crops_VBHWC[0])
        ids += batch.image_ids
        if len(ids) >= count:
            break
    return np.concatenate(crops)[:count], ids[:count]


@contextmanager
def served_teacher(run: Run) -> Iterator[Any]:
    """The exported teacher, running; a `ServedTeacher`. It stops with the block."""
    from teacher_server.serve import open_backend

    run.teacher.require()
    with open_backend(run.file.server, run.repository, run.file.teacher.name, run.folder / "logs") as served:
        if served.reason:
            console.print(f"  Triton cannot run here: {served.reason}. The teacher runs embedded (ONNX Runtime in each asking process).")
        else:
            console.print(f"  teacher served by {served.backend_kind}" + (f" at {served.triton_url} (gRPC)" if served.triton_url else ""))
        yield served


def label(run: Run, teacher: TeacherAddress) -> Result:
    """Fill the store ahead of training."""
    from student_trainer.label import label_images

    console.print("[bold]label[/bold]")
    result = label_images(run.distill_job(teacher), run.file.ray)
    store = result["store"]
    mean = store["size_bytes"] / max(1, store["num_labels"])
    console.print(f"  store: {store['num_labels']} labels in {store['num_segments']} segments, {mean:.0f} bytes a label")
    return result


def train(run: Run, teacher: TeacherAddress) -> Result:
    """Stage 3: all students on one stream."""

    def work(folder: Path) -> Result:
        from student_trainer.store import SoftLabelStore
        from student_trainer.train import train_students

        job = run.distill_job(teacher)
        result = train_students(job, run.file.ray, folder, "distill")
        assert job.store_folder is not None
        assert job.store_identity is not None
        store = SoftLabelStore(Path(job.store_folder), job.store_identity)
        return {**result, "store": store.stats().model_dump(), "store_folder": job.store_folder}

    return _once(run.train, work)


def train_control(run: Run) -> Result:
    """The same students on the labels alone, for as many steps."""

    def work(folder: Path) -> Result:
        from distill.image_sets import open_labelled_subset, open_unlabelled
        from student_trainer.train import train_students

        file = run.file
        labelled = open_labelled_subset(file.data, file.seed)
        if labelled.num_images < file.train.global_batch:
            raise ConfigError(
                f"train.global_batch {file.train.global_batch} is larger than the {labelled.num_images} labelled images of the control;"
                " make it smaller, or train.control=false"
            )
        steps = file.train.epochs * (open_unlabelled(file.data).num_images // file.train.global_batch)
        epochs = math.ceil(steps / (labelled.num_images // file.train.global_batch))
        return train_students(run.job("labels", epochs), file.ray, folder, "control")

    return _once(run.control, work)


def evaluate(run: Run, teacher: TeacherAddress) -> Result:
    """Everyone on the test images."""
    run.train.require()
    if run.file.train.control:
        train_control(run)

    def work(folder: Path) -> Result:
        from student_trainer.evaluate import evaluate_all

        rejections = run.rejections()
        names = [student.name for student in run.file.train.students]
        students = {name: run.train.folder / "students" / name for name in names}
        controls = {name: run.control.folder / "students" / name for name in names} if run.file.train.control else {}
        result = evaluate_all(teacher, students, controls, run.file.data, rejections)
        rejections.close()
        return result

    return _once(run.evaluate, work)


def export_student(run: Run) -> Result:
    """Each student as files for the edge, measured."""
    run.train.require()

    def work(folder: Path) -> Result:
        from distill.models.saved_classifier import load_classifier
        from export.student import export_student as export

        file = run.file
        calibration, _ = _sample_crops(run, file.edge.num_calibration_images)
        test_crops, labels = _test_crops(run)
        files = []
        for student in file.train.students:
            saved = load_classifier(run.train.folder / "students" / student.name)
            card, size = saved.card, file.data.image_size
            made = export(
                saved.network, student.name, size, card.class_names, card.preprocessing,
                calibration, test_crops, labels, folder / student.name, file.edge,
            )  # fmt: skip
            files += [edge_file.model_dump(mode="json") for edge_file in made]
            for edge_file in made:
                verdict = "shipped" if edge_file.shipped else "not shipped"
                console.print(f"  {student.name} {edge_file.kind}: {edge_file.size_bytes / 1000:.0f} kB, {verdict} ({edge_file.reason})")
        return {"files": files}

    return _once(run.edge, work)


def _test_crops(run: Run) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    from distill.evaluation import evaluation_batches
    from distill.image_sets import open_labelled

    batches = list(evaluation_batches(open_labelled(run.file.data.test, run.file.data), run.file.data, run.rejections()))
    return np.concatenate([b.crops_VBHWC[0] for b in batches]), np.concatenate([b.labels_B for b in batches])


def report(run: Run) -> Result:
    """The report of what is there: HTML with plots and JSON beside it. Always made anew."""
    from student_trainer.report import write_report

    path = write_report(run.folder / "report", gather(run))
    console.print(f"[bold]report[/bold]: {path}")
    return {"html": str(path), "json": str(path.with_suffix(".json"))}


def gather(run: Run) -> dict[str, Any]:
    """Everything that the report shows: settings, and the results of the stages that are finished."""
    import json

    stages = [run.train, run.evaluate, run.edge, run.teacher]
    if run.file.train.control:
        stages.append(run.control)
    stages += [run.imported] if run.file.import_ else [run.pretrain, run.finetune]
    run.evaluate.require()
    metrics = run.pretrain.folder / "metrics.jsonl"
    curve = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()] if metrics.exists() else []
    rejected = run.folder / "rejected.jsonl"
    lines = rejected.read_text(encoding="utf-8").splitlines() if rejected.exists() else []
    return {
        "run": json.loads(run.file.model_dump_json(by_alias=True)),
        "class_names": list(run.class_names),
        "stages": {stage.name: stage.result() for stage in stages},
        "pretrain_curve": curve,
        "rejected": [json.loads(line) for line in lines],
    }


def forget(run: Run, verb: str) -> None:
    """Move aside what a verb made, so that it is made afresh; `quickstart` means every stage. The label store stays."""
    origin = [run.imported] if run.file.import_ else [run.pretrain, run.finetune]
    stages = [*origin, run.teacher, run.train, run.control, run.evaluate, run.edge]
    for stage in stages:
        if verb in ("quickstart", stage.name):
            stage.forget()
