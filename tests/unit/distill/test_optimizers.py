"""The schedule by hand, one update by hand, and which weights decay, adapt and go slower."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from distill.lamb import Lamb
from distill.lars import Lars
from distill.models.classifier import build_classifier
from distill.models.settings import NetworkSettings
from distill.optimizer_settings import OptimizerSettings
from distill.optimizers import apply_step, build_optimizer, take_step
from distill.teacher_info import Preprocessing

BATCH = 64
"""Images of a step, where the rate does not follow them."""


class TestSchedule:
    def test_by_hand(self) -> None:
        """10 steps, 20 % warm-up: half, full, then a cosine over 8 steps."""
        settings = OptimizerSettings(warmup_share=0.2)
        cosine = [0.5 + 0.5 * math.cos(math.pi * k / 8) for k in range(8)]
        assert [settings.schedule_at(step, 10) for step in range(10)] == pytest.approx([0.5, 1.0, *cosine])

    def test_without_warmup_it_starts_at_the_peak(self) -> None:
        settings = OptimizerSettings(warmup_share=0.0)
        assert settings.schedule_at(0, 7) == 1
        assert settings.schedule_at(0, 1) == 1

    @pytest.mark.parametrize("num_steps", [1, 2, 19, 1000])
    @pytest.mark.parametrize("warmup_share", [0.0, 0.05, 0.5, 0.99])
    def test_above_zero_up_to_the_peak_which_is_reached(self, num_steps: int, warmup_share: float) -> None:
        settings = OptimizerSettings(warmup_share=warmup_share)
        rates = [settings.schedule_at(step, num_steps) for step in range(num_steps)]
        assert max(rates) == pytest.approx(1.0)
        assert min(rates) > 0
        peak = rates.index(max(rates))
        assert rates == sorted(rates[:peak]) + sorted(rates[peak:], reverse=True)

    @pytest.mark.parametrize(
        ("scaling", "learning_rate", "global_batch", "peak"),
        [
            ("sqrt", 0.1, 4096, 6.4),  # the paper's pretraining
            ("sqrt", 0.005, 1024, 0.16),  # its fine-tuning
            ("linear", 0.1, 4096, 1.6),  # linear evaluation
            ("linear", 0.3, 256, 0.3),
            ("none", 0.3, 4096, 0.3),
        ],
    )
    def test_peak_follows_the_batch(
        self, scaling: Literal["none", "linear", "sqrt"], learning_rate: float, global_batch: int, peak: float
    ) -> None:
        settings = OptimizerSettings(scaling=scaling, learning_rate=learning_rate, warmup_share=0)
        assert settings.peak_rate(global_batch) == pytest.approx(peak)
        network = Two()
        optimizer = build_optimizer(network, settings, global_batch)
        take_step(optimizer, network, network.loss(), settings, 0, 10)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([peak, peak])

    @pytest.mark.parametrize("field", ["learning_rate", "weight_decay", "warmup_share", "max_grad_norm", "momentum", "trust_coefficient"])
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
    optimizer = build_optimizer(network, settings, BATCH)
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

    def test_momentum_without_nesterov(self) -> None:
        """Classic: the first step is lr * g, the second lr * (0.5 g + g)."""
        network = stepped(OptimizerSettings(learning_rate=0.1, weight_decay=0, warmup_share=0, nesterov=False, momentum=0.5), steps=2)
        assert network.bias.tolist() == pytest.approx([1 - 0.1 * 5 * (1 + 1.5)] * 2)

    def test_no_momentum_at_all(self) -> None:
        network = stepped(OptimizerSettings(learning_rate=0.3, weight_decay=0, warmup_share=0, momentum=0), steps=2)
        assert network.bias.tolist() == pytest.approx([1 - 2 * 0.3 * 5] * 2)

    def test_lars_by_hand(self) -> None:
        """The matrix moves by 0.001 of its length (2, along equal gradients); the vector by lr * gradient, without decay."""
        network = stepped(OptimizerSettings(name="lars", learning_rate=0.1, weight_decay=0.5, warmup_share=0))
        assert network.weight.detach().flatten().tolist() == pytest.approx([1 - 0.1 * 0.001] * 4)
        assert network.bias.tolist() == pytest.approx([1 - 0.1 * 5] * 2)

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

    def test_gradients_pile_up_until_the_step(self) -> None:
        """Two backward passes and one step are one step on the sum of the losses; the next step starts without gradients."""
        settings = OptimizerSettings(learning_rate=0.1, weight_decay=0, warmup_share=0)
        network = Two()
        optimizer = build_optimizer(network, settings, BATCH)
        for step in range(2):
            network.loss().backward()
            (3 * network.loss()).backward()
            apply_step(optimizer, network, settings, step, 10**9)
        assert network.bias.grad is None
        assert network.bias.tolist() == pytest.approx([1 - 4 * 0.1 * 5 * (1.9 + 1 + 0.9 * 1.9)] * 2)

    def test_frozen_ones_stay(self) -> None:
        network = stepped(OptimizerSettings(weight_decay=0.5), steps=3)
        assert torch.equal(network.frozen, torch.ones(2, 2))

    def test_the_schedule_sets_the_rate(self) -> None:
        settings = OptimizerSettings(learning_rate=2.0, warmup_share=0.2)
        network = Two()
        optimizer = build_optimizer(network, settings, BATCH)
        seen = []
        for step in range(10):
            take_step(optimizer, network, network.loss(), settings, step, 10)
            seen.append({group["lr"] for group in optimizer.param_groups})
        assert seen == [{2.0 * settings.schedule_at(step, 10)} for step in range(10)]


def parts_of(optimizer: torch.optim.Optimizer, network: nn.Module, field: str) -> dict[str, float]:
    """Name of every parameter -> what its group says under `field`."""
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    return {names[id(p)]: group[field] for group in optimizer.param_groups for p in group["params"]}


def test_batch_norm_and_offsets_have_no_decay() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    decay = parts_of(build_optimizer(network, OptimizerSettings(weight_decay=0.1), BATCH), network, "weight_decay")
    assert decay == {"0.weight": 0.1, "0.bias": 0, "1.weight": 0, "1.bias": 0, "3.weight": 0.1, "3.bias": 0}


@pytest.mark.parametrize(("name", "eps"), [("adamw", 1e-8), ("lamb", 1e-6)])
def test_betas_and_eps_reach_the_optimiser(name: Literal["adamw", "lamb"], eps: float) -> None:
    settings = OptimizerSettings(name=name, betas=(0.8, 0.95))
    assert build_optimizer(Two(), settings, BATCH).defaults["eps"] == eps
    optimizer = build_optimizer(Two(), settings.replace(eps=1e-3), BATCH)
    assert (optimizer.defaults["betas"], optimizer.defaults["eps"]) == ((0.8, 0.95), 1e-3)
    with pytest.raises(ValidationError, match="betas"):
        OptimizerSettings.model_validate({"betas": (0.9, 1.0)})


class TestClassifier:
    """A ResNet under a linear classifier, with one layer of the head in between."""

    @pytest.fixture
    def network(self) -> nn.Module:
        settings = NetworkSettings(depth=14, width_multiplier=0.0625, sk_ratio=0.0625, stem="cifar")
        return build_classifier(settings, 3, Preprocessing(image_size=12), num_head_layers=1)

    @pytest.mark.parametrize(("name", "kind"), [("lars", Lars), ("lamb", Lamb)])
    def test_what_the_official_code_leaves_out_has_no_trust_ratio(
        self, network: nn.Module, name: Literal["lars", "lamb"], kind: type[torch.optim.Optimizer]
    ) -> None:
        optimizer = build_optimizer(network, OptimizerSettings(name=name, weight_decay=0.1), BATCH)
        assert isinstance(optimizer, kind)
        adapt, decay = parts_of(optimizer, network, "adapt"), parts_of(optimizer, network, "weight_decay")
        assert adapt.keys() == dict(network.named_parameters()).keys()
        for name, parameter in network.named_parameters():
            is_kernel = parameter.ndim in (2, 4)
            assert adapt[name] == (is_kernel and name != "body.linear.weight"), name
            assert decay[name] == (0.1 if is_kernel else 0), name
        assert adapt["body.neck.0.0.weight"]

    @pytest.mark.parametrize("name", ["sgd", "lars", "adamw", "lamb"])
    def test_a_smaller_rate_below_the_classifier(self, network: nn.Module, name: Literal["sgd", "lars", "adamw", "lamb"]) -> None:
        settings = OptimizerSettings(name=name, learning_rate=0.2, warmup_share=0)
        optimizer = build_optimizer(network, settings, BATCH, body_rate_factor=0.25)
        apply_step(optimizer, network, settings, 0, 7)
        for parameter, rate in parts_of(optimizer, network, "lr").items():
            assert rate == pytest.approx(0.2 if parameter.startswith("body.linear.") else 0.05), parameter
