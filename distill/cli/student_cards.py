"""The cards of a run's students: brought together from the stages that are finished, written beside their files.

Unit of data: one student.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distill.cli.run import Run
from distill.image_sets import choose_labelled, open_labelled, open_unlabelled
from export.card import ImageSet, StudentCard, limits_of
from export.edge import EdgeReport, read_edge_report

OF_THE_STUDENT = ("network", "num_head_layers", "initial_weights", "optimizer", "ema_decay")
OF_THE_TRAINING = (
    "epochs", "images", "num_views", "mixing", "global_batch", "alpha", "min_area", "temperature",
    "scale_by_temperature_squared", "weighting", "precision",
)  # fmt: skip


def write_cards(run: Run) -> list[str]:
    """Write the card of each student that was exported; returns their names.

    Raises:
        StageMissing: no student was exported with these settings.
    """
    exported = run.edge.require()
    names = list(dict.fromkeys(file["student"] for file in exported["files"]))
    sets = _image_sets(run)
    for name in names:
        edge = read_edge_report(run.edge.folder / name)
        card_of(run, name, edge, sets).write(run.edge.folder / name)
    return names


def card_of(run: Run, name: str, edge: EdgeReport, sets: tuple[ImageSet, ...]) -> StudentCard:
    """What is known of one student."""
    from distill.models.classifier import build_classifier
    from distill.models.saved_classifier import read_card

    saved = read_card(run.train.folder / "students" / name)
    network = build_classifier(saved.network, len(saved.class_names), saved.preprocessing, saved.num_head_layers)
    evaluation = run.evaluate.result() if run.train.result() is not None else None
    numbers = _numbers(name, evaluation) if evaluation and name in evaluation["students"] else None
    return StudentCard(
        name=name,
        num_parameters=sum(parameter.numel() for parameter in network.parameters()),
        data=sets,
        teacher={
            "name": run.teacher_settings.name,
            "fingerprint": run.teacher.require()["fingerprint"],
            "precision": run.teacher_settings.precision,
            "top1": evaluation["teacher"]["scores"]["top1"] if evaluation else None,
        },
        recipe=_recipe(run, name),
        numbers=numbers,
        edge=edge,
        limits=limits_of(edge, numbers, run.file.edge.gate.max_accuracy_drop),
    )


def _numbers(name: str, evaluation: dict[str, Any]) -> dict[str, Any]:
    rows = {"teacher": evaluation["teacher"], f"{name}, distilled": evaluation["students"][name]}
    if name in evaluation["controls"]:
        rows[f"{name}, labels only"] = evaluation["controls"][name]
    return {title: {key: entry[key] for key in ("scores", "to_teacher") if key in entry} for title, entry in rows.items()}


def _recipe(run: Run, name: str) -> dict[str, Any]:
    train = run.file.train.model_dump(mode="json")
    student = next(student for student in train["students"] if student["name"] == name)
    student["initial_weights"] = _shown(student["initial_weights"])
    return {**{key: student[key] for key in OF_THE_STUDENT}, **{key: train[key] for key in OF_THE_TRAINING}, "seed": run.file.seed}


def _image_sets(run: Run) -> tuple[ImageSet, ...]:
    data, train = run.file.data, run.file.train
    unlabelled, test = open_unlabelled(data), open_labelled(data.test, data)
    of_the_student = "soft labels of the teacher, training"
    on_labelled = train.images == "labelled"
    sets = [
        ImageSet(
            used_for="int8 ranges" if on_labelled else f"{of_the_student}, int8 ranges", path=_shown(data.unlabelled.path),
            num_images=unlabelled.num_images, content_digest=run.images("unlabelled"),
        ),
        ImageSet(
            used_for="accuracy, parity, the gate", path=_shown(data.test.path), num_images=test.num_images,
            content_digest=run.images("test"),
        ),
    ]  # fmt: skip
    if train.alpha < 1 or on_labelled:
        uses = [*([of_the_student] if on_labelled else []), *(["labels of the student"] if train.alpha < 1 else [])]
        chosen = choose_labelled(open_labelled(data.labelled, data), data, run.file.seed)
        sets.append(
            ImageSet(
                used_for=", ".join(uses), path=_shown(data.labelled.path), num_images=len(chosen), content_digest=run.images("labelled")
            )
        )
    return tuple(sets)


def _shown(path: str) -> str:
    """A URL, or the last part of a path: the card leaves this machine, the folders above stay."""
    return path if "://" in path and not path.startswith("file:") else Path(path).absolute().name
