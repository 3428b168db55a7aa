"""Stage 2, fine-tune: the pretrained network learns the classes from few labels (SimCLRv2, section 2.2).

The classifier sits on the middle of the projection head, not on the backbone: with few labels its first layer is worth keeping. All
weights are trained, the kept head layer too. Crops and flips only, no colour distortion.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from distill.checkpoint import load_checkpoint, load_weights
from distill.crops import CropRecipe
from distill.data_settings import DataSettings
from distill.devices import best_device
from distill.errors import CheckpointError, ConfigError
from distill.loader import CropLoader, LoaderSettings
from distill.models.classifier import Classifier, ResNetClassifier
from distill.optimizers import build_optimizer, take_step
from distill.progress import ProgressLine
from distill.rejections import RejectionLog
from distill.sources import Source
from teacher_trainer.pretrain import PRETRAINED, ContrastiveNetwork
from teacher_trainer.settings import FinetuneSettings, PretrainSettings


def classifier_from_pretrained(
    checkpoint: Path, data: DataSettings, pretraining: PretrainSettings, num_head_layers: int, num_classes: int
) -> Classifier:
    """The pretrained backbone and the first layers of its head, under a new linear classifier.

    Raises:
        CheckpointError: no pretrained checkpoint there, or of another network.
        ConfigError: more head layers asked for than lie below the last one.
    """
    if num_head_layers >= pretraining.num_head_layers:
        raise ConfigError(
            f"finetune.num_head_layers {num_head_layers} must be below pretrain.num_head_layers {pretraining.num_head_layers}"
        )
    found = load_checkpoint(checkpoint)
    if found.manifest.get("kind") != PRETRAINED:
        raise CheckpointError(f"{checkpoint} holds a {found.manifest.get('kind')!r} checkpoint, not a pretrained one")
    contrastive = ContrastiveNetwork(pretraining, data)
    load_weights(contrastive, found.weights, str(checkpoint))
    neck = contrastive.head.first_layers(num_head_layers)
    return Classifier(ResNetClassifier(contrastive.backbone, neck, num_classes), data.preprocessing)


def finetune(
    network: Classifier,
    labelled: Source,
    data: DataSettings,
    settings: FinetuneSettings,
    seed: int,
    rejections: RejectionLog,
) -> dict[str, Any]:
    """Train `network` in place on the labels of `labelled`.

    Args:
        labelled: only images whose label may be used.

    Returns:
        Last loss, steps and seconds, plain data.
    """
    device = best_device()
    network.to(device)
    torch.manual_seed(seed)
    optimizer = build_optimizer(network, settings.optimizer)
    recipe = CropRecipe(kind="random_resized", image_size=data.image_size, min_area=settings.min_area)
    loading = LoaderSettings(seed, settings.global_batch, data.window_shards, num_threads=data.num_threads)
    loader = CropLoader(labelled, recipe, loading, lambda epoch: (epoch,), rejections)
    num_steps = settings.epochs * loader.plan(0).num_steps
    started, done, loss_value = time.monotonic(), 0, float("nan")
    with ProgressLine("finetune", num_steps * settings.global_batch) as line:
        for epoch in range(settings.epochs):
            for batch in loader.epoch(epoch):
                done += 1
                if len(batch.image_ids) < 2:
                    continue  # bad images left fewer than batch norm needs; the step is passed over
                network.train()
                logits_BK = network(torch.from_numpy(batch.crops_VBHWC[0]).to(device))
                loss = F.cross_entropy(logits_BK, torch.from_numpy(batch.labels_B).to(device))
                take_step(optimizer, network, loss, settings.optimizer, done - 1, num_steps)
                loss_value = loss.item()
                line.update(settings.global_batch, f"loss {loss_value:.3f}")
    return {"steps": done, "seconds": time.monotonic() - started, "loss": loss_value, "num_labelled": labelled.num_images}
