"""How often a student, while it learns, says first what its teacher says first.

Unit of data: one batch. Shapes: B crops of which U have the teacher's logits, K classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from student_trainer.loss import Lesson

KEPT = 0.95
"""What a step weighs of the step after it: the mean is over about the last 20 steps."""


class RunningAgreement:
    """Share of crops whose largest logit is the same for both, as a mean over the steps that fades with their age.

    The counts stay on the student's device until `value` asks for them, so counting makes no step wait for the device.
    """

    def __init__(self) -> None:
        self._agreed: Tensor | None = None
        self._seen = 0.0

    @torch.no_grad()
    def count(self, student_BK: Tensor, lesson: Lesson) -> None:
        """One batch; one without a teacher (the control's) counts nothing.

        Args:
            student_BK: the student's logits in the order of the lesson's crops: those with the teacher's logits come first.
        """
        if lesson.teacher_UK is None:
            return
        same = (student_BK[: len(lesson.teacher_UK)].argmax(dim=1) == lesson.teacher_UK.argmax(dim=1)).sum()
        self._agreed = same if self._agreed is None else self._agreed * KEPT + same
        self._seen = self._seen * KEPT + len(lesson.teacher_UK)

    def value(self) -> float | None:
        """0 to 1; None where no teacher spoke yet."""
        return None if self._agreed is None else float(self._agreed) / self._seen
