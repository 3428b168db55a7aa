"""Someone else's network -> a teacher of ours, or a checkpoint that becomes one. Nothing is downloaded.

Unit of data: one file of weights. A ready ONNX classifier ends as a teacher folder; a timm network ends as a checkpoint, like one that we
trained: it can be fine-tuned, evaluated and exported.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from distill.errors import ConfigError
from distill.models.classifier import Classifier
from distill.models.saved_classifier import ClassifierCard, save_classifier
from distill.models.settings import NetworkSettings
from distill.models.timm_networks import create_timm
from distill.teacher_info import Preprocessing, TeacherInfo
from export.fingerprint import load_model
from export.foreign_model import ImageInput
from export.label_space import Crops, Logits
from export.parity import Reference
from export.sessions import open_session_of
from export.settings import TeacherExportSettings
from export.teacher import admit_teacher, unchecked_model
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
        crops_NHWC: uint8 [N,H,W,3], real crops for the parity gate.
        image_ids: N names of their images.
        logits: the tensor that holds the logits, where the model has several outputs or ends in a softmax.

    Raises:
        ConfigError: the model has a form that cannot be wrapped, or other classes than named.
        ParityError: the wrapped model does not say what the original says.
    """
    with unchecked_model(folder) as path:
        wrapped = wrap_classifier(source, path, preprocessing, logits)
        reference = original_reference(source, wrapped, preprocessing)
        return admit_teacher(path, folder, reference, preprocessing, class_names, crops_NHWC, image_ids, settings, version)


def import_timm(
    name: str,
    weights: Path | None,
    class_names: Sequence[str],
    folder: Path,
    preprocessing: Preprocessing | None = None,
) -> ClassifierCard:
    """Make a timm network a classifier checkpoint.

    Args:
        name: timm's name.
        weights: a local `.safetensors` or `.pth`; None initialises at random, for a network to be trained here.
        class_names: K names, in the order of the logits.
        folder: where the checkpoint is written.
        preprocessing: other than timm's own for this network.

    Raises:
        ConfigError: timm is not installed or has no such network.
        CheckpointError: the weights cannot be read or belong to another network.
    """
    if len(class_names) < 2:
        raise ConfigError(f"{len(class_names)} class names are given; a classifier has at least 2")
    created = create_timm(name, len(class_names), weights)
    card = ClassifierCard(
        network=NetworkSettings(name=f"timm:{name}"),
        class_names=tuple(class_names),
        preprocessing=preprocessing or created.preprocessing,
        origin={"imported_from": f"timm:{name}", "weights": weights.name if weights else None},
    )
    save_classifier(folder, Classifier(created.network, card.preprocessing), card)
    return card


def original_reference(source: Path, wrapped: Wrapped, preprocessing: Preprocessing) -> Reference:
    """The untouched model, fed with crops that numpy normalised in float64: what the wrapped graph has to agree with."""
    model = load_model(source)
    if wrapped.logits not in {value.name for value in model.graph.output}:
        model.graph.output.append(onnx.ValueInfoProto(name=wrapped.logits))
    session = open_session_of(model.SerializeToString(), source.name)
    image = wrapped.image

    def reference(crops_BHWC: Crops) -> Logits:
        pixels = _as_input(crops_BHWC, image, preprocessing)
        batches = np.split(pixels, len(pixels)) if image.fixed_batch else [pixels]
        return np.concatenate([session.run([wrapped.logits], {image.name: batch})[0] for batch in batches])

    return reference


def _as_input(crops_BHWC: Crops, image: ImageInput, preprocessing: Preprocessing) -> npt.NDArray[Any]:
    """Crops in the type and layout of the model's own input."""
    pixels: npt.NDArray[Any] = crops_BHWC
    if not image.takes_uint8:
        normalised = (crops_BHWC.astype(np.float64) / 255.0 - np.array(preprocessing.mean)) / np.array(preprocessing.std)
        pixels = normalised.astype(onnx.helper.tensor_dtype_to_np_dtype(image.element_type))
    return np.ascontiguousarray(pixels if image.channels_last else pixels.transpose(0, 3, 1, 2))
