"""Which form each label is kept in: the smallest whose exact error is within the limit.

The error of every form is guessed (distill/soft_label_guesses.py); the smallest form that should fit is tried, that is, read back and
compared with the truth (distill/soft_label_trials.py). What a try finds corrects the guesses for that label, until no smaller form is left
that should fit. So a form is taken on its exact error alone; what is guessed is only which forms are worth a try.

Shapes: N crops, K classes, M forms, F families of forms (alike but for the number of retained classes).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from distill.soft_label_formats import FloatArray, Scales
from distill.soft_label_forms import DENSE16, Form, FormTable, Ints, form_table
from distill.soft_label_guesses import guess
from distill.soft_label_trials import SortedLabels, half

_FIRST_RATIO = 0.9
"""Of an error to its guess, before the first try: a little hope costs tries and saves bytes."""
_BLOCK = 1 << 19
"""Logits that are worked on together: 4 MiB as float64."""
_BLOCK_ROWS = 4096


@dataclass(frozen=True)
class Choice:
    """The forms of N labels and what they cost."""

    forms: tuple[Form, ...]
    form_N: Ints
    """Place in `forms`."""
    scales: Scales
    tv_N: FloatArray
    """Largest total-variation error over the temperatures, rounded up."""
    logit_error_N: FloatArray
    """Largest logit error under the shift that makes it smallest, rounded up."""


def choose(logits_NK: FloatArray, temperatures: Sequence[float], max_tv: float) -> Choice:
    """The smallest form found for each row; where none keeps `max_tv` it is dense16, with the error that it has."""
    table = form_table(logits_NK.shape[1])
    parts = [_Search(SortedLabels(block_NK, temperatures), table).run(max_tv) for block_NK in _blocks(logits_NK)]
    scales = Scales(
        np.concatenate([part.scales.anchor_N for part in parts]),
        np.concatenate([part.scales.level_N for part in parts]),
        np.concatenate([part.scales.step_N for part in parts]),
    )
    return Choice(
        (*table.forms, DENSE16),
        np.concatenate([part.form_N for part in parts]),
        scales,
        np.concatenate([part.tv_N for part in parts]),
        np.concatenate([part.logit_error_N for part in parts]),
    )


def _blocks(logits_NK: FloatArray) -> Iterator[FloatArray]:
    rows = min(_BLOCK_ROWS, max(1, _BLOCK // logits_NK.shape[1]))
    for start in range(0, len(logits_NK), rows):
        yield logits_NK[start : start + rows]


class _Search:
    """The search for the forms of some labels."""

    def __init__(self, labels: SortedLabels, table: FormTable) -> None:
        self.labels, self.table = labels, table
        self.guess_NM, self.step_NM = guess(labels, table)
        self.ratio_NF = np.full((labels.num, table.num_families), _FIRST_RATIO)
        self.refuted_NF = np.zeros((labels.num, table.num_families), dtype=np.int64)
        """The most retained classes that were tried and did not fit."""
        self.size_N = np.full(labels.num, DENSE16.num_bytes(labels.num_classes))
        nothing_N = [np.zeros(labels.num, dtype=np.float32) for _ in range(5)]
        self.found = Choice((), np.full(labels.num, len(table.forms)), Scales(*nothing_N[:3]), *nothing_N[3:])

    def run(self, max_tv: float) -> Choice:
        """Try until nothing smaller should fit."""
        rows = np.arange(self.labels.num if self.table.forms else 0)
        while len(rows):
            is_open_NM = self._is_open(rows, max_tv)
            tried = is_open_NM.argmax(axis=1)  # the smallest
            is_left = is_open_NM[np.arange(len(rows)), tried]
            rows = rows[is_left]
            if len(rows):
                self._try(rows, tried[is_left], max_tv)
        dense = np.flatnonzero(self.found.form_N == len(self.table.forms))
        if len(dense):
            self.found.tv_N[dense], self.found.logit_error_N[dense] = self.labels.errors(dense, half(self.labels.logits_NK[dense]))
        return self.found

    def _is_open(self, rows: Ints, max_tv: float) -> np.ndarray[tuple[int, int], np.dtype[np.bool_]]:
        """Which forms are smaller than the one found and should fit."""
        family_M = self.table.family_M
        should_fit_NM = self.guess_NM[rows] * self.ratio_NF[rows][:, family_M] <= max_tv
        is_new_NM = self.table.retained_M > self.refuted_NF[rows][:, family_M]
        return should_fit_NM & is_new_NM & (self.table.size_M < self.size_N[rows, None])

    def _try(self, rows: Ints, tried: Ints, max_tv: float) -> None:
        table, found = self.table, self.found
        back = self.labels.read_back(rows, table.encoding_M[tried], table.retained_M[tried], table.bits_M[tried], self.step_NM[rows, tried])
        tv_N, logit_error_N = self.labels.errors(rows, back.read_NK)
        self.ratio_NF[rows, table.family_M[tried]] = np.clip(tv_N / np.maximum(self.guess_NM[rows, tried], 1e-9), 0.2, 5)
        fits = tv_N <= max_tv
        self.refuted_NF[rows[~fits], table.family_M[tried[~fits]]] = table.retained_M[tried[~fits]]
        rows, tried = rows[fits], tried[fits]
        self.size_N[rows] = table.size_M[tried]
        found.form_N[rows], found.tv_N[rows], found.logit_error_N[rows] = tried, tv_N[fits], logit_error_N[fits]
        found.scales.anchor_N[rows] = back.scales.anchor_N[fits]
        found.scales.level_N[rows] = back.scales.level_N[fits]
        found.scales.step_N[rows] = back.scales.step_N[fits]
