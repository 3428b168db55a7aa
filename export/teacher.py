"""network -> teacher folder -> model repository: the only ways by which a teacher comes to be served.

Unit of data: one teacher folder, with `model.onnx` (the teacher graph, its `TeacherInfo` in the metadata) and `parity.json`.
`model.onnx` appears under this name only after it has passed the parity gate.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import nn

from distill.teacher_info import Preprocessing, TeacherInfo
from export.fingerprint import read_teacher_info, stamp_teacher
from export.graph import export_teacher_graph
from export.label_space import Crops
from export.parity import Reference, check_parity, require_parity, torch_reference
from export.settings import TeacherExportSettings
from export.triton_repository import ServedModel, write_repository

TEACHER_FILE = "model.onnx"
"""The teacher graph in a teacher folder."""


def export_teacher(
    network: nn.Module,
    preprocessing: Preprocessing,
    class_names: Sequence[str],
    crops_NHWC: Crops,
    image_ids: Sequence[str],
    folder: Path,
    settings: TeacherExportSettings,
    version: int = 1,
) -> TeacherInfo:
    """Export a trained network as a teacher.

    Args:
        network: uint8 [B,H,W,3] -> logits [B,K].
        preprocessing: what an image goes through before it is a crop, and what the network does to a crop first.
        class_names: K names, in the order of the logits.
        crops_NHWC: uint8 [N,H,W,3], real crops for the parity gate; the first `num_parity_images` are used.
        image_ids: N names of their images.
        folder: the teacher folder, made if it is not there. An older teacher in it stays until this one has passed.

    Raises:
        ConfigError: a name, or a number of classes, that cannot be.
        ParityError: the graph does not say what the network says; `parity.json` names the worst crops.
    """
    with unchecked_model(folder) as path:
        export_teacher_graph(network, preprocessing.image_size, path, opset=settings.opset)
        return admit_teacher(path, folder, torch_reference(network), preprocessing, class_names, crops_NHWC, image_ids, settings, version)


def admit_teacher(
    path: Path,
    folder: Path,
    reference: Reference,
    preprocessing: Preprocessing,
    class_names: Sequence[str],
    crops_NHWC: Crops,
    image_ids: Sequence[str],
    settings: TeacherExportSettings,
    version: int = 1,
) -> TeacherInfo:
    """Let a teacher graph through the parity gate, write into it who it is, and give it its name. Raises as `export_teacher`."""
    count = settings.num_parity_images
    report = check_parity(reference, path, crops_NHWC[:count], image_ids[:count], settings.parity, settings.parity_temperatures)
    require_parity(report, folder, f"teacher {settings.name}")
    info = stamp_teacher(
        path,
        name=settings.name,
        class_names=class_names,
        preprocessing=preprocessing,
        version=version,
        default_temperature=settings.default_temperature,
    )
    path.replace(folder / TEACHER_FILE)
    return info


def publish_teacher(folder: Path, repository: Path, settings: TeacherExportSettings, *, replace: bool = False) -> ServedModel:
    """Put the teacher of a teacher folder into a Triton model repository. Raises as `write_repository`."""
    model = folder / TEACHER_FILE
    return write_repository(repository, model, read_teacher_info(model), settings.repository, replace=replace)


@contextlib.contextmanager
def unchecked_model(folder: Path) -> Iterator[Path]:
    """A path for a model that has not passed the gate; what still lies there at the end is removed."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "unchecked.onnx"
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)
