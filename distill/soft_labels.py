"""What a teacher said about crops: logits in a declared encoding, never probabilities, never a temperature baked in.

A record is the bytes kept for one crop. Two encodings so far: `dense16` (K fp16 logits) and `topk` (class ids, fp16 logits and the
log-sum-exp of the rest, spread evenly over it when read). The writer has the true logits at hand, so it takes the smallest encoding whose
exact total-variation error over the job's temperatures is within `max_tv`, and keeps that error with the record.

Shapes: N crops, K classes, R retained classes. Total variation (TV) is half the L1 distance of two distributions.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from distill.errors import StoreError, TeacherAnswerError

FloatArray = npt.NDArray[np.float32]

RETAINED = (1, 2, 3, 5, 8, 12, 20, 32, 50, 80, 128, 256)
"""Sizes of a `topk` record that the writer tries."""


class Encoding(enum.IntEnum):
    """How the bytes of a record are to be read."""

    DENSE16 = 0
    TOPK = 1


@dataclass(frozen=True)
class Record:
    """One crop's soft label as it is kept."""

    encoding: Encoding
    data: bytes
    max_tv: float
    """Largest total-variation error over the job's temperatures, computed exactly when the record was made."""
    max_logit_error: float
    """Largest error of any logit, both sides shifted to a largest logit of 0. It bounds the error at every other temperature."""


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
    """The smallest record of each row whose error stays within `max_tv` at every temperature.

    Raises:
        TeacherAnswerError: logits that are not finite.
        StoreError: not even fp16 keeps `max_tv` (logits beyond fp16's range or a limit too small), with the error that it has.
    """
    if not np.isfinite(logits_NK).all():
        raise TeacherAnswerError("the teacher's logits are not finite; they are not stored")
    num_classes = logits_NK.shape[1]
    records: list[Record | None] = [None] * len(logits_NK)
    open_rows = np.arange(len(logits_NK))
    order = np.argsort(-logits_NK, axis=1, kind="stable")
    for retained in (r for r in RETAINED if _topk_bytes(r, num_classes) < 2 * num_classes and r < num_classes):
        if not len(open_rows):
            break
        logits = logits_NK[open_rows]
        packed = _pack_topk(logits, order[open_rows, :retained], num_classes)
        errors, logit_errors = _errors(logits, _unpack_topk(packed, retained, num_classes), temperatures)
        for row, data, error, logit_error in zip(open_rows, packed, errors, logit_errors, strict=True):
            if error <= max_tv:
                records[row] = Record(Encoding.TOPK, data, float(error), float(logit_error))
        open_rows = np.array([row for row in open_rows if records[row] is None], dtype=np.int64)
    if len(open_rows):
        _encode_dense(logits_NK, open_rows, temperatures, max_tv, records)
    return [record for record in records if record is not None]


def _encode_dense(
    logits_NK: FloatArray, rows: npt.NDArray[np.int64], temperatures: Sequence[float], max_tv: float, records: list[Record | None]
) -> None:
    # Only differences of logits matter; with the largest at 0 fp16 is finest where the probability is. Its error is a share of the
    # difference, and a small temperature sees small differences only: at 0.1 as at 1 the total variation stays below 0.001.
    logits = logits_NK[rows]
    halves = (logits - logits.max(axis=1, keepdims=True)).clip(-65504, 0).astype("<f2")
    errors, logit_errors = _errors(logits, halves.astype(np.float32), temperatures)
    if errors.max() > max_tv:
        raise StoreError(f"fp16 logits miss max_tv {max_tv:g} (error {errors.max():.2g}); allow a larger store.max_tv")
    for row, half, error, logit_error in zip(rows, halves, errors, logit_errors, strict=True):
        records[row] = Record(Encoding.DENSE16, half.tobytes(), float(error), float(logit_error))


def decode(encodings: Sequence[int], data: Sequence[bytes], num_classes: int) -> FloatArray:
    """Logits float32 [N,K], each row known up to a constant (which no softmax sees).

    Raises:
        StoreError: an encoding that this version does not know, or a record of the wrong length.
    """
    logits_NK = np.empty((len(data), num_classes), dtype=np.float32)
    groups: dict[tuple[int, int], list[int]] = {}
    for row, (encoding, record) in enumerate(zip(encodings, data, strict=True)):
        groups.setdefault((encoding, len(record)), []).append(row)
    for (encoding, size), rows in groups.items():
        if encoding == Encoding.DENSE16 and size == 2 * num_classes:
            logits_NK[rows] = np.frombuffer(b"".join(data[r] for r in rows), "<f2").reshape(len(rows), num_classes)
        elif encoding == Encoding.TOPK and (retained := _retained(size, num_classes)) is not None:
            logits_NK[rows] = _unpack_topk([data[r] for r in rows], retained, num_classes)
        else:
            raise StoreError(f"a record of encoding {encoding} and {size} bytes is not one for {num_classes} classes")
    return logits_NK


def _id_type(num_classes: int) -> str:
    # Never fp16 (exact to 2048 only) and never int16 (wraps above 32,767).
    return "u1" if num_classes <= 2**8 else "<u2" if num_classes <= 2**16 else "<u4"


def _topk_bytes(retained: int, num_classes: int) -> int:
    return retained * (np.dtype(_id_type(num_classes)).itemsize + 2) + 4


def _retained(size: int, num_classes: int) -> int | None:
    retained, rest = divmod(size - 4, np.dtype(_id_type(num_classes)).itemsize + 2)
    return retained if rest == 0 and 0 < retained < num_classes else None


def _pack_topk(logits_NK: FloatArray, top_NR: npt.NDArray[np.int64], num_classes: int) -> list[bytes]:
    """ids, fp16 logits relative to the largest, float32 log-sum-exp of the rest relative to it."""
    relative_NK = logits_NK - logits_NK.max(axis=1, keepdims=True)
    kept_NR = np.take_along_axis(relative_NK, top_NR, axis=1).clip(-65504, 0).astype("<f2")
    tail_NK = relative_NK.astype(np.float64)
    np.put_along_axis(tail_NK, top_NR, -np.inf, axis=1)
    largest = tail_NK.max(axis=1, keepdims=True)
    tail_N = (largest[:, 0] + np.log(np.exp(tail_NK - largest).sum(axis=1))).astype("<f4")
    ids_NR = top_NR.astype(_id_type(num_classes))
    return [i.tobytes() + k.tobytes() + t.tobytes() for i, k, t in zip(ids_NR, kept_NR, tail_N, strict=True)]


def _unpack_topk(packed: Sequence[bytes], retained: int, num_classes: int) -> FloatArray:
    layout = np.dtype([("ids", _id_type(num_classes), (retained,)), ("logits", "<f2", (retained,)), ("tail", "<f4")])
    fields = np.frombuffer(b"".join(packed), layout)
    even_N = fields["tail"] - np.log(num_classes - retained)
    logits_NK = np.repeat(even_N[:, None], num_classes, axis=1).astype(np.float32)
    np.put_along_axis(logits_NK, fields["ids"].astype(np.int64), fields["logits"].astype(np.float32), axis=1)
    return logits_NK


def _errors(
    true_NK: FloatArray, read_NK: FloatArray, temperatures: Sequence[float]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """(largest TV over the temperatures, largest logit error) of each row."""
    tv = [0.5 * np.abs(softmax(true_NK, t).astype(np.float64) - softmax(read_NK, t)).sum(axis=1) for t in temperatures]
    relative = [logits.astype(np.float64) - logits.max(axis=1, keepdims=True) for logits in (true_NK, read_NK)]
    return np.max(tv, axis=0), np.abs(relative[0] - relative[1]).max(axis=1)
