"""The schedule by hand, one update by hand, and which weights decay."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from distill.optimizer_settings import OptimizerSettings
from distill.optimizers import build_optimizer, take_step


class TestSchedule:
    def test_by_hand(self) -> None:
        """10 steps, 20 % warm-up: half, full, then a cosine over 8 steps."""
        settings = OptimizerSettings(learning_rate=2.0, warmup_share=0.2)
        cosine = [1 + math.cos(math.pi * k / 8) for k in range(8)]
        assert [settings.rate_at(step, 10) for step in range(10)] == pytest.approx([1.0, 2.0, *cosine])

    def test_without_warmup_it_starts_at_the_peak(self) -> None:
        settings = OptimizerSettings(learning_rate=0.3, warmup_share=0.0)
        assert settings.rate_at(0, 7) == pytest.approx(0.3)
        assert settings.rate_at(0, 1) == pytest.approx(0.3)

    @pytest.mark.parametrize("num_steps", [1, 2, 19, 1000])
    @pytest.mark.parametrize("warmup_share", [0.0, 0.05, 0.5, 0.99])
    def test_above_zero_up_to_the_peak_which_is_reached(self, num_steps: int, warmup_share: float) -> None:
        settings = OptimizerSettings(learning_rate=1.0, warmup_share=warmup_share)
        rates = [settings.rate_at(step, num_steps) for step in range(num_steps)]
        assert max(rates) == pytest.approx(1.0)
        assert min(rates) > 0
        peak = rates.index(max(rates))
        assert rates == sorted(rates[:peak]) + sorted(rates[peak:], reverse=True)

    @pytest.mark.parametrize("field", ["learning_rate", "weight_decay", "warmup_share", "max_grad_norm"])
    def test_out_of_range(self, field: str) -> None:
        with pytest.raises(ValidationError, match=field):
            OptimizerSettings.model_validate({field: -1})


class Two(nn.Module):
    """A matrix and a vector, with a loss whose gradients are known: 3 for every weight, 5 for every offset."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 2))
        self.bias = nn.Parameter(torch.ones(2))
        self.frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)

    def loss(self) -> Tensor:
        return 3 * self.weight.sum() + 5 * self.bias.sum() + self.frozen.sum()


def stepped(settings: OptimizerSettings, steps: int = 1) -> Two:
    network = Two()
    optimizer = build_optimizer(network, settings)
    for step in range(steps):
        take_step(optimizer, network, network.loss(), settings, step, 10**9)  # so many steps that the cosine is flat
    return network


class TestUpdate:
    def test_sgd_by_hand(self) -> None:
        """Nesterov's first step is lr * (1 + 0.9) * gradient; decay adds to the gradient of the matrix only."""
        network = stepped(OptimizerSettings(learning_rate=0.1, weight_decay=0.5, warmup_share=0))
        assert network.weight.detach().flatten().tolist() == pytest.approx([1 - 0.1 * 1.9 * (3 + 0.5)] * 4)
        assert network.bias.tolist() == pytest.approx([1 - 0.1 * 1.9 * 5] * 2)

    def test_sgd_second_step(self) -> None:
        """Velocity 0.9 * g + g = 1.9 g; the step is g + 0.9 * 1.9 g."""
        network = stepped(OptimizerSettings(learning_rate=0.1, weight_decay=0, warmup_share=0), steps=2)
        assert network.bias.tolist() == pytest.approx([1 - 0.1 * 5 * (1.9 + 1 + 0.9 * 1.9)] * 2)

    def test_adamw_by_hand(self) -> None:
        """Adam's first step has length lr whatever the gradient; the decay is apart from it, lr * decay * weight."""
        network = stepped(OptimizerSettings(name="adamw", learning_rate=0.1, weight_decay=0.5, warmup_share=0))
        assert network.weight.detach().flatten().tolist() == pytest.approx([1 - 0.1 * 0.5 - 0.1] * 4)
        assert network.bias.tolist() == pytest.approx([1 - 0.1] * 2)

    def test_gradients_are_scaled_down_to_the_limit(self) -> None:
        """Norm sqrt(4 * 9 + 2 * 25) = sqrt(86)."""
        free = OptimizerSettings(learning_rate=0.1, weight_decay=0, warmup_share=0)
        clipped = stepped(free.replace(max_grad_norm=1.0))
        assert clipped.bias.tolist() == pytest.approx([1 - 0.19 * 5 / math.sqrt(86)] * 2, rel=1e-5)
        assert stepped(free.replace(max_grad_norm=100.0)).bias.tolist() == stepped(free).bias.tolist()

    def test_gradients_do_not_pile_up(self) -> None:
        settings = OptimizerSettings(name="adamw", learning_rate=0.1, weight_decay=0, warmup_share=0)
        network = stepped(settings, steps=3)
        assert network.weight.grad is not None
        assert network.weight.grad.flatten().tolist() == [3] * 4

    def test_frozen_ones_stay(self) -> None:
        network = stepped(OptimizerSettings(weight_decay=0.5), steps=3)
        assert torch.equal(network.frozen, torch.ones(2, 2))

    def test_the_schedule_sets_the_rate(self) -> None:
        settings = OptimizerSettings(learning_rate=2.0, warmup_share=0.2)
        network = Two()
        optimizer = build_optimizer(network, settings)
        seen = []
        for step in range(10):
            take_step(optimizer, network, network.loss(), settings, step, 10)
            seen.append({group["lr"] for group in optimizer.param_groups})
        assert seen == [{settings.rate_at(step, 10)} for step in range(10)]


def test_batch_norm_and_offsets_have_no_decay() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    optimizer = build_optimizer(network, OptimizerSettings(weight_decay=0.1))
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    names = {name for name, p in network.named_parameters() if id(p) in decayed}
    assert names == {"0.weight", "3.weight"}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(network.parameters()))
