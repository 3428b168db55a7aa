"""network -> teacher folder -> model repository: the only ways by which a teacher comes to be served.

    network -> fp32 graph -> [top outputs] -> [fp16 or int8] -> parity gate -> fingerprint -> model.onnx -> repository

Unit of data: one teacher folder, with `model.onnx` (the teacher graph, its `TeacherInfo` in the metadata; weights over 2 GB in a second
file), `parity.json`, which names that teacher, and, in `worst/`, the crops that it is worst on. `model.onnx` appears under this name only
after it has passed the parity gate; the report of a graph that failed is `parity-failed.json`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import nn

from distill.teacher_info import Preprocessing, TeacherInfo
from export.crop_size import resize_first, travelling, with_resize
from export.fingerprint import load_model, read_teacher_info, stamp_teacher
from export.graph import export_teacher_graph, save_model
from export.label_space import Crops
from export.large_models import sweep_weights
from export.parity import Reference, require_parity, torch_reference
from export.settings import TeacherExportSettings
from export.teacher_precision import found_precision, set_precision, split_crops
from export.top_outputs import add_top_outputs
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
        preprocessing: what an image goes through before it is a crop, and what the network does to a crop first. Its `image_size` is
            the network's own; where `settings.input_size` is another, the graph resizes, and the teacher states that size.
        class_names: K names, in the order of the logits.
        crops_NHWC: uint8 [N,H,W,3], real crops: the first `num_parity_images` for the parity gate, what follows for the ranges of fp16
            and int8.
        image_ids: N names of their images.
        folder: the teacher folder, made if it is not there. An older teacher in it stays until this one has passed.

    Raises:
        ConfigError: a name, or a number of classes, that cannot be; too few crops for fp16 or int8.
        ParityError: the graph does not say what the network says; `parity-failed.json` names the worst crops.
    """
    stated = travelling(preprocessing, settings.input_size)
    own_size, size = preprocessing.image_size, stated.image_size
    reference = torch_reference(with_resize(network, own_size, size))
    with unchecked_model(folder) as path:
        export_teacher_graph(network, own_size, path, opset=settings.opset)
        if size != own_size:
            save_model(resize_first(load_model(path), size, own_size), path)
        return admit_teacher(path, folder, reference, stated, class_names, crops_NHWC, image_ids, settings, version)


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
    *,
    as_it_is: bool = False,
) -> TeacherInfo:
    """Give an fp32 teacher graph its outputs and precision, write into it who it is, let it through the parity gate, and give it its name.

    With `as_it_is` the graph is in `settings.precision` already, and only the limits are that precision's. Raises as `export_teacher`.
    """
    if as_it_is or settings.precision == "fp32":
        compared, measured_on = crops_NHWC[: settings.num_parity_images], crops_NHWC[:0]
    else:
        compared, measured_on = split_crops(crops_NHWC, settings.num_parity_images)
    if settings.top_outputs:
        model = load_model(path)
        add_top_outputs(model, settings.top_outputs)
        save_model(model, path)
    made = found_precision(path, settings) if as_it_is else set_precision(path, measured_on, settings)
    info = stamp_teacher(
        path,
        name=settings.name,
        class_names=class_names,
        preprocessing=preprocessing,
        version=version,
        default_temperature=settings.default_temperature,
        precision=settings.precision,
        top_outputs=settings.top_outputs,
    )
    report = made.check(reference, compared, list(image_ids[: len(compared)])).replace(fingerprint=info.fingerprint)
    require_parity(report, folder, f"teacher {settings.name}", compared)
    path.replace(folder / TEACHER_FILE)
    return info


def publish_teacher(
    folder: Path, repository: Path, settings: TeacherExportSettings, *, replace: bool = False, version: int | None = None
) -> ServedModel:
    """Put the teacher of a teacher folder into a Triton model repository, and serve it, as the version it says or another one.

    Raises as `write_repository`.
    """
    model = folder / TEACHER_FILE
    info = read_teacher_info(model)
    info = info if version is None else info.replace(version=version)
    return write_repository(repository, model, info, settings.repository, replace=replace)


@contextlib.contextmanager
def unchecked_model(folder: Path) -> Iterator[Path]:
    """A path for a model that has not passed the gate; what still lies there at the end is removed."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "unchecked.onnx"
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)
        sweep_weights(folder)
