"""One label from a teacher file in ONNX Runtime: what gives none is not made the served version where no Triton can be asked.

Unit of data: one crop.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from distill.errors import BadInput
from distill.teacher_info import TeacherInfo
from export.runners import OnnxRunner


def require_answer(model: Path, info: TeacherInfo) -> None:
    """Ask for the label of one grey crop.

    Args:
        model: the teacher graph.
        info: what it says of itself.

    Raises:
        BadInput: it does not load or run, or the label is of another shape or not finite.
    """
    size = info.preprocessing.image_size
    crops_BHWC = np.full((1, size, size, 3), 127, np.uint8)
    answers = OnnxRunner.of_file(model)(crops_BHWC, np.full((1, 1), info.default_temperature, np.float32))
    for answer_BK in answers:
        if answer_BK is None or answer_BK.shape != (1, info.num_classes) or not np.isfinite(answer_BK).all():
            raise BadInput(
                f"{model} gives no label: NaN, infinite or not {info.num_classes} numbers for one grey crop; export the teacher again"
            )
