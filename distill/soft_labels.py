"""What a teacher said about crops: logits in a declared encoding, never probabilities, never a temperature baked in.

A record is the bytes kept for one crop (distill/soft_label_formats.py says what they are). The writer has the true logits at hand, so it
takes the smallest form whose exact total-variation error over the job's temperatures is within `max_tv` (distill/soft_label_search.py), and
keeps that error with the record.

Shapes: N crops, K classes. Total variation (TV) is half the L1 distance of two distributions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from distill.errors import StoreError, TeacherAnswerError
from distill.soft_label_formats import FloatArray, pack, relative, unpack
from distill.soft_label_forms import Encoding
from distill.soft_label_search import choose

__all__ = ["Encoding", "FloatArray", "Record", "certified_tv", "decode", "encode", "softmax"]


@dataclass(frozen=True)
class Record:
    """One crop's soft label as it is kept."""

    encoding: Encoding
    data: bytes
    max_tv: float
    """Largest total-variation error over the job's temperatures, computed from what `decode` gives, rounded up to a float32."""
    max_logit_error: float
    """Largest error of any logit under the shift of the whole row (which no softmax sees) that makes it smallest, rounded up to a float32.
    It bounds the error at every other temperature."""


def certified_tv(max_logit_error: npt.NDArray[np.float64], temperature: float) -> npt.NDArray[np.float64]:
    """Upper bound of the total-variation error at `temperature` when every logit is within `max_logit_error`: tanh(error / 2T).

    The worst case raises one set of classes by the error and lowers the rest by it.
    """
    return np.tanh(max_logit_error / (2 * temperature))


def softmax(logits_NK: FloatArray, temperature: float) -> FloatArray:
    """softmax(logits / temperature) in float64, returned as float32 [N,K]."""
    scaled = logits_NK.astype(np.float64) / temperature
    scaled -= scaled.max(axis=1, keepdims=True)
    exponentials = np.exp(scaled)
    return (exponentials / exponentials.sum(axis=1, keepdims=True)).astype(np.float32)


def encode(logits_NK: FloatArray, temperatures: Sequence[float], max_tv: float) -> list[Record]:
    """The smallest record found of each row whose error stays within `max_tv` at every temperature.

    Args:
        logits_NK: float32 [N,K], K at least 2.
        temperatures: those of the job, each above 0.
        max_tv: largest total-variation error.

    Raises:
        TeacherAnswerError: logits that are not finite.
        StoreError: not even fp16 keeps `max_tv` (logits beyond fp16's range or a limit too small), with the error that it has.
    """
    if not np.isfinite(logits_NK).all():
        raise TeacherAnswerError("the teacher's logits are not finite; they are not stored")
    if not len(logits_NK):
        return []
    choice = choose(logits_NK, temperatures, max_tv)
    if not choice.tv_N.max() <= max_tv:  # only dense16 is taken without fitting; and an error that is no number fits nothing
        raise StoreError(f"fp16 logits miss max_tv {max_tv:g} (error {choice.tv_N.max():.2g}); allow a larger store.max_tv")
    order = np.argsort(choice.form_N, kind="stable")
    records: dict[int, Record] = {}
    for rows in np.split(order, np.flatnonzero(np.diff(choice.form_N[order])) + 1):
        form = choice.forms[choice.form_N[rows[0]]]
        packed = pack(form, relative(logits_NK[rows]), choice.scales.of(rows))
        stated = zip(choice.tv_N[rows].tolist(), choice.logit_error_N[rows].tolist(), strict=True)
        records |= {row: Record(form.encoding, data, *errors) for row, data, errors in zip(rows.tolist(), packed, stated, strict=True)}
    return [records[row] for row in range(len(records))]


def decode(encodings: Sequence[int], data: Sequence[bytes], num_classes: int) -> FloatArray:
    """Logits float32 [N,K], each row known up to a constant (which no softmax sees).

    Raises:
        StoreError: an encoding that this version does not know, or bytes that are no record of it.
    """
    return unpack(encodings, data, num_classes)
