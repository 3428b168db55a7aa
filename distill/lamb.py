"""LAMB: Adam whose step length is set layer by layer (You et al. 2020, "Large Batch Optimization for Deep Learning", arXiv 1904.00962).

Algorithm 2 of the paper, with decoupled weight decay inside the step whose length is set:

    mean      = beta1 * mean + (1 - beta1) * gradient
    square    = beta2 * square + (1 - beta2) * gradient^2
    direction = mean / (1 - beta1^t) / (sqrt(square / (1 - beta2^t)) + eps) + weight_decay * weights
    trust     = |weights| / |direction|, or 1 where either norm is 0      (the paper's scaling function phi is the identity here)
    weights  -= rate * trust * direction

Which parameters have neither decay nor trust ratio is for `distill.optimizers` to say; here it is a property of the parameter group.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from distill.lars import LayerwiseOptimizer, trust_ratio


class Lamb(LayerwiseOptimizer):
    """LAMB. Its state is two moments and a count of steps for each parameter, all in `state_dict`.

    Args:
        groups: parameter groups; each may override the settings below.
        lr: rate: the length of a step as a share of the length of the weights, where `adapt` holds.
        betas: how much of the old mean and of the old mean square is kept.
        eps: added to the root of the mean square.
        weight_decay: times the weights, added to the step's direction.
        adapt: whether the group's parameters have a trust ratio; without it they are updated as by AdamW.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        adapt: bool = True,
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "adapt": adapt})

    def _update(self, weights: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[weights]
        if not state:
            state.update(step=0, mean=torch.zeros_like(weights), square=torch.zeros_like(weights))
        state["step"] += 1
        beta1, beta2 = group["betas"]
        mean = state["mean"].lerp_(gradient, 1 - beta1)
        square = state["square"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        root = (square / (1 - beta2 ** state["step"])).sqrt_().add_(group["eps"])
        direction = (mean / (1 - beta1 ** state["step"])).div_(root).add_(weights, alpha=group["weight_decay"])
        rate = group["lr"] * (trust_ratio(weights, direction, 1.0) if group["adapt"] else 1.0)
        weights.sub_(direction * rate)
