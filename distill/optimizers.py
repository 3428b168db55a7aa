"""An optimiser as the settings describe it."""

from __future__ import annotations

import torch
from torch import nn

from distill.optimizer_settings import OptimizerSettings


def build_optimizer(network: nn.Module, settings: OptimizerSettings) -> torch.optim.Optimizer:
    """Vectors (biases, batch-norm scales and offsets) get no weight decay."""
    trainable = [p for p in network.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if settings.name == "adamw":
        return torch.optim.AdamW(groups, lr=settings.learning_rate)
    return torch.optim.SGD(groups, lr=settings.learning_rate, momentum=0.9, nesterov=True)


def take_step(
    optimizer: torch.optim.Optimizer, network: nn.Module, loss: torch.Tensor, settings: OptimizerSettings, step: int, num_steps: int
) -> None:
    """One update at the schedule's rate for `step` of `num_steps`."""
    for group in optimizer.param_groups:
        group["lr"] = settings.rate_at(step, num_steps)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    if settings.max_grad_norm is not None:
        nn.utils.clip_grad_norm_(network.parameters(), settings.max_grad_norm)
    optimizer.step()
