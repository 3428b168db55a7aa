"""Settings of the teacher's two training stages."""

from __future__ import annotations

from pydantic import Field

from distill.config import Section
from distill.models.settings import NetworkSettings
from distill.optimizer_settings import OptimizerSettings


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
    global_batch: int = Field(default=256, ge=2)
    """Images of one step; each gives two views, the other views are the negatives. At least 2."""
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
    checkpoint_every_s: float = Field(default=60, gt=0)
    """Seconds between checkpoints; one is written at the end of every epoch anyway."""


class FinetuneSettings(Section):
    """Stage 2: supervised fine-tuning on few labels from the middle of the projection head (SimCLRv2, section 2.2)."""

    num_head_layers: int = Field(default=1, ge=0, le=3)
    """Layers of the projection head that are kept under the classifier: 1 is the paper's choice for few labels, 0 leaves the head out."""
    epochs: int = Field(default=60, ge=1)
    """Passes over the labelled images."""
    global_batch: int = Field(default=64, ge=2)
    """Images of one step."""
    min_area: float = Field(default=0.08, gt=0, le=1)
    """Smallest share of an image's area that a crop covers."""
    optimizer: OptimizerSettings = OptimizerSettings(learning_rate=0.05, weight_decay=0.0, warmup_share=0.0)
    """Optimiser and schedule; the paper fine-tunes without warm-up and without weight decay."""
