"""LARS against the update written down in numpy, in float64, and against what the official exclusions say of one step."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

from distill.lars import Lars, trust_ratio

Array = npt.NDArray[np.float64]

RATES = [0.5, 2.0, 6.4, 3.0, 0.1, 0.0, 1.0]


def numpy_lars(
    weights: Array, gradients: list[Array], rates: list[float], momentum: float, decay: float, coefficient: float, adapt: bool
) -> Array:
    """The update of the official `lars_optimizer.py` (classic momentum, no Nesterov), step by step."""
    buffer = np.zeros_like(weights)
    for gradient, rate in zip(gradients, rates, strict=True):
        decayed = gradient + decay * weights
        ratio = 1.0
        if adapt and np.linalg.norm(weights) > 0 and np.linalg.norm(decayed) > 0:
            ratio = coefficient * float(np.linalg.norm(weights) / np.linalg.norm(decayed))
        buffer = momentum * buffer + rate * ratio * decayed
        weights = weights - buffer
    return weights


def drawn(*shape: int) -> tuple[Array, list[Array]]:
    random = np.random.default_rng(7)
    return random.normal(0, 0.3, shape), [random.normal(0, 2, shape) for _ in RATES]


def stepped(weights: Array, gradients: list[Array], dtype: torch.dtype = torch.float64, **settings: Any) -> Array:
    parameter = nn.Parameter(torch.tensor(weights, dtype=dtype))
    optimizer = Lars([{"params": [parameter]}], lr=1.0, **settings)
    for gradient, rate in zip(gradients, RATES, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        parameter.grad = torch.tensor(gradient, dtype=dtype)
        optimizer.step()
    return parameter.detach().double().numpy()


class TestAgainstNumpy:
    @pytest.mark.parametrize("adapt", [True, False])
    @pytest.mark.parametrize(("momentum", "decay", "coefficient"), [(0.9, 1e-4, 0.001), (0.9, 0.5, 0.1), (0.0, 0.0, 0.02), (0.5, 0.3, 1.0)])
    def test_seven_steps_at_changing_rates(self, adapt: bool, momentum: float, decay: float, coefficient: float) -> None:
        """Also at a rate of 0: only momentum moves the weights then."""
        weights, gradients = drawn(4, 3, 3, 3)
        expected = numpy_lars(weights, gradients, RATES, momentum, decay, coefficient, adapt)
        found = stepped(weights, gradients, momentum=momentum, weight_decay=decay, trust_coefficient=coefficient, adapt=adapt)
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-13)
        assert not np.allclose(found, weights)

    def test_in_float32(self) -> None:
        weights, gradients = drawn(16, 8)
        expected = numpy_lars(weights, gradients, RATES, 0.9, 1e-4, 0.001, True)
        found = stepped(weights, gradients, torch.float32, momentum=0.9, weight_decay=1e-4)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)

    def test_weights_that_start_at_zero_are_not_stuck(self) -> None:
        """Their trust ratio is 1 in the first step, and coefficient * |w| / |g| in those after."""
        _, gradients = drawn(3, 5)
        weights = np.zeros((3, 5))
        expected = numpy_lars(weights, gradients, RATES, 0.9, 0.0, 0.001, True)
        np.testing.assert_allclose(stepped(weights, gradients), expected, rtol=1e-12)

    def test_a_gradient_of_zero(self) -> None:
        weights, gradients = drawn(3, 5)
        gradients = [np.zeros_like(gradient) for gradient in gradients]
        np.testing.assert_array_equal(stepped(weights, gradients), weights)


class TestStep:
    def test_length_is_a_share_of_the_weights_whatever_the_gradient(self) -> None:
        weights, gradients = drawn(6, 6)
        for size in (1e-12, 1.0, 1e12):
            parameter = nn.Parameter(torch.tensor(weights))
            optimizer = Lars([{"params": [parameter]}], lr=2.0, trust_coefficient=0.01)
            parameter.grad = torch.tensor(gradients[0] * size)
            optimizer.step()
            moved = np.linalg.norm(parameter.detach().numpy() - weights)
            assert moved == pytest.approx(2.0 * 0.01 * np.linalg.norm(weights))

    def test_groups_keep_to_their_own_settings(self) -> None:
        adapted, plain, frozen = (nn.Parameter(torch.full((2, 2), 3.0)) for _ in range(3))
        optimizer = Lars([{"params": [adapted]}, {"params": [plain, frozen], "adapt": False, "weight_decay": 0.5}], lr=0.1)
        adapted.grad, plain.grad = torch.ones(2, 2), torch.ones(2, 2)
        optimizer.step()
        # |w| = 6, |g| = 2: the trust ratio is 0.003.
        torch.testing.assert_close(adapted.detach(), torch.full((2, 2), 3 - 0.1 * 0.003))
        torch.testing.assert_close(plain.detach(), torch.full((2, 2), 3 - 0.1 * (1 + 0.5 * 3)))
        assert torch.equal(frozen.detach(), torch.full((2, 2), 3.0))

    def test_gradients_are_left_as_they_are(self) -> None:
        parameter = nn.Parameter(torch.ones(2, 2))
        optimizer = Lars([{"params": [parameter]}], lr=0.1, weight_decay=0.5)
        parameter.grad = torch.full((2, 2), 3.0)
        optimizer.step()
        assert parameter.grad.flatten().tolist() == [3.0] * 4

    def test_trust_ratio_by_hand(self) -> None:
        """|(3, 4)| = 5 against |(0, 2)| = 2."""
        ratio = trust_ratio(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 2.0]), 0.01)
        assert ratio.item() == pytest.approx(0.025)
        assert trust_ratio(torch.zeros(2), torch.ones(2), 0.01).item() == 1
        assert trust_ratio(torch.ones(2), torch.zeros(2), 0.01).item() == 1


def test_the_state_goes_on_bit_for_bit(tmp_path: Any) -> None:
    """Three steps, saved as checkpoints save it and read into a fresh optimiser, four more: as seven in one go."""
    weights, gradients = drawn(5, 4)
    settings: dict[str, Any] = {"momentum": 0.9, "weight_decay": 0.1, "trust_coefficient": 0.05}
    parameter = nn.Parameter(torch.tensor(weights))
    for part in (slice(0, 3), slice(3, 7)):
        optimizer = Lars([{"params": [parameter]}], lr=1.0, **settings)
        if part.start:
            optimizer.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        for gradient, rate in zip(gradients[part], RATES[part], strict=True):
            optimizer.param_groups[0]["lr"] = rate
            parameter.grad = torch.tensor(gradient)
            optimizer.step()
        torch.save(optimizer.state_dict(), tmp_path / "state.pt")
        parameter = nn.Parameter(parameter.detach().clone())
    np.testing.assert_array_equal(parameter.detach().numpy(), stepped(weights, gradients, **settings))
