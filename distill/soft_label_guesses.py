"""About how wrong every form of a label would be, without reading it back: which forms are worth a try.

Everything comes from sums over the label's sorted probabilities. A tail read as even is wrong by what lies over and under its level;
rounding to a step s moves a probability by s / 4T of itself in the mean, and half of the sum of that counts.

Shapes: N crops, K classes, M forms, R numbers of retained classes, G places at which the lowest logits may be cut off, T temperatures.
"""

from __future__ import annotations

import numpy as np

from distill.soft_label_formats import LOWEST, FloatArray
from distill.soft_label_forms import Encoding, FormTable, Ints
from distill.soft_label_trials import Doubles, SortedLabels

_CUTS = (1.0, 0.98, 0.94, 0.88, 0.8, 0.68, 0.54, 0.4)
"""Shares of the classes, largest first, that codes of qdense tell apart; those below share the lowest code."""
_SURPLUS = 0.7
"""Error for each unit of probability that the shared code gives too much: a part of it is taken back when the level is set."""


def guess(labels: SortedLabels, table: FormTable) -> tuple[FloatArray, FloatArray]:
    """(error [N,M], step between codes [N,M]) of every form; dense16 is not among them."""
    error_NM = np.zeros((labels.num, len(table.forms)), dtype=np.float32)
    step_NM = np.zeros_like(error_NM)
    if not table.forms:
        return error_NM, step_NM
    retained_R, place_M = np.unique(table.retained_M, return_inverse=True)
    even_TNR, level_NR = _guess_even(labels, retained_R)
    error_NM[:] = np.max(even_TNR, axis=0)[:, place_M]  # topk, and what has no codes
    for bits in np.unique(table.bits_M):
        forms = np.flatnonzero((table.encoding_M == Encoding.QTOPK) & (table.bits_M == bits) & (table.retained_M > 2))
        step_NM[:, forms] = np.maximum(labels.logits_NK[:, 1:2] - level_NR[:, place_M[forms]], 0) / (2**bits - 1)
        # The two largest are exact.
        error_NM[:, forms] = np.max(
            [
                even_NR[:, place_M[forms]] + step_NM[:, forms] / (8 * t) * (rest_NK[:, 2:3] - rest_NK[:, table.retained_M[forms]])
                for t, even_NR, rest_NK in zip(labels.temperatures, even_TNR, labels.rest_TNK, strict=True)
            ],
            axis=0,
        )
        forms = np.flatnonzero((table.encoding_M == Encoding.QDENSE) & (table.bits_M == bits) & (bits > 1))
        if len(forms):
            error_NM[:, forms], step_NM[:, forms] = _guess_qdense(labels, table.retained_M[forms], int(bits))
    return error_NM, step_NM


def _guess_even(labels: SortedLabels, retained_R: Ints) -> tuple[list[Doubles], Doubles]:
    """Error of a tail that is read as even, for each temperature and R, and the level that it is read as."""
    num_rest_R = labels.num_classes - retained_R
    probs_NK, rest_NK, temperature = (of_T[labels.middle] for of_T in (labels.probs_TNK, labels.rest_TNK, np.asarray(labels.temperatures)))
    with np.errstate(divide="ignore"):
        level_NR = temperature * (np.log(rest_NK[:, retained_R] / num_rest_R) - np.log(probs_NK[:, :1]))
    level_NR = np.maximum(level_NR, LOWEST)
    above_NR = _count_above(labels.logits_NK, level_NR)
    errors = []
    for temperature, rest_NK, probs_NK in zip(labels.temperatures, labels.rest_TNK, labels.probs_TNK, strict=True):
        rest_NR, lower_NR = rest_NK[:, retained_R], np.take_along_axis(rest_NK, above_NR, axis=1)
        even_NR = np.exp(level_NR / temperature) * probs_NK[:, :1]
        total_NR = 1 - rest_NR + num_rest_R * even_NR
        even_NR /= total_NR
        over_NR = rest_NR - lower_NR - (above_NR - retained_R) * even_NR
        under_NR = (labels.num_classes - above_NR) * even_NR - lower_NR
        errors.append(0.5 * ((1 - rest_NR) * np.abs(1 - 1 / total_NR) + np.abs(over_NR) + np.abs(under_NR)))
    return errors, level_NR


def _guess_qdense(labels: SortedLabels, retained_R: Ints, bits: int) -> tuple[FloatArray, FloatArray]:
    """Error and step for each R, at the place where cutting off the lowest logits pays best."""
    cuts_G = np.unique([max(1, round(labels.num_classes * share)) - 1 for share in _CUTS])
    range_NRG = labels.logits_NK[:, retained_R, None] - labels.logits_NK[:, None, cuts_G]
    step_NRG = range_NRG / max(2**bits - 2, 1)
    error_NRG = np.zeros(step_NRG.shape, dtype=np.float32)
    for temperature, rest_NK, probs_NK in zip(labels.temperatures, labels.rest_TNK, labels.probs_TNK, strict=True):
        cut_off_NG = rest_NK[:, cuts_G + 1]
        surplus_N1G = ((labels.num_classes - 1 - cuts_G) * probs_NK[:, cuts_G] - cut_off_NG).astype(np.float32)[:, None]
        mass_NRG = (rest_NK[:, retained_R, None] - cut_off_NG[:, None]).astype(np.float32)
        np.maximum(error_NRG, step_NRG * mass_NRG / np.float32(8 * temperature) + _SURPLUS * surplus_N1G, out=error_NRG)
    error_NRG[range_NRG < 0] = np.inf
    best_NR1 = error_NRG.argmin(axis=2)[..., None]
    return np.take_along_axis(error_NRG, best_NR1, axis=2)[..., 0], np.take_along_axis(step_NRG, best_NR1, axis=2)[..., 0]


def _count_above(falling_NK: FloatArray, level_NR: Doubles) -> Ints:
    """How many of each falling row are above each level: a binary search for all at once."""
    low_NR = np.zeros(level_NR.shape, dtype=np.int64)
    high_NR = np.full(level_NR.shape, falling_NK.shape[1])
    for _ in range(falling_NK.shape[1].bit_length()):
        middle_NR = (low_NR + high_NR) // 2
        values_NR = np.take_along_axis(falling_NK, np.minimum(middle_NR, falling_NK.shape[1] - 1), axis=1)
        is_above_NR = (values_NR > level_NR) & (low_NR < high_NR)
        low_NR = np.where(is_above_NR, middle_NR + 1, low_NR)
        high_NR = np.where(is_above_NR, high_NR, middle_NR)
    return low_NR
