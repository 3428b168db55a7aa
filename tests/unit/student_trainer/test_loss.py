"""The losses against torch's own KL divergence and cross-entropy and against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from student_trainer.loss import Lesson, distillation_loss, lesson_loss


def some_logits() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    student_BK = torch.randn(7, 10, generator=generator, dtype=torch.float64) * 3
    return student_BK.requires_grad_(), torch.randn(7, 10, generator=generator, dtype=torch.float64) * 5


@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0, 4.0])
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


def test_a_small_temperature_keeps_its_digits_in_float32() -> None:
    """At T = 0.1 logits of 50 are 500 in the exponent: only a log-softmax that takes the largest out survives it."""
    student_BK, teacher_BK = (50 * logits_BK.detach() for logits_BK in some_logits())
    exact = distillation_loss(student_BK, teacher_BK, 0.1)
    assert exact > 100
    torch.testing.assert_close(distillation_loss(student_BK.float(), teacher_BK.float(), 0.1).double(), exact, rtol=1e-5, atol=0)


NO_CROPS = torch.zeros(3, 1, 1, 3, dtype=torch.uint8)


def test_equation_3_by_hand() -> None:
    """One image with P_T = [3/4, 1/4] and P_S = [1/5, 4/5]; two labelled ones with P_S of the label 1/5 and 1/2."""
    student_BK = torch.tensor([[0.0, math.log(4)], [0.0, math.log(4)], [1.0, 1.0]])
    lesson = Lesson(NO_CROPS, torch.tensor([[math.log(3), 0.0]]), torch.tensor([0, 1]))
    soft = -(0.75 * math.log(0.2) + 0.25 * math.log(0.8))
    hard = (math.log(5) + math.log(2)) / 2
    for alpha in (0.25, 0.9):
        assert lesson_loss(student_BK, lesson, alpha=alpha, temperature=1.0).item() == pytest.approx(alpha * soft + (1 - alpha) * hard)
    # The temperature, and its square, belong to the first term alone.
    root = math.sqrt(3)
    at_two = -(root * math.log(1 / 3) + math.log(2 / 3)) / (1 + root)
    found = lesson_loss(student_BK, lesson, alpha=0.25, temperature=2.0, scale_by_temperature_squared=True).item()
    assert found == pytest.approx(0.25 * 4 * at_two + 0.75 * hard)


def test_a_lesson_of_one_kind_is_not_weighed_by_alpha() -> None:
    student_BK, teacher_BK = some_logits()
    labels_B = torch.arange(7)
    only_labels = lesson_loss(student_BK, Lesson(NO_CROPS, labels_L=labels_B), alpha=0.25, temperature=3.0)
    torch.testing.assert_close(only_labels, F.cross_entropy(student_BK, labels_B))
    only_teacher = lesson_loss(student_BK, Lesson(NO_CROPS, teacher_BK), alpha=0.25, temperature=3.0)
    torch.testing.assert_close(only_teacher, distillation_loss(student_BK, teacher_BK, 3.0))


def test_the_shares_of_two_workers_make_the_mean_over_all_images() -> None:
    """5 + 2 taught images, 0 + 3 labelled ones: the average of what the two workers get is the loss of one worker with all of them."""
    student_BK, teacher_BK = some_logits()
    more_BK, labels_L = torch.flip(student_BK[:3], dims=(1,)), torch.tensor([4, 5, 6])

    def loss(taught: slice, labelled: slice, teacher_share: float, labels_share: float) -> torch.Tensor:
        lesson = Lesson(NO_CROPS, teacher_BK[taught], labels_L[labelled], teacher_share, labels_share)
        return lesson_loss(torch.cat([student_BK[taught], more_BK[labelled]]), lesson, alpha=0.25, temperature=1.0)

    whole = loss(slice(7), slice(3), 1, 1)
    first, second = loss(slice(5), slice(0), 2 * 5 / 7, 0), loss(slice(5, 7), slice(3), 2 * 2 / 7, 2)
    torch.testing.assert_close((first + second) / 2, whole)
    torch.testing.assert_close(torch.autograd.grad((first + second) / 2, student_BK), torch.autograd.grad(whole, student_BK))
