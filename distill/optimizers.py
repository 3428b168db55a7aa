"""An optimiser as the settings describe it, and one update with it.

    loss.backward(), once or (gradient accumulation) several times  ->  apply_step

`take_step` is both for the usual case of one loss a step. Whoever must look at the size of the gradient before it is used takes
`gradient_norm` and `update` in place of `apply_step`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from distill.lamb import Lamb
from distill.lars import Lars
from distill.models.classifier import ResNetClassifier
from distill.optimizer_settings import OptimizerSettings


def build_optimizer(
    network: nn.Module, settings: OptimizerSettings, global_batch: int, body_rate_factor: float = 1.0
) -> torch.optim.Optimizer:
    """The optimiser of all parameters of `network` that are trained.

    Vectors (biases, batch-norm scales and offsets) have no weight decay and, under LARS and LAMB, no trust ratio. The matrix of a linear
    classifier has decay but no trust ratio, as in SimCLR's official code: it starts at 0, where the ratio means nothing.

    Args:
        global_batch: images of one update over all workers and accumulated parts; what `settings.scaling` goes by.
        body_rate_factor: rate of everything below the linear classifier, as a share of the classifier's.
    """
    heads = [module.linear for module in network.modules() if isinstance(module, ResNetClassifier)]
    in_head = {id(parameter) for head in heads for parameter in head.parameters()}
    peak = settings.peak_rate(global_batch)
    groups: dict[tuple[bool, bool], dict[str, Any]] = {}
    for parameter in network.parameters():
        if not parameter.requires_grad:
            continue
        matrix, head = parameter.ndim > 1, id(parameter) in in_head
        group = groups.setdefault(
            (matrix, head),
            {
                "params": [],
                "weight_decay": settings.weight_decay if matrix else 0.0,
                "adapt": matrix and not head,
                "peak_rate": peak if head else peak * body_rate_factor,
            },
        )
        group["params"].append(parameter)
    if settings.name == "adamw":
        return torch.optim.AdamW(groups.values(), lr=peak, betas=settings.betas, eps=settings.epsilon)
    if settings.name == "lamb":
        return Lamb(groups.values(), lr=peak, betas=settings.betas, eps=settings.epsilon)
    if settings.name == "lars":
        return Lars(groups.values(), lr=peak, momentum=settings.momentum, trust_coefficient=settings.trust_coefficient)
    nesterov = settings.nesterov and settings.momentum > 0  # torch refuses the one without the other
    return torch.optim.SGD(groups.values(), lr=peak, momentum=settings.momentum, nesterov=nesterov)


def apply_step(optimizer: torch.optim.Optimizer, network: nn.Module, settings: OptimizerSettings, step: int, num_steps: int) -> None:
    """One update with the gradients that are there, at the schedule's rate for `step` of `num_steps`; then there are none."""
    norm = gradient_norm(network) if settings.max_grad_norm is not None else None
    update(optimizer, network, settings, step, num_steps, norm)


def gradient_norm(network: nn.Module) -> Tensor:
    """L2 norm, float32 [], of all gradients that are there, as if they were one vector; it stays on their device."""
    return nn.utils.get_total_norm([parameter.grad for parameter in network.parameters() if parameter.grad is not None])


def update(
    optimizer: torch.optim.Optimizer, network: nn.Module, settings: OptimizerSettings, step: int, num_steps: int, norm: Tensor | None
) -> None:
    """`apply_step` where the norm of the gradients is known already; it is needed where they are clipped."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_rate"] * settings.schedule_at(step, num_steps)
    if settings.max_grad_norm is not None:
        assert norm is not None
        nn.utils.clip_grads_with_norm_(network.parameters(), settings.max_grad_norm, norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def take_step(
    optimizer: torch.optim.Optimizer, network: nn.Module, loss: Tensor, settings: OptimizerSettings, step: int, num_steps: int
) -> None:
    """The gradient of `loss`, and one update with it."""
    loss.backward()
    apply_step(optimizer, network, settings, step, num_steps)
