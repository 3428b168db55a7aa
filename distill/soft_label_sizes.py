"""What labels would cost: a sample of a teacher's logits, encoded as the store would keep it, in numbers.

Unit of data: the logits of a sample of crops, [N,K]. `distill store plan` shows the answer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from distill.config import Section
from distill.soft_labels import FloatArray, certified_tv, encode


class TemperatureBound(Section):
    """What reads at one temperature can rely on without asking the teacher."""

    temperature: float
    """Distillation temperature."""
    largest_certified_tv: float
    """tanh(largest logit error / 2T), the bound of the worst label; nothing but its logit error is used."""
    share_within_max_tv: float
    """Share of the labels that a read at this temperature may use: the error that was computed is within `max_tv` where the temperature is
    one of the job's, the certificate is where it is not."""


class LabelSizes(Section):
    """Sizes and errors of the records of one sample. Bytes are those of the records alone, without row, image id and file format."""

    num_labels: int
    """Labels in the sample."""
    num_classes: int
    """K."""
    max_tv: float
    """Limit that the records keep."""
    temperatures: tuple[float, ...]
    """Temperatures at which they keep it."""
    mean_bytes: float
    """Bytes a label, mean."""
    median_bytes: float
    """Bytes a label, median."""
    p99_bytes: float
    """Bytes a label that 99 in 100 do not exceed."""
    dense16_bytes: int
    """Bytes of a label that keeps every logit in fp16."""
    encodings: dict[str, int]
    """Name of the encoding -> labels kept in it, most frequent first."""
    largest_tv: float
    """Largest total-variation error stated with any record; never below the true one."""
    largest_logit_error: float
    """Largest logit error stated with any record."""
    bounds: tuple[TemperatureBound, ...]
    """One for each temperature that was asked about."""


def describe_sizes(
    logits_NK: FloatArray, temperatures: Sequence[float], max_tv: float, other_temperatures: Sequence[float] = ()
) -> LabelSizes:
    """Sizes and errors of the records that `encode` makes of these logits.

    Args:
        logits_NK: float32 logits of N crops, N at least 1.
        temperatures: those at which the records keep `max_tv`.
        max_tv: largest total-variation error.
        other_temperatures: further temperatures to give a bound for.

    Raises:
        ValueError: no logits.
        TeacherAnswerError: logits that are not finite.
        StoreError: no encoding keeps `max_tv`.
    """
    if not len(logits_NK):
        raise ValueError("sizes of no labels were asked for: the sample has no rows")
    records = encode(logits_NK, temperatures, max_tv)
    sizes_N = np.array([len(record.data) for record in records])
    logit_errors_N = np.array([record.max_logit_error for record in records])
    return LabelSizes(
        num_labels=len(records),
        num_classes=logits_NK.shape[1],
        max_tv=max_tv,
        temperatures=tuple(temperatures),
        mean_bytes=float(sizes_N.mean()),
        median_bytes=float(np.median(sizes_N)),
        p99_bytes=float(np.percentile(sizes_N, 99, method="inverted_cdf")),
        dense16_bytes=2 * logits_NK.shape[1],
        encodings=dict(Counter(record.encoding.name.lower() for record in records).most_common()),
        largest_tv=max(record.max_tv for record in records),
        largest_logit_error=float(logit_errors_N.max()),
        bounds=tuple(
            TemperatureBound(
                temperature=temperature,
                largest_certified_tv=float(certified_tv(logit_errors_N, temperature).max()),
                share_within_max_tv=1.0
                if temperature in temperatures
                else float((certified_tv(logit_errors_N, temperature) <= max_tv).mean()),
            )
            for temperature in dict.fromkeys((*temperatures, *other_temperatures))
        ),
    )
