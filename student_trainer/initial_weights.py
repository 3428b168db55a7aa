"""What a student starts from when it is not random weights: a pretrained backbone, or a whole classifier (SimCLRv2, section 2.3).

A pretrained checkpoint gives the backbone and as many head layers as the student has; its linear classifier stays new. A classifier gives
everything. The networks must be the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from distill.checkpoint import PRETRAINED, Checkpoint, load_checkpoint, load_weights, require_same_pixels
from distill.config import validate
from distill.errors import CheckpointError
from distill.models.classifier import Classifier
from distill.models.saved_classifier import CLASSIFIER, ClassifierCard
from distill.models.settings import NetworkSettings
from student_trainer.settings import StudentSettings


def load_initial_weights(network: Classifier, settings: StudentSettings, class_names: tuple[str, ...], folder: Path) -> None:
    """Put the weights of a checkpoint into a fresh student.

    Raises:
        CheckpointError: no checkpoint there, damaged, of another kind, network, class list, mean or std.
    """
    found = load_checkpoint(folder)
    kind = found.manifest.get("kind")
    origin = f"student {settings.name}: {folder}"
    if kind == PRETRAINED:
        require_same_pixels(found.manifest, network.preprocessing, origin)
        weights = _from_pretrained(found, network, settings, origin)
    elif kind == CLASSIFIER:
        card = validate(ClassifierCard, found.manifest["card"], origin=f"the card in {folder}")
        _check_card(card, network, settings, class_names, origin)
        weights = found.weights
    else:
        raise CheckpointError(f"{origin} holds a {kind!r} checkpoint; a student starts from a pretrained one or a classifier")
    load_weights(network, weights, origin)


def _from_pretrained(found: Checkpoint, network: Classifier, settings: StudentSettings, origin: str) -> dict[str, Tensor]:
    """The student's state: its own linear classifier under the checkpoint's backbone and first head layers."""
    backbone = validate(NetworkSettings, found.manifest["network"], origin=f"the manifest in {origin}")
    if backbone != settings.network:
        raise CheckpointError(f"{origin} holds {_name(backbone)}, and the student is {_name(settings.network)}")
    # The last layer of the head makes the embedding; it is no layer to put a classifier on.
    num_layers = len({name.split(".")[2] for name in found.weights if name.startswith("head.layers.")}) - 1
    if settings.num_head_layers > num_layers:
        raise CheckpointError(f"{origin} has {num_layers} head layers below the last; num_head_layers is {settings.num_head_layers}")
    weights = {name: tensor for name, tensor in network.state_dict().items() if name.startswith("body.linear.")}
    for name, tensor in found.weights.items():
        part, _, rest = name.partition(".")
        if part == "backbone":
            weights[f"body.{name}"] = tensor
        elif part == "head" and int(rest.split(".")[1]) < settings.num_head_layers:
            weights[f"body.neck.{rest.removeprefix('layers.')}"] = tensor
    return weights


def _check_card(card: ClassifierCard, network: Classifier, settings: StudentSettings, class_names: tuple[str, ...], origin: str) -> None:
    if (card.network, card.num_head_layers) != (settings.network, settings.num_head_layers):
        theirs, ours = _name(card.network, card.num_head_layers), _name(settings.network, settings.num_head_layers)
        raise CheckpointError(f"{origin} holds {theirs}, and the student is {ours}")
    if card.class_names != class_names:
        raise CheckpointError(f"{origin} knows {_classes(card.class_names)}, and this run has {_classes(class_names)}")
    theirs_are, ours_are = ((p.mean, p.std) for p in (card.preprocessing, network.preprocessing))
    if theirs_are != ours_are:
        raise CheckpointError(f"{origin} was trained with data.mean and data.std {theirs_are}, and this run has {ours_are}")


def _name(network: NetworkSettings, num_head_layers: int | None = None) -> str:
    """A network in words: what it is called and all that is not the default."""
    said: dict[str, Any] = network.model_dump(exclude_defaults=True, exclude={"name", "depth"})
    if num_head_layers is not None:
        said["num_head_layers"] = num_head_layers
    name = f"{network.name} {network.depth}" if network.name == "resnet" else network.name
    return name + (f" ({', '.join(f'{key} {value}' for key, value in said.items())})" if said else "")


def _classes(names: tuple[str, ...]) -> str:
    return f"{len(names)} classes ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
