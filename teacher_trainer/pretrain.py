"""Stage 1, pretrain: a big network learns from images without labels (SimCLRv2, section 2.1).

image -> two crops (views 2e and 2e+1 of epoch e) -> colour distortion -> backbone -> projection head -> NT-Xent. Every random choice is a
function of (seed, epoch, step), so a run that was cut off continues with the very next step and ends with the same weights.

Shapes: B images, C = 3, H W pixels, D embedding.
"""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distill.checkpoint import load_checkpoint, load_weights, save_checkpoint
from distill.config import digest_of
from distill.crops import CropRecipe
from distill.data_settings import DataSettings
from distill.devices import best_device
from distill.errors import CheckpointError
from distill.loader import CropLoader, LoaderSettings
from distill.models.classifier import Normalize, build_backbone, check_image_size
from distill.models.projection_head import ProjectionHead
from distill.optimizers import build_optimizer, take_step
from distill.progress import ProgressLine
from distill.rejections import RejectionLog
from distill.sources import Source
from teacher_trainer.augment import distort
from teacher_trainer.contrastive import ContrastiveOutcome, nt_xent
from teacher_trainer.settings import PretrainSettings

logger = logging.getLogger(__name__)

PRETRAINED = "pretrained"
"""`kind` in the manifest of a pretrained checkpoint."""


class ContrastiveNetwork(nn.Module):
    """Normalisation, backbone and projection head; what pretraining trains and its checkpoint holds."""

    def __init__(self, settings: PretrainSettings, data: DataSettings) -> None:
        super().__init__()
        check_image_size(settings.network, data.image_size)
        self.normalize = Normalize(data.preprocessing)
        self.backbone = build_backbone(settings.network)
        self.head = ProjectionHead(self.backbone.feature_dim, settings.num_head_layers, settings.embedding_dim)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """float [B,3,H,W] in 0..1 -> embedding [B,D]."""
        return self.head(self.backbone((images_BCHW - self.normalize.mean_C11) / self.normalize.std_C11))


def pretrain(
    source: Source, data: DataSettings, settings: PretrainSettings, seed: int, folder: Path, rejections: RejectionLog
) -> dict[str, Any]:
    """Train to the end, from the last checkpoint in `folder` if there is one of the same settings.

    Returns:
        Last loss, contrastive accuracy, steps and seconds, plain data. `folder/checkpoint` holds the weights.

    Raises:
        TooManyRejected, ConfigError: see `CropLoader`.
    """
    device = best_device()
    torch.manual_seed(seed)
    network = ContrastiveNetwork(settings, data).to(device)
    optimizer = build_optimizer(network, settings.optimizer)
    recipe = CropRecipe(kind="random_resized", image_size=data.image_size, min_area=settings.min_area)
    loading = LoaderSettings(seed, settings.global_batch, data.window_shards, num_threads=data.num_threads)
    loader = CropLoader(source, recipe, loading, lambda epoch: (2 * epoch, 2 * epoch + 1), rejections)
    steps_per_epoch = loader.plan(0).num_steps
    num_steps = settings.epochs * steps_per_epoch
    identity = _identity(source, data, settings, seed)
    done, metrics = _resume(folder / "checkpoint", identity, network, optimizer)
    journal_path = folder / "metrics.jsonl"
    _cut_journal(journal_path, done)
    saved_at = time.monotonic()
    started = time.monotonic()

    def save(step: int) -> None:
        manifest = {"kind": PRETRAINED, "identity": identity, "step": step, "network": settings.network.model_dump(), "metrics": metrics}
        save_checkpoint(folder / "checkpoint", network.state_dict(), manifest, {"optimizer": optimizer.state_dict()})

    with ProgressLine("pretrain", num_steps * settings.global_batch) as line, journal_path.open("a", buffering=1) as journal:
        line.skip(done * settings.global_batch)
        for epoch in range(done // max(1, steps_per_epoch), settings.epochs):
            for batch in loader.epoch(epoch, start_step=done - epoch * steps_per_epoch):
                done += 1
                if len(batch.image_ids) < 2:
                    continue  # bad images left nothing to compare; the step is passed over
                generator = step_generator(seed, epoch, batch.step)
                outcome = _train_step(network, optimizer, batch.crops_VBHWC, settings, generator, done - 1, num_steps)
                metrics = {"loss": outcome.loss.item(), "accuracy": outcome.accuracy.item(), "entropy": outcome.entropy.item()}
                journal.write(json.dumps({"step": done, "epoch": epoch, **metrics}) + "\n")
                line.update(settings.global_batch, f"loss {metrics['loss']:.3f}, finds its partner {metrics['accuracy']:.0%}")
                if time.monotonic() - saved_at > settings.checkpoint_every_s:
                    save(done)
                    saved_at = time.monotonic()
            save(done)
    if num_steps == 0:
        save(0)
    return {"steps": done, "seconds": time.monotonic() - started, "digest": identity, **metrics}


def _train_step(
    network: ContrastiveNetwork,
    optimizer: torch.optim.Optimizer,
    crops_VBHWC: np.ndarray[Any, Any],
    settings: PretrainSettings,
    generator: torch.Generator,
    step: int,
    num_steps: int,
) -> ContrastiveOutcome:
    network.train()
    device = network.normalize.mean_C11.device
    # Both views go through the network as one batch: batch norm sees 2B images, as on the authors' accelerators.
    both_BHWC = torch.from_numpy(crops_VBHWC).flatten(0, 1).to(device)
    images_BCHW = both_BHWC.permute(0, 3, 1, 2).float() / 255
    images_BCHW = distort(images_BCHW, settings.jitter_strength, settings.blur_probability, generator)
    first_BD, second_BD = network(images_BCHW).chunk(2)
    outcome = nt_xent(first_BD, second_BD, settings.contrastive_temperature)
    take_step(optimizer, network, outcome.loss, settings.optimizer, step, num_steps)
    return outcome


def _identity(source: Source, data: DataSettings, settings: PretrainSettings, seed: int) -> str:
    """Names everything that the weights depend on, and nothing else: more threads or another interval of saving must not start afresh."""
    return digest_of(
        {
            "settings": settings.model_dump(mode="json", exclude={"checkpoint_every_s"}),
            "preprocessing": data.preprocessing.model_dump(mode="json"),
            "window_shards": data.window_shards,
            "seed": seed,
            "images": source.digest(),
        }
    )


def _cut_journal(path: Path, steps: int) -> None:
    """Take out of the journal what lies after the checkpoint: those steps are done, and written down, once more."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    path.write_text("".join(line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= steps), encoding="utf-8")


def _resume(checkpoint: Path, identity: str, network: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, dict[str, float]]:
    """Steps already done and what the last one said; 0 and nothing when there is no checkpoint of this identity."""
    try:
        found = load_checkpoint(checkpoint)
    except CheckpointError as error:
        logger.info("pretraining starts afresh: %s", error)
        return 0, {}
    if found.manifest.get("identity") != identity or found.state is None:
        return 0, {}
    load_weights(network, found.weights, str(checkpoint))
    optimizer.load_state_dict(found.state["optimizer"])
    return int(found.manifest["step"]), dict(found.manifest["metrics"])


def step_generator(seed: int, epoch: int, step: int) -> torch.Generator:
    """The random numbers of one step: a function of (seed, epoch, step) only."""
    state = np.random.SeedSequence([seed, epoch, step]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))
