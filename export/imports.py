"""A ready ONNX classifier -> a teacher folder, through the parity gate. Networks in torch come in by `export/torch_imports.py`.

Unit of data: one ONNX file, of someone else (images in float or uint8) or of ours (a teacher folder that is taken over as it is).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from distill.errors import ConfigError, ParityError
from distill.teacher_info import METADATA_KEY, Preprocessing, TeacherInfo
from export.contract import require_same_classes, require_same_size
from export.crop_size import resized_pixels, travelling
from export.files import write_atomically
from export.fingerprint import load_model, read_teacher_info, write_teacher_info
from export.foreign_model import ImageInput, forget_initialiser_inputs
from export.label_space import Crops, Logits
from export.parity import Reference
from export.parity_files import REPORT_FILE, report_of
from export.sessions import open_session_of
from export.settings import StatedPreprocessing, TeacherExportSettings, usual_crop_ratio
from export.teacher import TEACHER_FILE, admit_teacher, unchecked_model
from export.teacher_precision import weights_precision
from export.wrap import Wrapped, wrap_classifier


def import_onnx(
    source: Path,
    folder: Path,
    preprocessing: Preprocessing,
    class_names: Sequence[str],
    crops_NHWC: Crops,
    image_ids: Sequence[str],
    settings: TeacherExportSettings,
    *,
    logits: str | None = None,
    version: int = 1,
) -> TeacherInfo:
    """Make a ready ONNX classifier a teacher, and compare what it says now with what the original says.

    Args:
        source: float or uint8 input, NCHW or NHWC.
        folder: the teacher folder.
        preprocessing: as the model was trained with; mean and std on the scale 0 to 1.
        class_names: K names, in the order of the logits.
        crops_NHWC: uint8 [N,H,W,3], real crops for the parity gate, of `settings.input_size` where that is given.
        image_ids: N names of their images.
        settings: where they leave `precision` open, it is that of the source's weights.
        logits: the tensor that holds the logits, where the model has several outputs or ends in a softmax.

    Raises:
        ConfigError: the model has a form that cannot be wrapped, other classes than named, or weights of less precision than asked for.
        ParityError: the wrapped model does not say what the original says.
    """
    found = weights_precision(source)
    if "precision" not in settings.model_fields_set:
        settings = settings.replace(precision=found)
    elif found not in ("fp32", settings.precision):
        raise ConfigError(
            f"{source.name} has weights in {found}, so precision {settings.precision} cannot be had from it: leave precision out, which"
            " takes it as it is, or give the fp32 model"
        )
    as_it_is = found == settings.precision
    with unchecked_model(folder) as path:
        wrapped = wrap_classifier(source, path, preprocessing, logits, settings.input_size)
        reference = original_reference(source, wrapped, preprocessing)
        _require_classes(reference(crops_NHWC[:1]), class_names, source)
        stated = travelling(preprocessing, settings.input_size)
        return admit_teacher(path, folder, reference, stated, class_names, crops_NHWC, image_ids, settings, version, as_it_is=as_it_is)


def onnx_preprocessing(source: Path, stated: StatedPreprocessing) -> Preprocessing:
    """The contract of a ready ONNX classifier: what is stated, and the crop size that its input itself declares.

    Raises:
        ConfigError: the input is of no fixed size and none is stated, or takes floats and no mean and std are stated.
    """
    graph = load_model(source).graph
    forget_initialiser_inputs(graph)
    if len(graph.input) != 1:
        raise ConfigError(f"{source.name} has {len(graph.input)} inputs; a classifier of images has one")
    tensor = graph.input[0].type.tensor_type
    dims = [dim.dim_value for dim in tensor.shape.dim]
    sides = set(dims[2:] if dims[1:2] == [3] else dims[1:3])
    size = stated.image_size or (sides.pop() if len(dims) == 4 and len(sides) == 1 else 0)
    if size <= 0:
        raise ConfigError(f"{source.name} takes images of shape {dims} (0 is any size); say the size it was trained on with --image-size")
    if tensor.elem_type != onnx.TensorProto.UINT8 and (stated.mean is None or stated.std is None):
        raise ConfigError(
            f"{source.name} takes floats, so it needs the mean and std that it was trained with: give --mean and --std"
            " (0,0,0 and 1,1,1 where values go from 0 to 1)"
        )
    return stated.over(Preprocessing(image_size=size, crop_ratio=usual_crop_ratio(size)))


def adopt_teacher(
    source: Path, folder: Path, class_names: Sequence[str], image_size: int | None, settings: TeacherExportSettings
) -> TeacherInfo:
    """Take over a teacher that `import_onnx` or `export_teacher` made: the same graph and weights, under the name that `settings` give.

    Args:
        source: its teacher folder, or `model.onnx` in it.
        folder: the new teacher folder.
        class_names: of the run; they must be the teacher's.
        image_size: of the run's crops; must be the teacher's. None takes any.

    Raises:
        ConfigError: it has other classes, or sees crops of another size.
        ParityError: no report beside it says that this very teacher passed the gate.
        BadInput: no teacher of ours, or one that was altered.
    """
    model = teacher_file(source)
    info = read_teacher_info(model)
    require_same_classes(info.class_names, class_names, str(source))
    require_same_size(info.preprocessing, image_size, str(source))
    _require_as_it_is(info, settings, source)
    report = report_of(model, info.fingerprint)
    if report is None:
        raise ParityError(
            f"beside {model} no {REPORT_FILE} says that teacher {info.fingerprint[:12]} passed the parity gate: give the folder that"
            " `distill export-teacher` or `distill import` made, or export the teacher again"
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / REPORT_FILE, report)
    info = info.replace(name=settings.name, default_temperature=settings.default_temperature)
    write_teacher_info(model, info, folder / TEACHER_FILE)
    return info


def _require_as_it_is(info: TeacherInfo, settings: TeacherExportSettings, source: Path) -> None:
    """A finished graph is taken over as it is: another precision or other outputs would be another teacher, with another fingerprint."""
    found_in = {"precision": info.precision, "top_outputs": info.top_outputs, "input_size": info.preprocessing.image_size}
    for name, found in found_in.items():
        wanted = getattr(settings, name)
        if name in settings.model_fields_set and wanted not in (None, found):
            raise ConfigError(
                f"{source} is a finished teacher with {name} {found}, so teacher.{name}: {wanted} comes too late: leave it out, or"
                " import what the teacher was made from"
            )


def is_teacher_of_ours(source: Path) -> bool:
    """Whether `source` is a teacher folder, or an ONNX file that carries a `TeacherInfo`.

    Raises:
        StageMissing, BadInput: see `load_model`.
    """
    return METADATA_KEY in {entry.key for entry in load_model(teacher_file(source)).metadata_props}


def teacher_file(source: Path) -> Path:
    """The ONNX file that a path names: itself, or the one in a teacher folder."""
    return source / TEACHER_FILE if source.is_dir() else source


def num_weights(path: Path) -> int:
    """Numbers in the tensors of an ONNX file: its parameters, and the few constants around them."""
    return sum(math.prod(tensor.dims) for tensor in load_model(path).graph.initializer)


def _require_classes(logits_BK: Logits, class_names: Sequence[str], source: Path) -> None:
    """Before the gate, which would otherwise run to its end over a class list that does not fit."""
    if logits_BK.shape[1] != len(class_names):
        raise ConfigError(
            f"{source.name} gives {logits_BK.shape[1]} logits a crop, but {len(class_names)} class names are given: they must be equal"
        )


def original_reference(source: Path, wrapped: Wrapped, preprocessing: Preprocessing) -> Reference:
    """The untouched model, fed with crops that numpy normalised in float64: what the wrapped graph has to agree with."""
    model = load_model(source)
    if wrapped.logits not in {value.name for value in model.graph.output}:
        model.graph.output.append(onnx.ValueInfoProto(name=wrapped.logits))
    session = open_session_of(model.SerializeToString(), source.name)
    image = wrapped.image

    def reference(crops_BHWC: Crops) -> Logits:
        pixels = _as_input(_own_size(crops_BHWC, preprocessing.image_size), image, preprocessing)
        batches = np.split(pixels, len(pixels)) if image.fixed_batch else [pixels]
        return np.concatenate([session.run([wrapped.logits], {image.name: batch})[0] for batch in batches])

    return reference


def _own_size(crops_BHWC: Crops, size: int) -> npt.NDArray[Any]:
    """Crops at the model's own size: themselves, or float pixels of 0 to 255."""
    return crops_BHWC if crops_BHWC.shape[1] == size else resized_pixels(crops_BHWC, size)


def _as_input(crops_BHWC: npt.NDArray[Any], image: ImageInput, preprocessing: Preprocessing) -> npt.NDArray[Any]:
    """Crops in the type and layout of the model's own input."""
    pixels = np.rint(crops_BHWC).astype(np.uint8) if image.takes_uint8 else crops_BHWC
    if not image.takes_uint8:
        normalised = (crops_BHWC.astype(np.float64) / 255.0 - np.array(preprocessing.mean)) / np.array(preprocessing.std)
        pixels = normalised.astype(onnx.helper.tensor_dtype_to_np_dtype(image.element_type))
    return np.ascontiguousarray(pixels if image.channels_last else pixels.transpose(0, 3, 1, 2))
