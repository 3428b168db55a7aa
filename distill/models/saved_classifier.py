"""A trained classifier on disk: teachers and students alike. The manifest says how to build the network that the weights fit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from distill.checkpoint import load_checkpoint, load_weights, read_manifest, save_checkpoint
from distill.config import Section, validate
from distill.errors import CheckpointError, ConfigError
from distill.models.classifier import Classifier, build_classifier
from distill.models.settings import NetworkSettings
from distill.teacher_info import Preprocessing

CLASSIFIER = "classifier"
"""`kind` in the manifest."""
LOOKED_ON = "looked_on"
"""In the origin of a card: the classifier was trained beside pretraining, and is no teacher unless somebody says so."""


class ClassifierCard(Section):
    """What a saved classifier is."""

    network: NetworkSettings
    """Its network."""
    num_head_layers: int = 0
    """Layers of the projection head between backbone and classifier."""
    class_names: tuple[str, ...]
    """Names of the K classes, in the order of the logits."""
    preprocessing: Preprocessing
    """The contract between an image and the network."""
    origin: dict[str, Any] = Field(default_factory=dict)
    """Where it came from: parent checkpoint, settings, metrics."""


@dataclass(frozen=True)
class SavedClassifier:
    """A classifier read back."""

    network: Classifier
    card: ClassifierCard


def save_classifier(folder: Path, network: Classifier, card: ClassifierCard) -> None:
    """Write weights and card; `folder` holds the whole of it or what was there before."""
    save_checkpoint(folder, network.state_dict(), {"kind": CLASSIFIER, "card": card.model_dump(mode="json")})


def load_classifier(folder: Path) -> SavedClassifier:
    """Build the network that the card names and load its weights, in evaluation mode.

    Raises:
        CheckpointError: no checkpoint there, damaged, of another kind, or weights that do not fit the card.
    """
    found = load_checkpoint(folder)
    card = _card_of(found.manifest, folder)
    network = build_classifier(card.network, len(card.class_names), card.preprocessing, card.num_head_layers)
    load_weights(network, found.weights, str(folder))
    network.eval()
    return SavedClassifier(network, card)


def read_card(folder: Path) -> ClassifierCard:
    """What the classifier in `folder` is, without reading its weights.

    Raises:
        CheckpointError: no checkpoint there, damaged, or of another kind.
    """
    return _card_of(read_manifest(folder), folder)


def _card_of(manifest: dict[str, Any], folder: Path) -> ClassifierCard:
    if manifest.get("kind") != CLASSIFIER:
        raise CheckpointError(f"{folder} holds a {manifest.get('kind')!r} checkpoint, not a classifier")
    try:
        return validate(ClassifierCard, manifest.get("card"), origin=f"the card in {folder}")
    except ConfigError as error:
        raise CheckpointError(f"the checkpoint in {folder} is damaged: {error}") from error
