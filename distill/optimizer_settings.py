"""Settings of an optimiser and its learning-rate schedule."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field

from distill.config import Section


class OptimizerSettings(Section):
    """Optimiser, peak learning rate and how it follows the batch size, warm-up and cosine decay."""

    name: Literal["sgd", "lars", "adamw", "lamb"] = "sgd"
    """`sgd` (momentum), `lars` (momentum with a rate for each layer, for large batches: the paper's), `adamw`, or `lamb` (Adam with a rate
    for each layer, for large batches: You et al. 2020)."""
    learning_rate: float = Field(default=0.1, gt=0)
    """Peak learning rate, before `scaling`."""
    scaling: Literal["none", "linear", "sqrt"] = "none"
    """How the peak rate follows the global batch: `none` takes it as it is, `linear` times batch / 256 (Goyal et al. 2017), `sqrt` times
    the square root of the batch (the paper pretrains with 0.1 times the root of 4096, which is 6.4)."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Share of the last update in the next one, for `sgd` and `lars`."""
    nesterov: bool = True
    """Nesterov's momentum, for `sgd` only; the official code's `momentum` optimiser has it, its `lars` has not."""
    trust_coefficient: float = Field(default=0.001, gt=0)
    """`lars`: length of a layer's step at rate 1, as a share of the length of its weights."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """How much of the old mean, and of the old mean square, of the gradients is kept, for `adamw` and `lamb`."""
    eps: float | None = Field(default=None, gt=0)
    """Added to the root of the mean square of the gradients, for `adamw` and `lamb`. Default: 1e-8 for `adamw`, 1e-6 for `lamb`."""
    weight_decay: float = Field(default=1e-4, ge=0)
    """Decay of weights; biases and batch-norm parameters have none."""
    warmup_share: float = Field(default=0.05, ge=0, lt=1)
    """Share of all steps over which the rate rises linearly; then a cosine to 0."""
    max_grad_norm: float | None = Field(default=None, gt=0)
    """Gradients are scaled down to this L2 norm. None leaves them."""

    @property
    def epsilon(self) -> float:
        """`eps`, or its default for the optimiser."""
        return self.eps or (1e-6 if self.name == "lamb" else 1e-8)

    def peak_rate(self, global_batch: int) -> float:
        """The highest learning rate, for steps of `global_batch` images over all workers."""
        scale = {"none": 1.0, "linear": global_batch / 256, "sqrt": math.sqrt(global_batch)}
        return self.learning_rate * scale[self.scaling]

    def schedule_at(self, step: int, num_steps: int) -> float:
        """Share of the peak rate, 0 to 1, at which `step` is taken; steps are counted from 0."""
        warmup = math.ceil(self.warmup_share * num_steps)
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, num_steps - warmup)))
