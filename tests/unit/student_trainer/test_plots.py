"""What the report's pictures leave out."""

from __future__ import annotations

from typing import Any

from student_trainer.plots import FEWEST_IN_BIN, reliability


def _points(num_images: int) -> int:
    """Markers drawn where one bin of the only student holds so many images."""
    bins = [{"confidence": c, "accuracy": c, "num_images": n} for c, n in ((0.3, num_images), (0.7, 500), (0.9, 500))]
    scores: dict[str, Any] = {"scores": {"reliability": bins, "ece": 0.1, "top1": 0.5}}
    return reliability({"teacher": scores, "students": {"small": scores}, "controls": {}}).count("<use ")


def test_a_bin_of_a_few_images_is_not_drawn() -> None:
    assert _points(FEWEST_IN_BIN) - _points(FEWEST_IN_BIN - 1) == 2  # of the teacher and of the student
