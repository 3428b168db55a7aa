"""The sizes that are told are those of the records that the store would keep."""

from __future__ import annotations

import math

import numpy as np
import pytest

from distill.errors import StoreError, TeacherAnswerError
from distill.soft_label_sizes import LabelSizes, describe_sizes
from distill.soft_labels import encode


def sample(num: int, num_classes: int, sure: int) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    """`sure` labels with one class far ahead, the rest spread out."""
    logits = np.random.default_rng(0).normal(0, 2, (num, num_classes)).astype(np.float32)
    logits[:sure, 3] += 40
    return logits


def test_counts_bytes_and_encodings() -> None:
    logits = sample(40, 100, 30)
    sizes = describe_sizes(logits, [1.0], 0.02)
    num_bytes = sorted(len(record.data) for record in encode(logits, [1.0], 0.02))
    assert sizes.num_labels == 40
    assert sizes.num_classes == 100
    assert sizes.dense16_bytes == 200
    assert sizes.mean_bytes == pytest.approx(sum(num_bytes) / 40)
    assert sizes.median_bytes == num_bytes[20] == 4
    assert sizes.p99_bytes == num_bytes[-1]
    assert sum(sizes.encodings.values()) == 40
    assert next(iter(sizes.encodings)) == "qtopk"
    assert 0 < sizes.largest_tv <= 0.02


def test_what_reads_at_other_temperatures_can_rely_on() -> None:
    """The job's own temperatures were computed; at others only the certificate counts, which loosens as the temperature falls."""
    sizes = describe_sizes(sample(50, 100, 25), [1.0, 4.0], 0.02, [0.5, 400.0])
    assert [bound.temperature for bound in sizes.bounds] == [1.0, 4.0, 0.5, 400.0]
    job, _, cold, hot = sizes.bounds
    assert job.share_within_max_tv == 1
    assert job.largest_certified_tv == pytest.approx(math.tanh(sizes.largest_logit_error / 2))
    assert cold.largest_certified_tv > job.largest_certified_tv > hot.largest_certified_tv
    assert hot.share_within_max_tv == 1
    assert cold.share_within_max_tv < 1


def test_goes_through_json() -> None:
    sizes = describe_sizes(sample(5, 10, 2), [2.0], 0.05)
    assert LabelSizes.model_validate_json(sizes.model_dump_json()) == sizes


def test_refusals() -> None:
    with pytest.raises(ValueError, match="the sample has no rows"):
        describe_sizes(sample(0, 10, 0), [1.0], 0.02)
    with pytest.raises(TeacherAnswerError, match="not finite"):
        describe_sizes(np.full((1, 3), np.nan, dtype=np.float32), [1.0], 0.02)
    with pytest.raises(StoreError, match=r"allow a larger store\.max_tv"):
        describe_sizes(np.array([[0, -1000.2, -1000.4]], dtype=np.float32), [2000.0], 1e-9)
