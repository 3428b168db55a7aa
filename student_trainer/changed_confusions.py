"""Which mistakes distillation took away from a student, and which it brought.

Shapes: K classes. Rates are of the images of the true class, so that a class with few images counts as much as one with many.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from distill.config import Section
from distill.label_metrics import Confusions

Rates = npt.NDArray[np.float64]
MOST_PAIRS = 8
MOST_CLASSES = 20
"""Of a heat map: more cannot be read."""


class ChangedPair(Section):
    """Images of one class that are taken for another."""

    true: str
    """Their class."""
    answer: str
    """What they are taken for."""
    num_images: int
    """Of the true class."""
    student: int
    """How many of them the distilled student takes for `answer`."""
    control: int | None
    """How many the student that learnt from labels alone does; None without a control."""
    teacher: int
    """How many the teacher does."""


def mistakes(entry: dict[str, Any]) -> Rates:
    """float64 [K,K], zero diagonal: share of the images of class `row` that are taken for class `column`."""
    matrix_KK = Confusions.model_validate(entry["confusions"]).matrix()
    rates_KK = matrix_KK / np.maximum(1, matrix_KK.sum(axis=1, keepdims=True))
    np.fill_diagonal(rates_KK, 0.0)
    return rates_KK


def changed_pairs(
    student: dict[str, Any], control: dict[str, Any] | None, teacher: dict[str, Any], class_names: list[str]
) -> list[ChangedPair]:
    """The pairs of classes that the student confuses less or more often than what it is compared with: the control, or else the teacher.

    Args:
        student, control, teacher: entries of the stage `evaluate`, with `confusions`.

    Returns:
        At most 8, those with the largest change of the rate first; none where nothing changed.
    """
    change_KK = mistakes(student) - mistakes(control or teacher)
    order = np.argsort(-np.abs(change_KK), axis=None, kind="stable")[:MOST_PAIRS]
    counts = {who: Confusions.model_validate(entry["confusions"]).matrix() for who, entry in
              (("student", student), ("control", control), ("teacher", teacher)) if entry is not None}  # fmt: skip
    pairs = []
    for true, answer in zip(*np.unravel_index(order, change_KK.shape), strict=True):
        if change_KK[true, answer] != 0:
            found = {who: int(matrix_KK[true, answer]) for who, matrix_KK in counts.items()}
            pairs.append(
                ChangedPair(
                    true=class_names[true],
                    answer=class_names[answer],
                    num_images=int(counts["teacher"][true].sum()),
                    **{"control": None, **found},
                )
            )
    return pairs


def most_changed_classes(*changes_KK: Rates) -> list[int]:
    """The classes in most of the change, at most 20, in their own order."""
    weight_K = sum(np.abs(change).sum(axis=0) + np.abs(change).sum(axis=1) for change in changes_KK)
    assert isinstance(weight_K, np.ndarray)
    return sorted(np.argsort(-weight_K, kind="stable")[:MOST_CLASSES].tolist())
