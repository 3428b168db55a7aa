"""LARS: stochastic gradient descent whose step length is set layer by layer (You et al. 2017, arXiv 1708.03888).

SimCLR's large batches need a large rate, and with one rate for all layers some diverge: LARS makes the step of every weight matrix a fixed
share of the matrix itself. The order of things is that of SimCLR's official `lars_optimizer.py`, which the published hyper-parameters mean:

    gradient += weight_decay * weights
    trust     = trust_coefficient * |weights| / |gradient|, or 1 where either norm is 0
    buffer    = momentum * buffer + rate * trust * gradient      (the rate is inside: a smaller rate leaves the old momentum as it is)
    weights  -= buffer

Which parameters have neither decay nor trust ratio is for `distill.optimizers` to say; here it is a property of the parameter group.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor


class LayerwiseOptimizer(torch.optim.Optimizer):
    """An optimiser that updates one parameter after the other, by `_update`."""

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weights in group["params"]:
                if weights.grad is not None:
                    self._update(weights, weights.grad, group)
        return loss

    @abstractmethod
    def _update(self, weights: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        """Change `weights` in place; what is remembered of them goes into `self.state[weights]`."""


class Lars(LayerwiseOptimizer):
    """LARS with classic momentum. Its state is one buffer for each parameter, all in `state_dict`.

    Args:
        groups: parameter groups; each may override the settings below.
        lr: rate, times the trust ratio where `adapt` holds.
        momentum: share of the last update that goes into the next.
        weight_decay: added to the gradient, times the weights.
        trust_coefficient: length of a step of rate 1 as a share of the length of the weights.
        adapt: whether the group's parameters have a trust ratio; without it they are updated as by plain momentum.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
        adapt: bool = True,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "adapt": adapt,
        }
        super().__init__(groups, defaults)

    def _update(self, weights: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[weights]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(weights)
        gradient = gradient.add(weights, alpha=group["weight_decay"])
        rate = group["lr"] * (trust_ratio(weights, gradient, group["trust_coefficient"]) if group["adapt"] else 1.0)
        buffer = state["momentum_buffer"].mul_(group["momentum"]).add_(gradient * rate)
        weights.sub_(buffer)


def trust_ratio(weights: Tensor, gradient: Tensor, coefficient: float) -> Tensor:
    """coefficient * |weights| / |gradient|, and 1 where either norm is 0: a tensor [], so that the accelerator is not waited for."""
    weight_norm, gradient_norm = torch.linalg.vector_norm(weights), torch.linalg.vector_norm(gradient)
    ratio = coefficient * weight_norm / gradient_norm
    return torch.where((weight_norm > 0) & (gradient_norm > 0), ratio, torch.ones_like(ratio))
