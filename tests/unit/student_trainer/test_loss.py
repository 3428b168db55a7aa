"""The distillation loss against torch's own KL divergence and against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from student_trainer.loss import distillation_loss


def some_logits() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    student_BK = torch.randn(7, 10, generator=generator, dtype=torch.float64) * 3
    return student_BK.requires_grad_(), torch.randn(7, 10, generator=generator, dtype=torch.float64) * 5


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_is_kl_div_plus_the_teachers_entropy_with_the_same_gradient(temperature: float) -> None:
    student_BK, teacher_BK = some_logits()
    loss = distillation_loss(student_BK, teacher_BK, temperature)
    (gradient,) = torch.autograd.grad(loss, student_BK)

    probs_BK = F.softmax(teacher_BK / temperature, dim=1)
    kl = F.kl_div(F.log_softmax(student_BK / temperature, dim=1), probs_BK, reduction="batchmean")
    entropy = torch.distributions.Categorical(probs=probs_BK).entropy().mean()
    (kl_gradient,) = torch.autograd.grad(kl, student_BK)
    torch.testing.assert_close(loss, kl + entropy)
    torch.testing.assert_close(gradient, kl_gradient)


def test_gradient_is_the_difference_of_the_distributions_over_batch_and_temperature() -> None:
    student_BK, teacher_BK = some_logits()
    (gradient,) = torch.autograd.grad(distillation_loss(student_BK, teacher_BK, 3.0), student_BK)
    expected = (F.softmax(student_BK / 3, dim=1) - F.softmax(teacher_BK / 3, dim=1)) / (7 * 3)
    torch.testing.assert_close(gradient, expected.detach())


def test_t_squared_multiplies_by_t_squared_only() -> None:
    student_BK, teacher_BK = some_logits()
    plain = distillation_loss(student_BK, teacher_BK, 4.0)
    torch.testing.assert_close(distillation_loss(student_BK, teacher_BK, 4.0, scale_by_temperature_squared=True), 16 * plain)


def test_numbers_by_hand() -> None:
    # P_T = softmax([ln 3, 0]) = [3/4, 1/4];  P_S = softmax([0, ln 4]) = [1/5, 4/5]
    teacher_BK, student_BK = torch.tensor([[math.log(3), 0.0]]), torch.tensor([[0.0, math.log(4)]])
    by_hand = -(0.75 * math.log(0.2) + 0.25 * math.log(0.8))
    assert distillation_loss(student_BK, teacher_BK, 1.0).item() == pytest.approx(by_hand, rel=1e-6)
    assert by_hand == pytest.approx(1.262864, abs=1e-6)
    # At T = 2 the odds are their square roots: P_T = [sqrt 3, 1] / (1 + sqrt 3), P_S = [1, 2] / 3
    root = math.sqrt(3)
    at_two = -(root * math.log(1 / 3) + math.log(2 / 3)) / (1 + root)
    assert distillation_loss(student_BK, teacher_BK, 2.0).item() == pytest.approx(at_two, rel=1e-6)


def test_mean_over_the_batch_not_over_the_classes() -> None:
    teacher_BK, student_BK = torch.tensor([[math.log(3), 0.0]]), torch.tensor([[0.0, math.log(4)]])
    two = distillation_loss(student_BK.repeat(2, 1), teacher_BK.repeat(2, 1), 1.0)
    torch.testing.assert_close(two, distillation_loss(student_BK, teacher_BK, 1.0))


def test_probabilities_in_place_of_logits_give_another_number() -> None:
    # The classic mistake: softmax of [3/4, 1/4] is [0.6225, 0.3775], a teacher that is far less sure.
    teacher_BK, student_BK = torch.tensor([[math.log(3), 0.0]]), torch.tensor([[0.0, math.log(4)]])
    wrong = distillation_loss(student_BK, F.softmax(teacher_BK, dim=1), 1.0).item()
    share = 1 / (1 + math.exp(-0.5))
    assert wrong == pytest.approx(-(share * math.log(0.2) + (1 - share) * math.log(0.8)), rel=1e-6)
    assert wrong == pytest.approx(1.086055, abs=1e-6)


def test_the_smallest_loss_is_the_teachers_entropy() -> None:
    _, teacher_BK = some_logits()
    entropy = torch.distributions.Categorical(logits=teacher_BK).entropy().mean()
    torch.testing.assert_close(distillation_loss(teacher_BK + 17, teacher_BK, 1.0), entropy)
