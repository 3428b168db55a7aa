"""A network that rounds like int8 while it computes in float: what a student is fine-tuned with before it becomes an int8 file.

Weights of convolutions and linear layers: symmetric, one scale a channel. Their inputs: 256 steps between the smallest and the largest
value on calibration crops. Both let the gradient through as if there were no rounding (straight-through, Bengio et al. 2013; Jacob et al.
2018). Batch norm must be frozen: then it is a factor for each channel, which the file folds into the weights and which a scale for each
channel does not notice. Additions and pooling, which the file rounds as well, are left in float here.

Unit of data: one network. Shapes: N crops.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from distill.errors import DistillError

LEVELS = 255
"""Steps of an 8-bit activation."""
_TINY = 1e-12
_CALIBRATION_BATCH = 64


class RoundedWeight(nn.Module):
    """float32 weight [out, ...] -> the same, rounded for each output channel to integers of `bits` bits times a scale."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.largest = 2 ** (bits - 1) - 1

    def forward(self, weight: Tensor) -> Tensor:
        """Same shape; the scale follows the weight."""
        scale = weight.detach().abs().flatten(1).amax(dim=1).clamp_min(_TINY) / self.largest
        zero = torch.zeros_like(scale, dtype=torch.int32)
        return torch.fake_quantize_per_channel_affine(weight, scale, zero, 0, -self.largest, self.largest)


class RoundedInput:
    """A hook before a layer: rounds what goes in, or (while `observing`) notes its range."""

    def __init__(self) -> None:
        self.observing = False
        self.low, self.high = 0.0, 0.0  # zero is always among the values: it must be exact, as padding is zero

    def __call__(self, layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        features, *rest = inputs
        if self.observing:
            self.low = min(self.low, float(features.detach().min()))
            self.high = max(self.high, float(features.detach().max()))
            return inputs
        scale = max(self.high - self.low, _TINY) / LEVELS
        zero = round(-self.low / scale)
        return (torch.fake_quantize_per_tensor_affine(features, scale, zero, 0, LEVELS), *rest)


class FakeQuantised:
    """A network whose layers round. Made by `fake_quantised`."""

    def __init__(self, network: nn.Module, inputs: list[RoundedInput]) -> None:
        self.network = network
        self._inputs = inputs

    @torch.no_grad()
    def measure_ranges(self, crops_NHWC: Tensor) -> None:
        """Take the ranges of all inputs from these crops, uint8 [N,H,W,3], on the network's device."""
        for rounded in self._inputs:
            rounded.low, rounded.high, rounded.observing = 0.0, 0.0, True
        for start in range(0, len(crops_NHWC), _CALIBRATION_BATCH):
            self.network(crops_NHWC[start : start + _CALIBRATION_BATCH])
        for rounded in self._inputs:
            rounded.observing = False


@contextmanager
def fake_quantised(network: nn.Module, weight_bits: int) -> Iterator[FakeQuantised]:
    """Let a network round, in place, for the while; afterwards it computes in float again, with the weights that training left.

    Args:
        network: in evaluation mode, so that batch norm is frozen.
        weight_bits: 8, or 7 for processors whose 8-bit multiply-add saturates.

    Raises:
        DistillError: it has no convolution or linear layer of torch's own.
    """
    layers = [module for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    if not layers:
        raise DistillError("the student has no nn.Conv2d and no nn.Linear whose rounding could be trained for")
    inputs = [RoundedInput() for _ in layers]
    with ExitStack() as undo:
        for layer, rounded in zip(layers, inputs, strict=True):
            parametrize.register_parametrization(layer, "weight", RoundedWeight(weight_bits))
            undo.callback(parametrize.remove_parametrizations, layer, "weight", leave_parametrized=False)
            undo.callback(layer.register_forward_pre_hook(rounded).remove)
        yield FakeQuantised(network, inputs)
