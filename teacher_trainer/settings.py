"""Settings of the teacher's two training stages."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from distill.config import Section
from distill.models.settings import NetworkSettings
from distill.optimizer_settings import OptimizerSettings


class MemorySettings(Section):
    """Negatives from earlier steps: a moving average of the network embeds each step's views into a queue (SimCLRv2, section 2.1)."""

    size: int = Field(default=65536, ge=2)
    """Views in the queue. At least the views of one step, at most those of one epoch. An image's own earlier views in it are no negatives
    of it."""
    momentum: float = Field(default=0.999, ge=0, lt=1)
    """Share of the old weights in the moving average after a step."""


class PretrainSettings(Section):
    """Stage 1: contrastive pretraining without labels (SimCLRv2, section 2.1)."""

    network: NetworkSettings = NetworkSettings(depth=50, sk_ratio=0.0625)
    """The teacher's backbone."""
    num_head_layers: int = Field(default=3, ge=2, le=4)
    """Layers of the projection head; the paper's is 3."""
    embedding_dim: int = Field(default=128, ge=2)
    """Width of the embedding that the loss compares."""
    epochs: int = Field(default=100, ge=0)
    """Passes over the unlabelled images; 0 skips pretraining and leaves random weights."""
    global_batch: int = 256
    """Images of one step over all workers; each gives two views, the views of the other images are the negatives. At least 2."""
    micro_batch: int = Field(default=0, ge=0)
    """Images that one worker holds in memory at a time, for batches that do not fit; 0 for its whole part. The negatives are still those
    of the whole batch (at the price of a second forward pass, Gao et al. 2021); batch norm sees one micro-batch."""
    checkpoint_blocks: bool = False
    """Keep only the input of every residual block and compute the rest again in the backward pass: less memory, a third more time."""
    memory: MemorySettings | None = None
    """More negatives, from earlier steps; the paper reports about 1 % for it. None for those of the batch only."""
    contrastive_temperature: float = Field(default=0.1, gt=0)
    """Temperature of NT-Xent. The official code uses 0.1 for ImageNet and 0.5 for CIFAR."""
    min_area: float = Field(default=0.08, gt=0, le=1)
    """Smallest share of an image's area that a crop covers."""
    jitter_strength: float = Field(default=1.0, ge=0, le=2)
    """Strength of the colour jitter; the official code uses 1 for ImageNet, 0.5 for CIFAR."""
    blur_probability: float = Field(default=0.5, ge=0, le=1)
    """Share of views that are blurred; the official code uses none for CIFAR."""
    optimizer: OptimizerSettings = OptimizerSettings(learning_rate=0.1)
    """Optimiser and schedule."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Number format in which the network computes; `auto` takes bf16 where the hardware multiplies it faster. Loss and weights are
    float32."""
    checkpoint_every_s: float = Field(default=60, gt=0)
    """Seconds between checkpoints; one is written at the end anyway."""

    @field_validator("global_batch")
    @classmethod
    def _has_negatives(cls, global_batch: int) -> int:
        if global_batch < 2:
            raise ValueError("a batch of one image has no negatives; give at least 2")
        return global_batch

    @model_validator(mode="after")
    def _queue_holds_a_step(self) -> Self:
        if self.memory is not None and self.memory.size < 2 * self.global_batch:
            raise ValueError(f"memory.size {self.memory.size} is less than the {2 * self.global_batch} views of one step; make it larger")
        return self


class FinetuneSettings(Section):
    """Stage 2: fine-tuning on few labels from the middle of the projection head (SimCLRv2, section 2.2), or linear evaluation."""

    linear: bool = False
    """Linear evaluation: the backbone stays as it is, statistics too, no layer of the head is kept, and only a linear classifier on the
    backbone's features is trained. The paper's way to judge pretraining; its teacher is fine-tuned instead."""
    num_head_layers: int = Field(default=1, ge=0, le=3)
    """Layers of the projection head that are kept under the classifier: 1 is the paper's choice for few labels, 0 leaves the head out.
    Linear evaluation keeps none, whatever is said here."""
    epochs: int = Field(default=60, ge=1)
    """Passes over the labelled images; the paper makes 60 with 1 % of the labels, 30 with 10 % and with all, 90 in linear evaluation."""
    global_batch: int = Field(default=64, ge=2)
    """Images of one step over all workers. With fewer labelled images than this, a step takes all of them."""
    min_area: float = Field(default=0.08, gt=0, le=1)
    """Smallest share of an image's area that a crop covers."""
    backbone_rate_factor: float = Field(default=1.0, gt=0, le=1)
    """Learning rate of backbone and kept head layers, as a share of the classifier's. The paper has one rate for all; with small batches
    and few labels a smaller one keeps more of what pretraining has learnt."""
    optimizer: OptimizerSettings = OptimizerSettings(learning_rate=0.05, weight_decay=0.0, warmup_share=0.0)
    """Optimiser and schedule; the paper fine-tunes without warm-up and without weight decay."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Number format in which the network computes; `auto` takes bf16 where the hardware multiplies it faster. Weights are float32."""
    checkpoint_every_s: float = Field(default=60, gt=0)
    """Seconds between checkpoints; one is written at the end anyway."""

    @property
    def kept_head_layers(self) -> int:
        """Layers of the projection head between backbone and classifier."""
        return 0 if self.linear else self.num_head_layers
