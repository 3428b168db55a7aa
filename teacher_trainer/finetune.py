"""Stage 2, fine-tune: the pretrained network learns a task from few labels (SimCLRv2, section 2.2), or is judged by a linear classifier.

The classifier sits on the middle of the projection head, not on the backbone: with few labels its first layer is worth keeping. All
weights are trained, the kept head layer too; in linear evaluation none but the classifier's. The loop is `teacher_trainer/supervised.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from distill.checkpoint import PRETRAINED, load_checkpoint, load_weights, require_same_pixels
from distill.cluster.worker import Worker
from distill.config import Section
from distill.data_settings import DataSettings
from distill.errors import CheckpointError, ConfigError
from distill.image_sets import open_labelled, open_labelled_subset
from distill.models.classifier import Classifier, ResNetClassifier, build_classifier
from distill.models.saved_classifier import ClassifierCard
from distill.models.settings import NetworkSettings
from distill.rejections import RejectionLog
from distill.teacher_info import Preprocessing
from teacher_trainer.settings import FinetuneSettings
from teacher_trainer.supervised import train_supervised


class FinetuneJob(Section):
    """Everything that a worker needs to know to fine-tune one network; plain data."""

    data: DataSettings
    """The images, by absolute paths."""
    finetune: FinetuneSettings
    """What is trained, and how."""
    network: NetworkSettings
    """The backbone."""
    pretrained: str | None = None
    """Folder of the pretrained checkpoint. None trains fresh weights: the supervised baseline."""
    seed: int
    """Seed of label choice, crops, order and fresh weights."""
    class_names: tuple[str, ...]
    """Names of the K classes."""
    origin: dict[str, Any] = Field(default_factory=dict)
    """What the checkpoint says of where it came from: digests of the stages before."""
    rejected_path: str
    """Where unusable images are listed."""


def finetune_worker(config: dict[str, Any], worker: Worker) -> None:
    """Entry point of one worker: the checkpoint that it ends with is the fine-tuned classifier, with `result` (steps, loss, and the
    `ClassifierScores` on the test images under `scores`) in its manifest.

    Args:
        config: a `FinetuneJob` as plain data.

    Raises:
        CheckpointError, ConfigError, SourceError, TooManyRejected: see `network_of` and `train_supervised`.
    """
    job = FinetuneJob.model_validate(config)
    network = network_of(job)
    card = ClassifierCard(
        network=job.network,
        num_head_layers=job.finetune.kept_head_layers,
        class_names=job.class_names,
        preprocessing=job.data.preprocessing,
        origin=job.origin,
    )
    labelled, test = open_labelled_subset(job.data, job.seed), open_labelled(job.data.test, job.data)
    with RejectionLog(Path(job.rejected_path), job.data.max_rejected_share) as rejections:
        train_supervised(network, card, labelled, job.data, job.finetune, job.seed, worker, rejections, test)


def network_of(job: FinetuneJob) -> Classifier:
    """The network that the job starts with, the same in every worker: the pretrained one, or one with fresh weights of its seed.

    Raises:
        CheckpointError, ConfigError: see `classifier_from_pretrained` and `build_classifier`.
    """
    num_head_layers, num_classes = job.finetune.kept_head_layers, len(job.class_names)
    torch.manual_seed(job.seed)
    if job.pretrained is None:
        return build_classifier(job.network, num_classes, job.data.preprocessing, num_head_layers)
    return classifier_from_pretrained(Path(job.pretrained), job.network, job.data.preprocessing, num_head_layers, num_classes)


def classifier_from_pretrained(
    checkpoint: Path, network: NetworkSettings, preprocessing: Preprocessing, num_head_layers: int, num_classes: int
) -> Classifier:
    """The pretrained backbone and the first layers of its head, under a new linear classifier.

    Raises:
        CheckpointError: no pretrained checkpoint there, of another network, or pretrained on pixels normalised in another way.
        ConfigError: more head layers asked for than lie below the last one.
    """
    found = load_checkpoint(checkpoint)
    if found.manifest.get("kind") != PRETRAINED:
        raise CheckpointError(f"{checkpoint} holds a {found.manifest.get('kind')!r} checkpoint, not a pretrained one")
    require_same_pixels(found.manifest, preprocessing, str(checkpoint))
    layers = {name.split(".")[2] for name in found.weights if name.startswith("head.layers.")}
    if num_head_layers >= len(layers):
        raise ConfigError(
            f"finetune.num_head_layers {num_head_layers} must be below {len(layers)}, the layers of the projection head in {checkpoint}"
        )
    classifier = build_classifier(network, num_classes, preprocessing, num_head_layers)
    body = classifier.body
    if not isinstance(body, ResNetClassifier):
        raise CheckpointError(f"{checkpoint} holds one of our ResNets, and the network asked for is {network.name!r}")
    for part, prefix in ((body.backbone, "backbone."), *((layer, f"head.layers.{i}.") for i, layer in enumerate(body.neck))):
        weights = {name.removeprefix(prefix): tensor for name, tensor in found.weights.items() if name.startswith(prefix)}
        load_weights(part, weights, str(checkpoint))
    return classifier
