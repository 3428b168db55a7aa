"""LAMB against the paper's algorithm 2 written down in numpy, in float64, and against AdamW where there is no trust ratio."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

from distill.lamb import Lamb

Array = npt.NDArray[np.float64]

RATES = [0.5, 0.02, 0.1, 0.003, 0.0, 0.05, 0.01]


def numpy_lamb(weights: Array, gradients: list[Array], betas: tuple[float, float], eps: float, decay: float, adapt: bool) -> Array:
    """Algorithm 2 of You et al. 2020, line by line, with phi the identity."""
    mean, square = np.zeros_like(weights), np.zeros_like(weights)
    for step, (gradient, rate) in enumerate(zip(gradients, RATES, strict=True), start=1):
        mean = betas[0] * mean + (1 - betas[0]) * gradient
        square = betas[1] * square + (1 - betas[1]) * gradient**2
        ratio = mean / (1 - betas[0] ** step) / (np.sqrt(square / (1 - betas[1] ** step)) + eps)
        direction = ratio + decay * weights
        trust = 1.0
        if adapt and np.linalg.norm(weights) > 0 and np.linalg.norm(direction) > 0:
            trust = float(np.linalg.norm(weights) / np.linalg.norm(direction))
        weights = weights - rate * trust * direction
    return weights


def drawn(*shape: int) -> tuple[Array, list[Array]]:
    random = np.random.default_rng(7)
    return random.normal(0, 0.3, shape), [random.normal(0, 2, shape) for _ in RATES]


def stepped(weights: Array, gradients: list[Array], kind: type[torch.optim.Optimizer] = Lamb, **settings: Any) -> Array:
    parameter = nn.Parameter(torch.tensor(weights))
    optimizer = kind([{"params": [parameter]}], **{"lr": 1.0, **settings})
    for gradient, rate in zip(gradients, RATES, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        parameter.grad = torch.tensor(gradient)
        optimizer.step()
    return parameter.detach().numpy()


class TestAgainstNumpy:
    @pytest.mark.parametrize("adapt", [True, False])
    @pytest.mark.parametrize(("betas", "eps", "decay"), [((0.9, 0.999), 1e-6, 1e-4), ((0.0, 0.5), 1e-2, 0.5), ((0.5, 0.9), 1e-8, 0.0)])
    def test_seven_steps_at_changing_rates(self, adapt: bool, betas: tuple[float, float], eps: float, decay: float) -> None:
        weights, gradients = drawn(4, 3, 3, 3)
        expected = numpy_lamb(weights, gradients, betas, eps, decay, adapt)
        found = stepped(weights, gradients, betas=betas, eps=eps, weight_decay=decay, adapt=adapt)
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-13)
        assert not np.allclose(found, weights)

    def test_weights_that_start_at_zero_are_not_stuck(self) -> None:
        _, gradients = drawn(3, 5)
        weights = np.zeros((3, 5))
        np.testing.assert_allclose(
            stepped(weights, gradients), numpy_lamb(weights, gradients, (0.9, 0.999), 1e-6, 0.0, True), rtol=1e-12, atol=1e-15
        )

    def test_a_gradient_of_zero(self) -> None:
        weights, gradients = drawn(3, 5)
        gradients = [np.zeros_like(gradient) for gradient in gradients]
        np.testing.assert_array_equal(stepped(weights, gradients), weights)


def test_one_step_by_hand() -> None:
    """The first Adam direction is the gradient's sign, here of length 2, and |w| = 10: a step of rate 0.1 is 1 long, 0.5 in each place."""
    parameter = nn.Parameter(torch.full((2, 2), 5.0, dtype=torch.float64))
    optimizer = Lamb([{"params": [parameter]}], lr=0.1, eps=0.0)
    parameter.grad = torch.tensor([[7.0, -0.1], [1e-6, 3.0]], dtype=torch.float64)
    optimizer.step()
    assert parameter.flatten().tolist() == pytest.approx([4.5, 5.5, 4.5, 4.5])


def test_without_trust_ratio_and_decay_it_is_adam() -> None:
    weights, gradients = drawn(6, 2)
    expected = stepped(weights, gradients, torch.optim.Adam, eps=1e-6)
    np.testing.assert_allclose(stepped(weights, gradients, adapt=False, eps=1e-6), expected, rtol=1e-12)


def test_groups_keep_to_their_own_settings_and_gradients_stay() -> None:
    adapted, plain, frozen = (nn.Parameter(torch.full((2, 2), 3.0)) for _ in range(3))
    optimizer = Lamb([{"params": [adapted]}, {"params": [plain, frozen], "adapt": False, "weight_decay": 0.5}], lr=0.1, eps=0.0)
    adapted.grad, plain.grad = torch.ones(2, 2), torch.full((2, 2), 4.0)
    optimizer.step()
    # |w| = 6, the direction's length is 2: the trust ratio is 3.
    torch.testing.assert_close(adapted.detach(), torch.full((2, 2), 3 - 0.1 * 3))
    torch.testing.assert_close(plain.detach(), torch.full((2, 2), 3 - 0.1 * (1 + 0.5 * 3)))
    assert torch.equal(frozen.detach(), torch.full((2, 2), 3.0))
    assert plain.grad.flatten().tolist() == [4.0] * 4


def test_the_state_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """Three steps, saved as checkpoints save it and read into a fresh optimiser, four more: as seven in one go."""
    weights, gradients = drawn(5, 4)
    parameter = nn.Parameter(torch.tensor(weights))
    for part in (slice(0, 3), slice(3, 7)):
        optimizer = Lamb([{"params": [parameter]}], lr=1.0, weight_decay=0.1)
        if part.start:
            optimizer.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        for gradient, rate in zip(gradients[part], RATES[part], strict=True):
            optimizer.param_groups[0]["lr"] = rate
            parameter.grad = torch.tensor(gradient)
            optimizer.step()
        torch.save(optimizer.state_dict(), tmp_path / "state.pt")
        parameter = nn.Parameter(parameter.detach().clone())
    np.testing.assert_array_equal(parameter.detach().numpy(), stepped(weights, gradients, weight_decay=0.1))
