"""The losses of stage 3 (SimCLRv2, section 2.3).

Distillation (equation 2): cross-entropy of the student against the teacher, both softened by the temperature.

    L = - sum_y P_T(y | x; T) log P_S(y | x; T),   P(y | x; T) = softmax(logits / T)

It differs from KL(teacher || student) by the teacher's entropy, which has no gradient. Images may count differently
(`student_trainer.weighting`). With labels (equation 3):

    L = alpha * distillation + (1 - alpha) * cross-entropy on the labels at temperature 1

The paper sums both terms over all their images, so its balance shifts with the number of labels. Here each term is the mean over its own
images of the batch, and alpha alone says how they weigh. A paper's a, over U images and L labels, is an alpha of a U / (a U + (1 - a) L).

Shapes: B images, U of them with a teacher's word and L with a label, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


def distillation_loss(
    student_BK: Tensor,
    teacher_BK: Tensor,
    temperature: float,
    scale_by_temperature_squared: bool = False,
    weights_B: Tensor | None = None,
) -> Tensor:
    """Scalar loss in nats.

    Args:
        student_BK, teacher_BK: logits, not probabilities, float32 [B,K]: dividing bf16 by a small temperature would magnify its rounding.
        temperature: > 0, the same for both.
        scale_by_temperature_squared: times T^2, which keeps the gradient's size as T grows (Hinton 2015, section 2).
        weights_B: what each image's loss is multiplied by before the mean over all B is taken, float32 [B]; None for 1.
    """
    probs_BK = F.softmax(teacher_BK / temperature, dim=1)
    log_probs_BK = F.log_softmax(student_BK / temperature, dim=1)
    loss_B = -(probs_BK * log_probs_BK).sum(dim=1)
    loss = (loss_B if weights_B is None else loss_B * weights_B).mean()
    return loss * temperature**2 if scale_by_temperature_squared else loss


@dataclass(frozen=True)
class Lesson:
    """What all students learn from in one step, on their device: first U crops with the teacher's logits, then L crops with labels."""

    crops_BHWC: Tensor
    """uint8, B = U + L. They go through a student in one pass, so that batch norm sees both."""
    teacher_UK: Tensor | None = None
    """float32 logits; None where there is no teacher."""
    labels_L: Tensor | None = None
    """int64 class ids; None where no labels are learnt from."""
    teacher_share: float = 1.0
    labels_share: float = 1.0
    """Of several workers: what this one's mean is to be multiplied by, so that the average over workers is the mean over all images."""
    weights_U: Tensor | None = None
    """float32: how much each image's soft label counts; the mean over the global batch is 1. None where all count alike."""


def lesson_loss(
    student_BK: Tensor, lesson: Lesson, *, alpha: float, temperature: float, scale_by_temperature_squared: bool = False
) -> Tensor:
    """Scalar loss in nats: both terms weighed by alpha where the lesson has both, else the one it has.

    Args:
        student_BK: the student's logits, float32, in the order of the lesson's crops.
    """
    if lesson.teacher_UK is None:
        return _label_loss(student_BK, lesson)
    num_taught = len(lesson.teacher_UK)
    soft_loss = distillation_loss(student_BK[:num_taught], lesson.teacher_UK, temperature, scale_by_temperature_squared, lesson.weights_U)
    soft = soft_loss * lesson.teacher_share
    if lesson.labels_L is None:
        return soft
    return alpha * soft + (1 - alpha) * _label_loss(student_BK[num_taught:], lesson)


def _label_loss(student_LK: Tensor, lesson: Lesson) -> Tensor:
    assert lesson.labels_L is not None
    # Of few labelled images a worker may have none in this step; its share is then 0.
    mean = F.cross_entropy(student_LK, lesson.labels_L, reduction="sum") / max(1, len(lesson.labels_L))
    return mean * lesson.labels_share
