"""How much each image counts in the distillation loss.

    none         all alike
    certificate  1 / (1 + (tv / max_tv)^2): tv bounds how far the kept label is from what the teacher said (total variation at the job's
                 temperature), max_tv is what the store allows. This is the weight of least squares, one over the variance, where an error
                 of max_tv adds as much as there was. From 1 for an exact label to 1/2 for one at the limit: no image is lost.
    entropy      1 + exp(-H): H is the entropy, in nats, of the teacher's distribution at the job's temperature. Images that the teacher is
                 sure of count up to twice as much as those it knows nothing about (Long et al. 2018, "Conditional Adversarial Domain
                 Adaptation", section 3.3).

The weights of a global batch are then scaled to a mean of 1 (`student_trainer.lessons`), so that the loss keeps its size and the learning
rate its meaning.

Shapes: U images with a teacher's word, K classes.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

Weighting: TypeAlias = Literal["none", "certificate", "entropy"]


def certificate_weights(tv_U: Tensor, max_tv: float) -> Tensor:
    """float32 [U] in [1/2, 1].

    Args:
        tv_U: bounds of the labels' total-variation errors, float32 [U], at most `max_tv`.
    """
    return 1 / (1 + (tv_U / max_tv).square())


def entropy_weights(teacher_UK: Tensor, temperature: float) -> Tensor:
    """float32 [U] in (1, 2].

    Args:
        teacher_UK: the teacher's logits, float32 [U,K].
    """
    log_probs_UK = F.log_softmax(teacher_UK / temperature, dim=1)
    return 1 + torch.exp((log_probs_UK.exp() * log_probs_UK).sum(dim=1))
