"""The one distillation loss (SimCLRv2, equation 2): cross-entropy of the student against the teacher, both softened by the temperature.

    L = - sum_y P_T(y | x; T) log P_S(y | x; T),   P(y | x; T) = softmax(logits / T)

It differs from KL(teacher || student) by the teacher's entropy, which has no gradient. Mean over the images of the batch.

Shapes: B images, K classes.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def distillation_loss(student_BK: Tensor, teacher_BK: Tensor, temperature: float, scale_by_temperature_squared: bool = False) -> Tensor:
    """Scalar loss in nats.

    Args:
        student_BK, teacher_BK: logits, not probabilities, float [B,K].
        temperature: > 0, the same for both.
        scale_by_temperature_squared: times T^2, which keeps the gradient's size as T grows (Hinton 2015, section 2).
    """
    probs_BK = F.softmax(teacher_BK / temperature, dim=1)
    log_probs_BK = F.log_softmax(student_BK / temperature, dim=1)
    loss = -(probs_BK * log_probs_BK).sum(dim=1).mean()
    return loss * temperature**2 if scale_by_temperature_squared else loss
