"""A network on several workers as if it were on one: gradients averaged over them, batch norm over the whole global batch.

With `world` 1 both functions hand back the network as it came. They need nothing of Ray, only an initialised `torch.distributed`.

Shapes: B crops of this worker, C channels, ... further dimensions.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from distill.cluster.worker import Worker
from distill.errors import ConfigError

N = TypeVar("N", bound=nn.Module)


def wrap(network: nn.Module, worker: Worker) -> nn.Module:
    """The network whose backward pass averages gradients over the workers. Its weights start as those of worker 0.

    The average weighs workers alike: a loss that is a mean over unequal parts of a batch is to be scaled by the worker's share of it.
    """
    if worker.world == 1:
        return network
    # Statistics that are reduced over all workers are the same everywhere; others would drift apart, so worker 0's are taken.
    synchronised = any(isinstance(module, nn.SyncBatchNorm | _GlobalBatchNorm) for module in network.modules())
    devices = [worker.device] if worker.device.type == "cuda" else None
    return DistributedDataParallel(network, device_ids=devices, forward_sync_buffers=not synchronised)


def sync_batch_norm(network: N, worker: Worker) -> N:
    """The network, changed in place: its batch norms take mean and variance over all workers. Parameters and their names stay.

    Raises:
        ConfigError: a kind of batch norm that does more than torch's own (some of timm's).
    """
    if worker.world == 1:
        return network
    known = (*_KINDS, *_KINDS.values(), nn.SyncBatchNorm)
    special = sorted({type(m).__name__ for m in network.modules() if isinstance(m, _BatchNorm) and type(m) not in known})
    if special:
        raise ConfigError(f"{', '.join(special)} cannot be synchronised over {worker.world} workers; use ray.num_workers=1")
    if worker.device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(network)
    for module in list(network.modules()):
        for name, child in module.named_children():
            kind = _KINDS.get(type(child))
            if kind is not None:
                setattr(module, name, kind.like(child))
    return network


def sum_over_workers(tensor: Tensor) -> Tensor:
    """The sum of everybody's `tensor` (of one shape), with gradient. All workers call it together, and their backward passes too."""
    return _SumOverWorkers.apply(tensor)


class _SumOverWorkers(torch.autograd.Function):
    """Every worker's loss depends on every worker's part of the sum: the gradients are summed as well."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return sum_over_workers(gradient)


class _GlobalBatchNorm(_BatchNorm):
    """Batch norm over all workers on any device (torch's own synchronised one refuses to run on CPUs)."""

    @classmethod
    def like(cls, plain: nn.Module) -> _GlobalBatchNorm:
        """One with the parameters and statistics of `plain`, the very same tensors."""
        assert isinstance(plain, _BatchNorm)
        own = cls(plain.num_features, plain.eps, plain.momentum, plain.affine, plain.track_running_stats)
        own._parameters.update(plain._parameters)
        own._buffers.update(plain._buffers)
        own.training = plain.training
        return own

    def forward(self, features: Tensor) -> Tensor:
        """[B,C] or [B,C,...] -> the same shape and type. In training all workers call it together; their B may differ."""
        self._check_input_dim(features)
        if not self.training:
            return super().forward(features)
        mean_C, variance_C, count = self._statistics(features.float())  # bf16 would lose the statistics
        self._remember(mean_C, variance_C, count)
        shape = (1, -1) + (1,) * (features.ndim - 2)
        scale_C = torch.rsqrt(variance_C + self.eps) if self.weight is None else torch.rsqrt(variance_C + self.eps) * self.weight
        normalised = (features.float() - mean_C.view(shape)) * scale_C.view(shape)
        return (normalised if self.bias is None else normalised + self.bias.view(shape)).to(features.dtype)

    def _statistics(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and biased variance of each channel, [C], and the number of values of one channel, [1], over all W workers."""
        values_NC = features.movedim(1, -1).flatten(0, -2)
        count = features.new_full((1,), len(values_NC))
        own_C = values_NC.sum(0) / count.clamp(min=1)
        row = torch.cat([own_C, (values_NC - own_C).square().sum(0), count])
        # Everybody's row by one sum of tables that are 0 elsewhere; means and squares around them, so that no digits are lost.
        table_W = features.new_zeros(dist.get_world_size(), len(row)).index_add(
            0, torch.tensor([dist.get_rank()], device=row.device), row[None]
        )
        mean_WC, squares_WC, count_W1 = sum_over_workers(table_W).split([self.num_features, self.num_features, 1], dim=1)
        num = count_W1.sum(0).detach()
        mean_C = (count_W1 * mean_WC).sum(0) / num
        return mean_C, (squares_WC + count_W1 * (mean_WC - mean_C).square()).sum(0) / num, num

    @torch.no_grad()
    def _remember(self, mean_C: Tensor, variance_C: Tensor, count: Tensor) -> None:
        """Move the running statistics; the variance among them is the unbiased one, as in torch."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        share = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean_C, share)
        self.running_var.lerp_(variance_C * count / (count - 1).clamp(min=1), share)


class GlobalBatchNorm1d(_GlobalBatchNorm, nn.BatchNorm1d):
    """`nn.BatchNorm1d` over all workers."""


class GlobalBatchNorm2d(_GlobalBatchNorm, nn.BatchNorm2d):
    """`nn.BatchNorm2d` over all workers."""


_KINDS: dict[type[nn.Module], type[_GlobalBatchNorm]] = {nn.BatchNorm1d: GlobalBatchNorm1d, nn.BatchNorm2d: GlobalBatchNorm2d}
