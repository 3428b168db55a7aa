"""Someone else's network in torch -> a classifier checkpoint, like one that we trained: it can be evaluated, fine-tuned and exported.

Unit of data: one file of weights and the name of the network that it belongs to, timm's or ours. Nothing is downloaded, no pickled
object is loaded, and before anything is written the network has looked at one crop.

Shapes: B crops, H W pixels, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.checkpoint import MANIFEST, file_sha256
from distill.errors import CheckpointError, ConfigError
from distill.models.arch_names import arch_name, parse_arch
from distill.models.classifier import Classifier, build_classifier
from distill.models.saved_classifier import ClassifierCard, load_classifier, save_classifier
from distill.models.settings import NetworkSettings
from distill.models.timm_networks import create_timm
from distill.models.weight_files import fit_weights, read_weights, require_classes
from distill.teacher_info import Preprocessing
from export.contract import require_same_classes, require_same_size
from export.settings import StatedPreprocessing, usual_crop_ratio

STATED_NOTHING = StatedPreprocessing()
CHECKPOINT = "checkpoint"
"""Folder of the classifier in what `distill import` makes, and in a finished stage of a run."""
_LINEAR = "body.linear"
_NECK = "body.neck."


def import_timm(
    name: str,
    weights: Path | None,
    class_names: Sequence[str],
    folder: Path,
    stated: StatedPreprocessing = STATED_NOTHING,
    use_ema: bool = False,
) -> ClassifierCard:
    """Make a timm network a classifier checkpoint.

    Args:
        name: timm's name.
        weights: a local `.safetensors` or `.pth`; None initialises at random, for a network to be trained here.
        class_names: K names, in the order of the logits.
        folder: where the checkpoint is written.
        stated: preprocessing other than timm's own for this network.
        use_ema: take the averaged weights of the file.

    Raises:
        ConfigError: timm is not installed or has no such network, the file has other than K classes, or the network takes no such crops.
        CheckpointError: the weights cannot be read or belong to another network.
    """
    _require_two(class_names)
    created = create_timm(name, len(class_names), weights, use_ema)
    network = Classifier(created.network, stated.over(created.preprocessing))
    own = created.preprocessing.model_dump(mode="json", exclude={"image_size"})
    return _save(network, NetworkSettings(name=f"timm:{name}"), 0, class_names, folder, weights, made_for=own)


def import_torch(
    weights: Path,
    arch: str,
    class_names: Sequence[str],
    folder: Path,
    stated: StatedPreprocessing = STATED_NOTHING,
    use_ema: bool = False,
) -> ClassifierCard:
    """Make a state dict a classifier checkpoint.

    Args:
        weights: `.safetensors`, or `.pth` that holds tensors only.
        arch: the network that it belongs to, see `parse_arch`. Layers of the projection head under our classifiers are counted in the file.
        class_names: K names, in the order of the logits.
        folder: where the checkpoint is written.
        stated: preprocessing that the network was trained with. By default that of SimCLRv2: values of 0 to 1, 224 pixels (CIFAR stem: 32).
        use_ema: take the averaged weights of the file.

    Raises:
        ConfigError: arch is misspelt, the file has other than K classes, or the network takes no such crops.
        CheckpointError: the weights cannot be read or belong to another network; their names are listed.
    """
    settings = parse_arch(arch)
    if settings.name != "resnet":
        return import_timm(settings.name.removeprefix("timm:"), weights, class_names, folder, stated, use_ema)
    _require_two(class_names)
    tensors = _named_as_ours(read_weights(weights, use_ema), weights, settings)
    require_classes(tensors, (_LINEAR,), len(class_names), str(weights))
    size = stated.image_size or (32 if settings.stem == "cifar" else 224)
    preprocessing = stated.over(Preprocessing(image_size=size, crop_ratio=usual_crop_ratio(size)))
    num_head_layers = len({name.removeprefix(_NECK).partition(".")[0] for name in tensors if name.startswith(_NECK)})
    network = build_classifier(settings, len(class_names), preprocessing, num_head_layers)
    fit_weights(network, tensors, str(weights))
    return _save(network, settings, num_head_layers, class_names, folder, weights)


def import_checkpoint(source: Path, folder: Path, class_names: Sequence[str] | None, image_size: int | None) -> ClassifierCard:
    """Take over a classifier checkpoint of ours.

    Args:
        source: the checkpoint, or a folder with one in its `checkpoint`: what `distill import` made, or a stage of another run.
        folder: where the copy is written.
        class_names: of the run; they must be the checkpoint's. None takes any.
        image_size: of the run's crops; must be the checkpoint's. None takes any.

    Raises:
        ConfigError: it has other classes, or sees crops of another size.
        CheckpointError: no classifier there, or a damaged one.
    """
    inner = source / CHECKPOINT
    if (source / "model.onnx").is_file() and not inner.is_dir():
        raise CheckpointError(f"{source} holds an ONNX teacher, not a checkpoint: take it with kind: onnx")
    saved = load_classifier(source if (source / MANIFEST).is_file() or not inner.is_dir() else inner)
    require_same_classes(saved.card.class_names, class_names, str(source))
    require_same_size(saved.card.preprocessing, image_size, str(source))
    save_classifier(folder, saved.network, saved.card)
    return saved.card


def _require_two(class_names: Sequence[str]) -> None:
    if len(class_names) < 2:
        raise ConfigError(f"{len(class_names)} class names are given; a classifier has at least 2")


def _named_as_ours(tensors: dict[str, Tensor], path: Path, settings: NetworkSettings) -> dict[str, Tensor]:
    """Names as in our checkpoints, where the network is the body of a `Classifier`; a file may hold the body alone.

    Raises:
        CheckpointError: names of torchvision and timm, which build a ResNet otherwise.
    """
    if any(name.startswith("layer1.") for name in tensors):
        raise CheckpointError(
            f"{path} has the names of torchvision and timm (layer1...), not of SimCLRv2's ResNet: use --arch timm:resnet{settings.depth}"
        )
    if any(name.startswith("body.") for name in tensors):
        return tensors
    return {f"body.{name}": tensor for name, tensor in tensors.items()}


def _save(
    network: Classifier,
    settings: NetworkSettings,
    num_head_layers: int,
    class_names: Sequence[str],
    folder: Path,
    weights: Path | None,
    **known: Any,
) -> ClassifierCard:
    _look_at_one_crop(network, arch_name(settings), weights)
    origin: dict[str, Any] = {
        "imported_from": arch_name(settings),
        "weights": weights.name if weights else None,
        "weights_sha256": file_sha256(weights) if weights else None,
        **known,
    }
    card = ClassifierCard(
        network=settings,
        num_head_layers=num_head_layers,
        class_names=tuple(class_names),
        preprocessing=network.preprocessing,
        origin=origin,
    )
    save_classifier(folder, network, card)
    return card


def _look_at_one_crop(network: Classifier, name: str, weights: Path | None) -> None:
    """A network that fits the weights may still take no crops of this size (a transformer), and weights may be NaN.

    Raises:
        ConfigError: the network does not run on the crops.
        CheckpointError: its logits are not finite.
    """
    size = network.preprocessing.image_size
    network.eval()
    with torch.inference_mode():
        try:
            logits_BK = network(torch.full((1, size, size, 3), 127, dtype=torch.uint8))
        except (AssertionError, RuntimeError, ValueError) as error:  # timm asserts the size
            raise ConfigError(f"{name} does not take crops of {size} pixels: {' '.join(str(error).split())[:200]}") from error
    if not torch.isfinite(logits_BK).all():
        raise CheckpointError(f"{name} with the weights of {weights} gives logits that are not finite; the file is damaged")
