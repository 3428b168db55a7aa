"""A published SimCLR or SimCLRv2 checkpoint -> checkpoints of ours, without TensorFlow (arXiv 2006.10029; google-research/simclr).

Unit of data: one checkpoint. files -> names (`simclr_names.py`) -> network (`simclr_architecture.py`) -> place of the classifier
(`simclr_classifier.py`) -> weights in torch's order -> `FOLDER/checkpoint` (a classifier, ready to be exported and served) or
`FOLDER/pretrained` (backbone and projection head, ready to be fine-tuned). A pretrained file whose linear classifier looked on gives both;
`taken` says which of them is meant, and the classifier's card says that it looked on.
Everything is read and checked before anything is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from distill.checkpoint import PRETRAINED, save_checkpoint
from distill.config import validate
from distill.crops import Interpolation
from distill.errors import CheckpointError, ConfigError
from distill.models.classifier import build_classifier, check_image_size
from distill.models.resnet import Stem
from distill.models.saved_classifier import LOOKED_ON, ClassifierCard, save_classifier
from distill.models.settings import NetworkSettings
from distill.teacher_info import Preprocessing
from teacher_trainer.simclr_checkpoint import SimclrCheckpoint, open_simclr
from teacher_trainer.simclr_classifier import ClassifierPlace, FoundPurpose, Purpose, find_purpose, place_classifier
from teacher_trainer.simclr_names import AVERAGES, SimclrFormat
from teacher_trainer.simclr_weights import classifier_weights, kept_head_layers, pretrained_weights

CLASSIFIER_FOLDER = "checkpoint"
PRETRAINED_FOLDER = "pretrained"

Taken: TypeAlias = Literal["classifier", "pretrained"]


@dataclass(frozen=True)
class SimclrFound:
    """What a published checkpoint turned out to be."""

    kind: Purpose
    """What its last run was for; supervised training and linear evaluation count as fine-tuned."""
    format: SimclrFormat
    """Which code wrote it; a TF1 hub module is `tf1`."""
    step: int | None
    """Training step, where the file says."""
    depth: int
    """Of the ResNet."""
    width_multiplier: float
    """Of the ResNet."""
    sk_ratio: float
    """Of the ResNet; 0 for plain convolutions."""
    stem: Stem
    """Of the ResNet."""
    num_head_layers: int
    """Layers of the projection head in the file; 0 for none."""
    embedding_dim: int | None
    """Width of the head's output; None without a head."""
    num_classes: int | None
    """Classes of the classifier; None without one."""
    classifier_after: int | None
    """Layers of the projection head below the classifier; None without one."""
    num_parameters: int
    """Numbers in the backbone with the moving statistics of batch norm, as the paper's table counts."""
    taken: Taken
    """What a run goes on with."""
    ignored: Mapping[str, int]
    """How many tensors of each kind were left out."""
    notes: tuple[str, ...]
    """What was concluded from what, and what the user may want to say differently."""

    @property
    def network(self) -> NetworkSettings:
        """The backbone."""
        return NetworkSettings(depth=self.depth, width_multiplier=self.width_multiplier, sk_ratio=self.sk_ratio, stem=self.stem)

    def describe(self) -> str:
        """A few lines for people."""
        at_step = "" if self.step is None else f", step {self.step}"
        kernels = f"selective kernels (sk_ratio {self.sk_ratio:g})" if self.sk_ratio else "no selective kernels"
        head = f"{self.num_head_layers} layers, embedding of {self.embedding_dim}" if self.num_head_layers else "none"
        lines = [
            f"{'pretrained or fine-tuned' if self.kind is Purpose.UNKNOWN else self.kind} SimCLR network ({self.format}{at_step})",
            f"backbone: ResNet-{self.depth}, width x{self.width_multiplier:g}, {kernels}, {self.stem} stem, "
            f"{self.num_parameters / 1e6:.2f} M parameters",
            f"projection head: {head}",
            f"classifier: {self._classifier()}",
        ]
        if any(self.ignored.values()):
            lines.append("left out: " + ", ".join(f"{count} {kind}" for kind, count in sorted(self.ignored.items()) if count))
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def _classifier(self) -> str:
        if self.num_classes is None:
            return "none"
        return f"{self.num_classes} classes " + (
            "(left out)" if self.classifier_after is None else f"after head layer {self.classifier_after}"
        )


def import_simclr(
    path: Path,
    folder: Path,
    *,
    class_names: Sequence[str] | None,
    image_size: int,
    crop_ratio: float = 0.875,
    interpolation: Interpolation = "bicubic",
    classifier_after: int | None = None,
    use_ema: bool = False,
    take: Literal["auto"] | Taken = "auto",
) -> SimclrFound:
    """Make a published checkpoint ours.

    Args:
        path: prefix, `.index` file, folder or SavedModel folder of the checkpoint.
        folder: where `checkpoint/` (a classifier), `pretrained/`, or both are written.
        class_names: K names in the order of the logits; None gives them their numbers.
        image_size: height and width, in pixels, of the crops that the network is to see; the published ones saw 224.
        crop_ratio: see `Preprocessing`; the official evaluation uses 0.875, and 1 for images of 32 pixels.
        interpolation: see `Preprocessing`; that of the official code is bicubic.
        classifier_after: layers of the projection head below the classifier (-1: on the head's output), where it is known better.
        use_ema: take the moving averages of the weights in place of the weights.
        take: what the run goes on with, see `ImportSettings`. With `pretrained` no classifier is written, and no class list is needed.

    Raises:
        CheckpointError: nothing there, damaged, of another network, or with tensors missing or left over, which are listed; or it does not
            hold what is to be taken.
        ConfigError: a class list of another length, or an image size that the network cannot see.
    """
    checkpoint = open_simclr(path, use_ema)
    seen = {"image_size": image_size, "crop_ratio": crop_ratio, "interpolation": interpolation}
    preprocessing = validate(Preprocessing, seen, origin="preprocessing")
    check_image_size(checkpoint.network, image_size)
    step = checkpoint.step()
    purpose = find_purpose(checkpoint, step)
    taken = _taken(checkpoint, purpose, take)
    if taken == "classifier" and not _names_fit(checkpoint, class_names):
        way_out = ", or take: pretrained (--take pretrained) to fine-tune it on classes of your own"
        other = way_out if _can_be_tuned(checkpoint, purpose) else ""
        raise ConfigError(
            f"{len(class_names or ())} class names are given, and the classifier in {checkpoint.files.prefix} has {checkpoint.num_classes}"
            f" classes: give one name for each, in the order of the logits{other}"
        )
    left_out = taken == "pretrained" and (take == "pretrained" or not _names_fit(checkpoint, class_names))
    place = None if left_out and checkpoint.num_classes is not None else _place(checkpoint, classifier_after, purpose, step)
    found = _found(checkpoint, purpose, place, step, class_names, use_ema, taken)
    origin = {"imported_from": f"SimCLR ({found.format})", "checkpoint": checkpoint.files.prefix.name, "step": step, "ema": use_ema}
    # All tensors are read, and their check sums compared, before anything is written.
    contrastive = pretrained_weights(checkpoint) if _can_be_tuned(checkpoint, purpose) else None
    classifier = None if place is None else classifier_weights(checkpoint, place.after)
    if contrastive is not None:
        save_checkpoint(folder / PRETRAINED_FOLDER, contrastive, _pretrained_manifest(found, preprocessing, origin))
    if classifier is not None and place is not None:
        card = ClassifierCard(
            network=found.network,
            num_head_layers=kept_head_layers(checkpoint, place.after),
            class_names=tuple(class_names or map(str, range(found.num_classes or 0))),
            preprocessing=preprocessing,
            origin={**origin, **({LOOKED_ON: True} if taken == "pretrained" else {})},
        )
        _save_classifier(folder / CLASSIFIER_FOLDER, classifier, card)
    return found


def _names_fit(checkpoint: SimclrCheckpoint, class_names: Sequence[str] | None) -> bool:
    return class_names is None or checkpoint.num_classes in (None, len(class_names))


def _can_be_tuned(checkpoint: SimclrCheckpoint, purpose: FoundPurpose) -> bool:
    """Whether the projection head is there, as pretraining left it, as far as the file tells."""
    return bool(checkpoint.num_head_layers) and (purpose.purpose is not Purpose.FINE_TUNED or bool(purpose.doubt))


def _taken(checkpoint: SimclrCheckpoint, purpose: FoundPurpose, take: Literal["auto"] | Taken) -> Taken:
    prefix = checkpoint.files.prefix
    if take == "classifier" and checkpoint.num_classes is None:
        raise CheckpointError(f"take: classifier, but {prefix} holds none; leave it out, and fine-tune what is there")
    if take == "pretrained" and not _can_be_tuned(checkpoint, purpose):
        raise CheckpointError(
            f"take: pretrained, but {prefix} is fine-tuned or has no projection head; leave it out: its classifier is taken"
        )
    if take != "auto":
        return take
    looked_on = purpose.purpose is Purpose.PRETRAINED and _can_be_tuned(checkpoint, purpose)
    return "pretrained" if checkpoint.num_classes is None or looked_on else "classifier"


def _place(checkpoint: SimclrCheckpoint, given: int | None, purpose: FoundPurpose, step: int | None) -> ClassifierPlace | None:
    """Where the classifier sits; None if there is none."""
    if checkpoint.num_classes is not None:
        return place_classifier(given, checkpoint, purpose, step)
    prefix = checkpoint.files.prefix
    if not checkpoint.num_head_layers:
        raise CheckpointError(f"{prefix} holds a backbone alone, and no projection head or classifier: nothing to fine-tune or to serve")
    if given is not None:
        raise CheckpointError(f"classifier_after {given} is given, but {prefix} holds no classifier; leave it out")
    return None


def _found(
    checkpoint: SimclrCheckpoint,
    purpose: FoundPurpose,
    place: ClassifierPlace | None,
    step: int | None,
    class_names: Sequence[str] | None,
    use_ema: bool,
    taken: Taken,
) -> SimclrFound:
    ignored = dict(checkpoint.names.ignored)
    if use_ema:
        ignored["weights before averaging"] = ignored.pop(AVERAGES)
    return SimclrFound(
        kind=purpose.purpose,
        format=checkpoint.names.format,
        step=step,
        depth=checkpoint.network.depth,
        width_multiplier=checkpoint.network.width_multiplier,
        sk_ratio=checkpoint.network.sk_ratio,
        stem=checkpoint.network.stem,
        num_head_layers=checkpoint.num_head_layers,
        embedding_dim=checkpoint.embedding_dim,
        num_classes=checkpoint.num_classes,
        classifier_after=None if place is None else place.after,
        num_parameters=checkpoint.num_backbone_parameters,
        taken=taken,
        ignored=ignored,
        notes=tuple(_notes(checkpoint, purpose, place, class_names)),
    )


def _notes(
    checkpoint: SimclrCheckpoint, purpose: FoundPurpose, place: ClassifierPlace | None, class_names: Sequence[str] | None
) -> list[str]:
    """What was concluded, and what the user may want to say differently."""
    if place is None and checkpoint.num_classes is not None:
        looked_on = ", which looked on in pretraining," if purpose.purpose is Purpose.PRETRAINED else ""
        return [f"its classifier of {checkpoint.num_classes} classes{looked_on} is left out", *([purpose.doubt] if purpose.doubt else [])]
    if place is None:
        return ["there is no classifier: fine-tune it" + (", the class list is not used" if class_names is not None else "")]
    notes = [f"the classifier is taken to sit after head layer {place.after} ({place.reason})"]
    if place.doubt:
        notes.append(place.doubt)
    if place.after > kept_head_layers(checkpoint, place.after):
        notes.append("the head's last layer has no ReLU; it is multiplied into the classifier, which gives the same logits")
    if purpose.doubt:
        notes.append(f"{purpose.doubt}: both a classifier and a pretrained checkpoint are written")
    if class_names is None:
        notes.append(f"no class list was given: the classes are called 0 to {(checkpoint.num_classes or 0) - 1}")
    return notes


def _pretrained_manifest(found: SimclrFound, preprocessing: Preprocessing, origin: dict[str, Any]) -> dict[str, Any]:
    return {
        "kind": PRETRAINED,
        "network": found.network.model_dump(),
        "num_head_layers": found.num_head_layers,
        "embedding_dim": found.embedding_dim,
        "preprocessing": preprocessing.model_dump(mode="json"),
        "step": found.step,
        "metrics": {},
        "origin": origin,
    }


def _save_classifier(folder: Path, weights: dict[str, Tensor], card: ClassifierCard) -> None:
    with torch.device("meta"):  # the weights are put in its place, not copied: the largest network has 3 GB of them
        network = build_classifier(card.network, len(card.class_names), card.preprocessing, card.num_head_layers)
    network.load_state_dict(weights, assign=True)
    save_classifier(folder, network, card)
