"""A teacher from elsewhere, of any kind: what `distill import KIND` does, and what a run does with its `import` section.

Unit of data: one teacher. It ends as a folder with either `checkpoint/` (a classifier of ours, exported by `distill export-teacher`),
`model.onnx` with `parity.json` (a teacher graph, ready to be served), or `pretrained/` (a SimCLRv2 network without a classifier).
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from distill.checkpoint import MANIFEST, PRETRAINED, WEIGHTS, file_sha256, keep_weights, pretrained_preprocessing, read_manifest
from distill.class_lists import repeated
from distill.config import digest_of, validate
from distill.errors import CheckpointError, ConfigError, ParityError
from distill.models.arch_names import arch_name
from distill.models.saved_classifier import LOOKED_ON, ClassifierCard
from distill.models.settings import NetworkSettings
from distill.teacher_info import CROPPING, Preprocessing
from export.parity_files import FAILED_REPORT_FILE, REPORT_FILE, WORST_FOLDER
from export.settings import ImportSettings, StatedPreprocessing, Take, TeacherExportSettings, usual_crop_ratio

if TYPE_CHECKING:
    from export.label_space import Crops

Result = dict[str, Any]
Sample = Callable[[Preprocessing], "tuple[Crops, list[str]]"]
"""The teacher's preprocessing -> real crops uint8 [N,S,S,3] for the parity gate, and the names of their images."""

NO_CLASSIFIER = "there is no classifier in it: `distill finetune` makes one, with the run file's labels"

PLACES = {"classifier": "checkpoint", "teacher": "model.onnx", "pretrained": "pretrained"}
"""What was made -> where it lies in the teacher's folder."""


def import_into(
    settings: ImportSettings,
    folder: Path,
    *,
    class_names: Sequence[str] | None,
    preprocessing: Preprocessing | StatedPreprocessing,
    teacher: TeacherExportSettings,
    sample: Sample,
) -> Result:
    """Bring a teacher into `folder`.

    Args:
        settings: which one.
        folder: where `checkpoint/`, `model.onnx` or `pretrained/` is written.
        class_names: K names in the order of the logits; None only where the source has names of its own (`simclr`, `checkpoint`).
        preprocessing: that of the run, or what the user stated.
        teacher: limits of the parity gate, and the name, of a teacher that comes as ONNX.
        sample: gives the crops of that gate; asked for kind `onnx` only.

    Returns:
        Plain data: kind, made (`classifier`, `teacher` or `pretrained`), architecture, num_parameters, class_names, preprocessing, notes,
        made_for: what is known of the preprocessing that the network itself wants.

    Raises:
        ConfigError, CheckpointError, ParityError: what was given cannot be the teacher; one line says why.
    """
    stated = validate(StatedPreprocessing, preprocessing.model_dump(), origin="preprocessing")
    if teacher.input_size is not None and isinstance(preprocessing, Preprocessing):
        # Of a run: its size is that of the crops that travel, which says nothing of what the network was trained on.
        if preprocessing.image_size != teacher.input_size:
            sizes = f"teacher.input_size is {teacher.input_size}, data.image_size is {preprocessing.image_size}"
            raise ConfigError(f"{sizes}: both are the size of the crops that travel")
        stated = stated.replace(image_size=None)
    if settings.kind == "simclr":
        return _simclr(settings, folder, class_names, stated)
    if settings.kind == "onnx":
        return _onnx(settings, folder, _needed(class_names), stated, teacher, sample)
    if settings.kind == "checkpoint" and (pretrained := _pretrained_in(_named(settings.path), settings.take)):
        return _pretrained(pretrained, folder, stated)
    from export.torch_imports import CHECKPOINT, import_checkpoint, import_timm, import_torch

    path, target = Path(settings.path) if settings.path else None, folder / CHECKPOINT
    if settings.kind == "timm":
        card = import_timm(str(settings.timm_name), path, _needed(class_names), target, stated, settings.use_ema)
    elif settings.kind == "torch":
        card = import_torch(_named(path), str(settings.arch), _needed(class_names), target, stated, settings.use_ema)
    else:
        card = import_checkpoint(_named(path), target, class_names, stated.image_size)
    notes = [] if settings.path else ["random weights: no file was given, and nothing is downloaded"]
    return _result(settings.kind, folder, card, notes)


def import_into_new(folder: Path, work: Callable[[Path], Result]) -> Result:
    """Let `work` fill a new folder. It gets its name when it is complete; after any error nothing is left.

    Raises:
        ConfigError: `folder` holds something, or cannot be made.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"--out {folder} is not empty; choose another, or remove it first")
    above = next(parent for parent in folder.absolute().parents if parent.exists())
    pending = above / f".{folder.name}.{os.getpid()}.pending"
    try:
        pending.mkdir()
    except OSError as error:
        raise ConfigError(f"--out {folder} cannot be made in {above}: {error.strerror}") from error
    try:
        result = work(pending)
        folder.parent.mkdir(parents=True, exist_ok=True)
        pending.rename(folder)
    except ParityError as error:
        raise ParityError(_kept_beside(folder, pending, str(error))) from error
    finally:
        shutil.rmtree(pending, ignore_errors=True)
    return result


def _kept_beside(folder: Path, pending: Path, message: str) -> str:
    """Keep what is worth it of a teacher that failed the gate, the report and the pictures of the worst images; the message names both."""
    found = pending / FAILED_REPORT_FILE
    report, pictures = (folder.with_name(f"{folder.name}.{name}") for name in (REPORT_FILE, WORST_FOLDER))
    if not found.is_file():  # nothing was compared
        return message
    report.parent.mkdir(parents=True, exist_ok=True)
    found.replace(report)
    message = message.replace(str(found), str(report))
    shutil.rmtree(pictures, ignore_errors=True)
    if (pending / WORST_FOLDER).is_dir():
        (pending / WORST_FOLDER).replace(pictures)
        message += f"; their pictures are in {pictures}"
    return message


def teacher_digest(settings: ImportSettings) -> str:
    """sha256 (hex) over the files that `settings.path` names: one file, a folder of ours, or a SimCLR checkpoint by any of its names.

    Raises:
        ConfigError, CheckpointError: nothing there.
    """
    if settings.path is None:
        return ""
    path = Path(settings.path)
    if settings.kind == "simclr":
        from teacher_trainer.simclr_files import find_checkpoint

        checkpoint = find_checkpoint(path)
        found = sorted(p for p in checkpoint.prefix.parent.iterdir() if p.name.startswith(f"{checkpoint.prefix.name}."))
        found += [checkpoint.graph] if checkpoint.graph else []
    else:
        folders = [path, path / PLACES["classifier"], path / PLACES["pretrained"]]
        if settings.take == "pretrained":
            folders = [path, folders[2], folders[1]]
        said = (*(folder / MANIFEST for folder in folders), path / PLACES["teacher"])  # a manifest holds the sha256 of all beside it
        found = [path] if path.is_file() else [file for file in said if file.is_file()][:1]
    if not found:
        raise ConfigError(f"import.path {path} does not exist, or is a folder without a checkpoint or model.onnx")
    return digest_of({file.name: file_sha256(file) for file in found})


def _onnx(
    settings: ImportSettings,
    folder: Path,
    class_names: Sequence[str],
    stated: StatedPreprocessing,
    teacher: TeacherExportSettings,
    sample: Sample,
) -> Result:
    from distill.cli.parity_table import table_of_failed_parity
    from export.crop_size import travelling
    from export.imports import adopt_teacher, import_onnx, is_teacher_of_ours, num_weights, onnx_preprocessing, teacher_file

    path = _named(settings.path)
    if not teacher_file(path).is_file():
        raise ConfigError(f"{path} does not exist, or is a folder without model.onnx")
    if is_teacher_of_ours(path):
        info = adopt_teacher(path, folder, class_names, teacher.input_size or stated.image_size, teacher)
    else:
        preprocessing = onnx_preprocessing(path, stated)
        crops, names = sample(travelling(preprocessing, teacher.input_size))
        with table_of_failed_parity(folder):
            info = import_onnx(path, folder, preprocessing, class_names, crops, names, teacher, logits=settings.logits)
    return {
        "kind": "onnx",
        "made": "teacher",
        "architecture": path.name,
        "num_parameters": num_weights(teacher_file(folder)),
        "class_names": list(info.class_names),
        "preprocessing": info.preprocessing.model_dump(mode="json"),
        "made_for": {},
        "fingerprint": info.fingerprint,
        "notes": _class_notes(info.class_names),
    }


def crop_notes(result: Result, data: Preprocessing) -> list[str]:
    """What differs between the preprocessing that an imported network was made for and that of the run, a line each."""
    return [
        f"data.{name} is {_said(getattr(data, name))}, but it was made for {_said(own)}: set data.{name} to that, or lose accuracy"
        for name, own in result["made_for"].items()
        if _said(own) != _said(getattr(data, name))
    ]


def _said(value: float | str | Sequence[float]) -> str:
    return value if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else f"[{', '.join(f'{v:g}' for v in value)}]"


def _simclr(settings: ImportSettings, folder: Path, class_names: Sequence[str] | None, stated: StatedPreprocessing) -> Result:
    from teacher_trainer.simclr_import import CLASSIFIER_FOLDER, PRETRAINED_FOLDER, SimclrFound, import_simclr

    def bring(usual_size: int) -> tuple[Preprocessing, SimclrFound]:
        size = stated.image_size or usual_size
        # Values of 0 to 1: no mean, no std.
        seen = Preprocessing(
            image_size=size,
            crop_ratio=stated.crop_ratio or usual_crop_ratio(size),
            interpolation=stated.interpolation or "bicubic",
        )
        return seen, import_simclr(
            _named(settings.path),
            folder,
            class_names=class_names,
            image_size=seen.image_size,
            crop_ratio=seen.crop_ratio,
            interpolation=seen.interpolation,
            classifier_after=settings.classifier_after,
            use_ema=settings.use_ema,
            take=settings.take,
        )

    seen, found = bring(224)
    if stated.image_size is None and found.stem == "cifar":  # known only now
        seen, found = bring(32)
    made = found.taken
    names = class_names or [str(number) for number in range(found.num_classes or 0)]
    notes = _class_notes(names) if made == "classifier" else []
    if made == "pretrained" and (folder / CLASSIFIER_FOLDER).is_dir():
        looked_on = "the classifier that looked on in pretraining. `take: classifier` (--take classifier) makes it the teacher"
        notes.append(f"fine-tune it with `distill finetune` and the run file's labels; {CLASSIFIER_FOLDER} beside it holds {looked_on}")
    elif made == "pretrained":
        notes.append(NO_CLASSIFIER)
    elif (folder / PRETRAINED_FOLDER).is_dir():
        to_tune = "the backbone with the whole projection head; `take: pretrained` (--take pretrained) goes on with that, to be fine-tuned"
        notes.append(f"{PRETRAINED_FOLDER} beside it holds {to_tune}")
    return {
        "kind": "simclr",
        "made": made,
        "architecture": arch_name(found.network),
        "found": found.describe().splitlines(),
        "num_parameters": _num_parameters(folder / PLACES[made]),
        "class_names": list(names) if made == "classifier" else [],
        "preprocessing": seen.model_dump(mode="json"),
        "made_for": {"crop_ratio": usual_crop_ratio(seen.image_size), "interpolation": "bicubic"},
        "notes": notes,
    }


def _pretrained_in(path: Path, take: Take) -> Path | None:
    """Folder of the pretrained checkpoint that `path` names: that folder, a stage of another run, or what `distill import simclr` made.

    Raises:
        CheckpointError: there is none of the kind that is to be taken.
    """
    folders = [folder for folder in (path, path / PLACES["classifier"], path / PLACES["pretrained"]) if (folder / MANIFEST).is_file()]
    manifests = {folder: read_manifest(folder) for folder in folders}
    pretrained = [folder for folder in folders if manifests[folder].get("kind") == PRETRAINED]
    if take == "pretrained" and not pretrained:
        raise CheckpointError(f"take: pretrained, but {path} holds no pretrained checkpoint")
    if take == "classifier" and pretrained and pretrained == folders:
        raise CheckpointError(f"take: classifier, but {path} holds none; leave it out, and fine-tune what is there")
    if take == "classifier" or not pretrained:
        return None
    looked_on = folders[0] not in pretrained and manifests[folders[0]].get("card", {}).get("origin", {}).get(LOOKED_ON, False)
    return pretrained[0] if take == "pretrained" or folders[0] in pretrained or looked_on else None


def _pretrained(origin: Path, folder: Path, stated: StatedPreprocessing) -> Result:
    manifest = keep_weights(origin, folder / PLACES["pretrained"])
    network = validate(NetworkSettings, manifest["network"], origin=f"the manifest in {origin}")
    seen = pretrained_preprocessing(manifest, str(origin))
    return {
        "kind": "checkpoint",
        "made": "pretrained",
        "architecture": arch_name(network),
        "num_parameters": _num_parameters(folder / PLACES["pretrained"]),
        "class_names": [],
        "made_for": {},
        "preprocessing": stated.over(seen).replace(mean=seen.mean, std=seen.std).model_dump(mode="json"),
        "notes": [NO_CLASSIFIER],
    }


def _result(kind: str, folder: Path, card: ClassifierCard, notes: list[str]) -> Result:
    return {
        "kind": kind,
        "made": "classifier",
        "architecture": arch_name(card.network) + (f", classifier after head layer {card.num_head_layers}" if card.num_head_layers else ""),
        "num_parameters": _num_parameters(folder / "checkpoint"),
        "class_names": list(card.class_names),
        "preprocessing": card.preprocessing.model_dump(mode="json"),
        "made_for": card.preprocessing.model_dump(mode="json", include=CROPPING)
        if kind == "checkpoint"
        else card.origin.get("made_for", {}),
        "notes": notes + _class_notes(card.class_names),
    }


def _num_parameters(checkpoint: Path) -> int:
    """Of a checkpoint, from the header of its weights: what is trained, without the statistics of batch norm."""
    statistics = (".running_mean", ".running_var", ".num_batches_tracked")
    with safe_open(str(checkpoint / WEIGHTS), framework="np") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys() if not name.endswith(statistics))  # noqa: SIM118


def _class_notes(class_names: Sequence[str]) -> list[str]:
    twice = repeated(class_names)
    return [f"{len(twice)} names stand for more than one class: {', '.join(twice[:5])}"] if twice else []


def _needed(class_names: Sequence[str] | None) -> Sequence[str]:
    if class_names is None:
        raise ConfigError("the class names are needed; give --classes, or data.class_names in the run file")
    return class_names


def _named(path: str | Path | None) -> Path:
    assert path is not None  # `ImportSettings` sees to it, for every kind but timm
    return Path(path)
