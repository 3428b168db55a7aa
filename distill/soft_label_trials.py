"""What a label would be read as in a given form, and how wrong that is: exact, in float64, at every temperature.

A total-variation error does not depend on the order of the classes, so labels are tried sorted, largest logit first; rows in
different forms are tried together. The numbers are those of distill/soft_label_formats.py, rounded as the record rounds them.

Shapes: N crops, K classes, T temperatures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from distill.soft_label_formats import LOWEST, FloatArray, Scales, codes_below, qtopk_step, topk_level
from distill.soft_label_forms import Encoding, Ints

Doubles = npt.NDArray[np.float64]

_ROUNDING = 1e-12
"""More than float64 can be off in a sum over 100,000 classes."""


@dataclass(frozen=True)
class Tried:
    """Labels as they would be read in a form each, sorted, largest logit first."""

    scales: Scales
    read_NK: FloatArray


class SortedLabels:
    """Some labels, largest logit first, with what is true of them.

    Args:
        logits_NK: float32, the teacher's.
        temperatures: of the job.
    """

    def __init__(self, logits_NK: FloatArray, temperatures: Sequence[float]) -> None:
        self.num, self.num_classes = logits_NK.shape
        self.temperatures = sorted(temperatures)
        self.middle = len(temperatures) // 2
        """Place of the temperature at which the mass of what is not retained is made right."""
        sorted_NK = np.sort(logits_NK, axis=1)[:, ::-1].astype(np.float64)
        self.true_NK: Doubles = sorted_NK - sorted_NK[:, :1]
        self.logits_NK = np.maximum(self.true_NK, LOWEST).astype(np.float32)
        self.probs_TNK = [_softmax(self.true_NK, temperature) for temperature in self.temperatures]
        self.rest_TNK = [_sums_from(probs_NK) for probs_NK in self.probs_TNK]
        """[T] of [N,K+1]: the probability of a class and all after it."""

    def read_back(self, rows: Ints, encoding_N: Ints, retained_N: Ints, bits_N: Ints, step_N: FloatArray) -> Tried:
        """Rows as the reader would see them, each in its form; `step_N` counts for qdense only."""
        logits_NK = self.logits_NK[rows]
        num_most = int(retained_N.max())
        is_qdense_N = encoding_N == Encoding.QDENSE
        anchor_N = logits_NK[np.arange(len(rows)), retained_N]
        step_N = half(step_N)
        highest_N = np.where(is_qdense_N, 2.0**bits_N - 2, 0).astype(np.float32)
        below_NK = codes_below(anchor_N[:, None], logits_NK, step_N[:, None], highest_N[:, None]) * step_N[:, None]
        missing_N = self._log_missing(rows, retained_N, is_qdense_N, below_NK)
        level_N = (anchor_N + self.temperatures[self.middle] * missing_N).astype(np.float32)
        kept_level_N, level_N = _rounded_level(level_N, encoding_N, self.num_classes - retained_N)
        kept_NR = half(logits_NK[:, :num_most])
        coarse = np.flatnonzero(encoding_N == Encoding.QTOPK)
        anchor_N[coarse] = half(logits_NK[coarse, 1])
        kept_NR[coarse, 1:] = _qtopk_kept(logits_NK[coarse, 1:num_most], anchor_N[coarse], level_N[coarse], bits_N[coarse])
        read_NK = level_N[:, None] - below_NK
        np.copyto(read_NK[:, :num_most], kept_NR, where=np.arange(num_most) < retained_N[:, None])
        return Tried(Scales(anchor_N, kept_level_N, step_N), read_NK)

    def _log_missing(self, rows: Ints, retained_N: Ints, is_qdense_N: npt.NDArray[np.bool_], below_NK: FloatArray) -> Doubles:
        """log of (true mass of the tail / its mass as coded) at the middle temperature, both relative to the tail's largest logit."""
        rest_N = self.rest_TNK[self.middle][rows, retained_N] / np.maximum(self.probs_TNK[self.middle][rows, retained_N], 1e-300)
        coded_N = (self.num_classes - retained_N).astype(np.float64)
        dense = np.flatnonzero(is_qdense_N)
        masses_NK = np.exp(below_NK[dense] / np.float32(-self.temperatures[self.middle]))
        masses_NK[np.arange(self.num_classes) < retained_N[dense, None]] = 0
        coded_N[dense] = masses_NK.sum(axis=1)
        return np.log(np.maximum(rest_N, 1)) - np.log(coded_N)  # the largest alone is 1, also where float64 loses the tail

    def errors(self, rows: Ints, read_NK: FloatArray) -> tuple[FloatArray, FloatArray]:
        """(largest TV over the temperatures, largest logit error) of each row, rounded up to float32.

        A shift of a whole row changes no softmax, so the logit error is taken under the shift that makes it smallest.
        """
        read = read_NK.astype(np.float64)
        tv_N = np.zeros(len(rows))
        for temperature, probs_NK in zip(self.temperatures, self.probs_TNK, strict=True):
            np.maximum(tv_N, 0.5 * np.abs(_softmax(read, temperature) - probs_NK[rows]).sum(axis=1), out=tv_N)
        read -= self.true_NK[rows]
        return _rounded_up(tv_N + _ROUNDING), _rounded_up((read.max(axis=1) - read.min(axis=1)) / 2)


def half(values: FloatArray) -> FloatArray:
    """As fp16 holds them."""
    return np.clip(values, LOWEST, -LOWEST).astype("<f2").astype(np.float32)


def _rounded_level(level_N: FloatArray, encoding_N: Ints, num_rest_N: Ints) -> tuple[FloatArray, FloatArray]:
    """(the level of the rest as each encoding holds it, what it is read as)."""
    kept_N = np.where(encoding_N == Encoding.QTOPK, half(level_N), level_N)
    is_topk_N = encoding_N == Encoding.TOPK
    kept_N[is_topk_N] += np.log(num_rest_N[is_topk_N])
    read_N = kept_N.copy()
    read_N[is_topk_N] = topk_level(kept_N[is_topk_N], num_rest_N[is_topk_N])
    return kept_N, read_N


def _qtopk_kept(logits_NR: FloatArray, second_N: FloatArray, level_N: FloatArray, bits_N: Ints) -> FloatArray:
    escape_N = (2.0**bits_N - 1).astype(np.float32)
    second_N1, step_N1 = second_N[:, None], qtopk_step(second_N, level_N, escape_N)[:, None]
    return second_N1 - codes_below(second_N1, logits_NR, step_N1, escape_N[:, None] - 1) * step_N1


def _softmax(logits_NK: Doubles, temperature: float) -> Doubles:
    scaled = logits_NK / temperature
    scaled -= scaled.max(axis=1, keepdims=True)
    np.exp(scaled, out=scaled)
    scaled /= scaled.sum(axis=1, keepdims=True)
    return scaled


def _sums_from(probs_NK: Doubles) -> Doubles:
    """[N,K+1]: the sum of each row from a place on."""
    sums = np.zeros((len(probs_NK), probs_NK.shape[1] + 1))
    np.cumsum(probs_NK[:, ::-1], axis=1, out=sums[:, -2::-1])
    return sums


def _rounded_up(values: Doubles) -> FloatArray:
    rounded = values.astype(np.float32)
    return np.where(rounded < values, np.nextafter(rounded, np.float32(np.inf)), rounded)
