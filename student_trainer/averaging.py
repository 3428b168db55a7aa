"""The averaged weights of a student: an exponential moving average over its steps, which is judged and kept in place of the last weights.

    average = d * average + (1 - d) * weights,   d = min(decay, (1 + n) / (10 + n)) at the n-th step after the first

The rising d (TensorFlow's `num_updates`, timm's warm-up) lets a short run forget its random start. Batch norm's running mean and variance
are averaged like weights, as in timm and torchvision: they then belong to the averaged weights; its counters are copied.
"""

from __future__ import annotations

import copy

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

from distill.models.classifier import Classifier


class AveragedWeights:
    """The average that follows one network.

    Args:
        network: whose tensors are followed; they may be trained in place but not replaced.
        decay: 0 to 1; 0.9999 looks back over about 10,000 steps.
    """

    def __init__(self, network: Classifier, decay: float) -> None:
        self.network = copy.deepcopy(network).requires_grad_(False).eval()
        """The average as a network, in evaluation mode."""
        self.num_updates = 0
        self._decay = decay
        tensors = zip(self.network.state_dict().values(), network.state_dict().values(), strict=True)
        # Tied weights have several names and are one tensor, to be moved once a step; the copy is tied in the same way.
        pairs = list({(theirs.data_ptr(), theirs.shape): (mine, theirs) for mine, theirs in tensors}.values())
        self._floats = [pair for pair in pairs if pair[0].is_floating_point()]
        self._counters = [pair for pair in pairs if not pair[0].is_floating_point()]

    @torch.no_grad()
    def follow(self) -> None:
        """Take in the network as it is now; the first time, take it over."""
        if self.num_updates == 0:
            for mine, theirs in self._floats:
                mine.copy_(theirs)
        else:
            decay = min(self._decay, (1 + self.num_updates) / (10 + self.num_updates))
            mine_all, theirs_all = zip(*self._floats, strict=True)
            get_ema_multi_avg_fn(decay)(mine_all, theirs_all, None)
        for mine, theirs in self._counters:
            mine.copy_(theirs)
        self.num_updates += 1
