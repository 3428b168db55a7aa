"""Settings of an optimiser and its learning-rate schedule."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from distill.config import Section


class OptimizerSettings(Section):
    """Optimiser, peak learning rate, warm-up and cosine decay."""

    name: Literal["sgd", "adamw"] = "sgd"
    """`sgd` (Nesterov momentum 0.9) or `adamw`."""
    learning_rate: float = Field(default=0.1, gt=0)
    """Peak learning rate, for the batch size of the run file (it is not rescaled)."""
    weight_decay: float = Field(default=1e-4, ge=0)
    """Decay of weights; biases and batch-norm parameters have none."""
    warmup_share: float = Field(default=0.05, ge=0, lt=1)
    """Share of all steps over which the rate rises linearly; then a cosine to 0."""
    max_grad_norm: float | None = Field(default=None, gt=0)
    """Gradients are scaled down to this L2 norm. None leaves them."""

    def rate_at(self, step: int, num_steps: int) -> float:
        """Learning rate of `step`, counted from 0."""
        warmup = math.ceil(self.warmup_share * num_steps)
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, num_steps - warmup)))
