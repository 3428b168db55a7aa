"""The bytes of a soft label: logits relative to the largest one, packed and unpacked for many rows at once.

    dense16   K fp16 logits
    topk      R class ids, R fp16 logits, fp32 log-sum-exp of the rest, which is spread evenly
    qdense    head byte, fp32 level of code 0, fp16 step, R - 1 fp16 logits in the order of the classes, K codes of b bits; the highest code
              says "one of the fp16 logits", the others are level - code * step. The largest of the R is left out when R is 1: it is 0
    qtopk     head byte, fp16 level of the rest, R class ids, and if R > 1 the fp16 second logit and R codes of b bits in the order of the
              ids; the highest code says "the largest, 0", code c is second - c * step, and 2 ** b - 1 steps lead from second to level

The head byte holds b - 1 in its lower 3 bits and the place of R in `RETAINED` (distill/soft_label_forms.py) in the upper 5. Codes are
packed without gaps, lowest bit first. The ids of qtopk rise, so each costs about 2 + log2(K / R) bits: the lower ones as they are, the
upper ones as the distance to the id before, counted in zeros (Elias 1974, Fano 1971); few ids of few classes are held whole. Numbers are
little-endian.

Shapes: N crops, K classes, R retained classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from distill.errors import StoreError
from distill.soft_label_bits import Bytes, pack_bits, packed_bytes, planes, unpack_bits
from distill.soft_label_forms import DENSE16, RETAINED, Encoding, Form, Ints, id_type

FloatArray = npt.NDArray[np.float32]

LOWEST = -65504.0
"""fp16's, and the lowest relative logit of any record."""


@dataclass(frozen=True)
class Scales:
    """What a row's codes mean; float32 [N], each as the record holds it."""

    anchor_N: FloatArray
    """Logit at which code 0 is centred. qtopk: the second logit, as stored; qdense: not stored."""
    level_N: FloatArray
    """qdense: what code 0 is read as. qtopk: what a class that is not retained is read as. topk: the log-sum-exp of those."""
    step_N: FloatArray
    """qdense: between neighbouring codes."""

    def of(self, rows: Ints) -> Scales:
        """Of some rows."""
        return Scales(self.anchor_N[rows], self.level_N[rows], self.step_N[rows])


def codes_below(anchor_N1: FloatArray, logits_NK: FloatArray, step_N1: FloatArray, highest_N1: FloatArray | np.float32) -> FloatArray:
    """Whole numbers 0..highest as float32: how many steps a logit lies below the anchor."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        codes_NK = np.rint((anchor_N1 - logits_NK) / step_N1)
    codes_NK[np.isnan(codes_NK)] = 0  # 0 / 0: no step, all logits alike
    return np.clip(codes_NK, 0, highest_N1, out=codes_NK)


def relative(logits_NK: FloatArray) -> FloatArray:
    """Logits below the largest of each row, at least `LOWEST`: only differences matter, and fp16 is finest near 0."""
    below_NK = logits_NK.astype(np.float64) - logits_NK.max(axis=1, keepdims=True)
    return np.maximum(below_NK, LOWEST).astype(np.float32)


def pack(form: Form, logits_NK: FloatArray, scales: Scales) -> list[bytes]:
    """Records of rows that share one form.

    Args:
        logits_NK: relative to the largest, at least `LOWEST`.
        scales: of these rows.
    """
    if form.encoding == Encoding.DENSE16:
        return [row.tobytes() for row in logits_NK.astype("<f2")]
    if form.encoding == Encoding.QDENSE:
        return _rows_of(_pack_qdense(form, logits_NK, scales))
    top_NR = _largest(logits_NK, form.retained)
    kept_NR = np.take_along_axis(logits_NK, top_NR, axis=1)
    if form.encoding == Encoding.QTOPK:
        return _rows_of(_pack_qtopk(form, logits_NK.shape[1], top_NR, kept_NR, scales))
    ids_NR = top_NR.astype(id_type(logits_NK.shape[1]))
    return _rows_of([_bytes_of(ids_NR), _bytes_of(kept_NR.astype("<f2")), _bytes_of(scales.level_N[:, None].astype("<f4"))])


def topk_level(tail_N: FloatArray, num_rest: int | Ints) -> FloatArray:
    """What each of the rest is read as, from their log-sum-exp."""
    return (tail_N - np.log(num_rest)).astype(np.float32)


def unpack(encodings: Sequence[int], data: Sequence[bytes], num_classes: int) -> FloatArray:
    """Logits float32 [N,K], each row up to a constant.

    Raises:
        StoreError: an encoding that this version does not know, or bytes that are no record of it.
    """
    logits_NK = np.empty((len(data), num_classes), dtype=np.float32)
    groups: dict[tuple[int, int, int], list[int]] = {}
    for row, (encoding, record) in enumerate(zip(encodings, data, strict=True)):
        head = record[0] if encoding >= Encoding.QDENSE and record else 0
        groups.setdefault((encoding, len(record), head), []).append(row)
    for (encoding, size, head), rows in groups.items():
        form = _form_of(encoding, size, head, num_classes)
        if form is None:
            raise StoreError(f"a record of encoding {encoding} and {size} bytes is not one for {num_classes} classes")
        bytes_NS = np.frombuffer(b"".join([data[r] for r in rows]), np.uint8).reshape(len(rows), size)
        with np.errstate(invalid="ignore", over="ignore"):  # of damaged records
            logits_NK[rows] = _UNPACK[form.encoding](form, bytes_NS, num_classes)
    if not np.isfinite(logits_NK).all():
        raise StoreError("a record of soft labels is damaged: it holds logits that are not finite")
    return logits_NK


@lru_cache(maxsize=4096)
def _form_of(encoding: int, size: int, head: int, num_classes: int) -> Form | None:
    """The form of a record, or None if there is none of that size."""
    if encoding == Encoding.DENSE16:
        form = DENSE16
    elif encoding == Encoding.TOPK:
        form = Form(Encoding.TOPK, (size - 4) // (np.dtype(id_type(num_classes)).itemsize + 2), 16)
    elif encoding in (Encoding.QDENSE, Encoding.QTOPK):
        form = Form(Encoding(encoding), RETAINED[head >> 3], (head & 7) + 1)
    else:
        return None
    if form.encoding != Encoding.DENSE16 and not 0 < form.retained < num_classes:
        return None
    return form if form.num_bytes(num_classes) == size else None


def _unpack_dense16(form: Form, bytes_NS: Bytes, num_classes: int) -> FloatArray:
    return bytes_NS.view("<f2").astype(np.float32)


def _unpack_topk(form: Form, bytes_NS: Bytes, num_classes: int) -> FloatArray:
    layout = np.dtype([("ids", id_type(num_classes), (form.retained,)), ("logits", "<f2", (form.retained,)), ("tail", "<f4")])
    fields = np.frombuffer(bytes_NS.tobytes(), layout)
    return _sparse(fields["ids"], fields["logits"].astype(np.float32), topk_level(fields["tail"], num_classes - form.retained), num_classes)


def qtopk_step(second_N: FloatArray, level_N: FloatArray, highest_N: FloatArray | np.float32) -> FloatArray:
    """Between neighbouring codes of a qtopk record."""
    return np.maximum(second_N - level_N, np.float32(0)) / highest_N


def _pack_qtopk(form: Form, num_classes: int, top_NR: Ints, kept_NR: FloatArray, scales: Scales) -> list[Bytes]:
    place_NR = np.argsort(top_NR, axis=1)
    parts = [_heads(form, len(top_NR)), _bytes_of(scales.level_N[:, None].astype("<f2"))]
    parts += _pack_ids(form, np.take_along_axis(top_NR, place_NR, axis=1), num_classes)
    if form.retained == 1:
        return parts
    escape = np.float32(2**form.bits - 1)
    step_N1 = qtopk_step(scales.anchor_N, scales.level_N, escape)[:, None]
    codes_NR = codes_below(scales.anchor_N[:, None], kept_NR, step_N1, escape - 1)
    codes_NR[:, 0] = escape
    codes_NR = np.take_along_axis(codes_NR, place_NR, axis=1)
    return [*parts, _bytes_of(scales.anchor_N[:, None].astype("<f2")), pack_bits(codes_NR.astype(np.uint8), form.bits)]


def _unpack_qtopk(form: Form, bytes_NS: Bytes, num_classes: int) -> FloatArray:
    level_N = _numbers(bytes_NS, 1, "<f2")
    ids_NR, start = _unpack_ids(form, bytes_NS, 3, num_classes)
    kept_NR = np.zeros(ids_NR.shape, dtype=np.float32)
    if form.retained > 1:
        second_N, escape = _numbers(bytes_NS, start, "<f2"), np.float32(2**form.bits - 1)
        codes_NR = unpack_bits(bytes_NS[:, start + 2 :], form.retained, form.bits)
        kept_NR = second_N[:, None] - codes_NR * qtopk_step(second_N, level_N, escape)[:, None]
        kept_NR[codes_NR == escape] = 0
    return _sparse(ids_NR, kept_NR, level_N, num_classes)


def _pack_ids(form: Form, rising_NR: Ints, num_classes: int) -> list[Bytes]:
    num_low = form.num_low_bits(num_classes)
    low = [pack_bits((rising_NR >> shift & (1 << width) - 1).astype(np.uint8), width) for shift, width in planes(num_low)]
    if not form.num_high_bytes(num_classes):
        return low
    is_one = np.zeros((len(rising_NR), 8 * form.num_high_bytes(num_classes)), dtype=np.uint8)
    np.put_along_axis(is_one, (rising_NR >> num_low) + np.arange(form.retained), 1, axis=1)
    return [*low, np.packbits(is_one, axis=1, bitorder="little")]


def _unpack_ids(form: Form, bytes_NS: Bytes, start: int, num_classes: int) -> tuple[Ints, int]:
    """(ids [N,R], where they end)."""
    num_low = form.num_low_bits(num_classes)
    ids_NR = np.zeros((len(bytes_NS), form.retained), dtype=np.int64)
    for shift, width in planes(num_low):
        ids_NR |= unpack_bits(bytes_NS[:, start:], form.retained, width).astype(np.int64) << shift
        start += packed_bytes(form.retained, width)
    end = start + form.num_high_bytes(num_classes)
    if end > start:
        is_one = np.unpackbits(bytes_NS[:, start:end], axis=1, bitorder="little")
        if (np.count_nonzero(is_one, axis=1) != form.retained).any():
            raise StoreError(f"a record of encoding {form.encoding} does not hold the {form.retained} class ids that it announces")
        ids_NR |= (np.nonzero(is_one)[1].reshape(ids_NR.shape) - np.arange(form.retained)) << num_low
    if (ids_NR >= num_classes).any():
        raise StoreError(f"a record of encoding {form.encoding} names class {ids_NR.max()}; there are {num_classes} classes")
    return ids_NR, end


def _pack_qdense(form: Form, logits_NK: FloatArray, scales: Scales) -> list[Bytes]:
    escape = 2**form.bits - 1
    highest = np.float32(max(escape - 1, 0))
    codes_NK = codes_below(scales.anchor_N[:, None], logits_NK, scales.step_N[:, None], highest).astype(np.uint8)
    np.put_along_axis(codes_NK, _largest(logits_NK, form.retained), np.uint8(escape), axis=1)
    parts = [
        _heads(form, len(logits_NK)),
        _bytes_of(scales.level_N[:, None].astype("<f4")),
        _bytes_of(scales.step_N[:, None].astype("<f2")),
    ]
    if form.num_halves:
        parts.append(_bytes_of(logits_NK[codes_NK == escape].reshape(-1, form.retained).astype("<f2")))
    return [*parts, pack_bits(codes_NK, form.bits)]


def _unpack_qdense(form: Form, bytes_NS: Bytes, num_classes: int) -> FloatArray:
    level_N1, step_N1 = _numbers(bytes_NS, 1, "<f4")[:, None], _numbers(bytes_NS, 5, "<f2")[:, None]
    start = 7 + 2 * form.num_halves
    codes_NK = unpack_bits(bytes_NS[:, start:], num_classes, form.bits)
    is_kept_NK = codes_NK == 2**form.bits - 1
    if (np.count_nonzero(is_kept_NK, axis=1) != form.retained).any():
        raise StoreError(f"a record of encoding {form.encoding} does not hold the {form.retained} logits that it announces")
    logits_NK: FloatArray = level_N1 - codes_NK * step_N1
    halves_NR = np.ascontiguousarray(bytes_NS[:, 7:start]).view("<f2")
    logits_NK[is_kept_NK] = halves_NR.ravel() if form.num_halves else 0
    return logits_NK


_UNPACK = {
    Encoding.DENSE16: _unpack_dense16,
    Encoding.TOPK: _unpack_topk,
    Encoding.QDENSE: _unpack_qdense,
    Encoding.QTOPK: _unpack_qtopk,
}


def _largest(logits_NK: FloatArray, retained: int) -> Ints:
    """Class ids of the R largest logits of each row, largest first."""
    top_NR = np.argpartition(-logits_NK, retained - 1, axis=1)[:, :retained]
    order_NR = np.argsort(-np.take_along_axis(logits_NK, top_NR, axis=1), axis=1, kind="stable")
    return np.take_along_axis(top_NR, order_NR, axis=1)


def _sparse(ids_NR: npt.NDArray[np.integer], kept_NR: FloatArray, level_N: FloatArray, num_classes: int) -> FloatArray:
    logits_NK = np.repeat(level_N[:, None], num_classes, axis=1)
    logits_NK[np.arange(len(ids_NR))[:, None], ids_NR] = kept_NR
    return logits_NK


def _heads(form: Form, num: int) -> Bytes:
    return np.full((num, 1), form.head, dtype=np.uint8)


def _numbers(bytes_NS: Bytes, start: int, kind: str) -> FloatArray:
    """One number of each row as float32 [N]."""
    width = np.dtype(kind).itemsize
    return np.ascontiguousarray(bytes_NS[:, start : start + width]).view(kind)[:, 0].astype(np.float32)


def _bytes_of(values_NX: npt.NDArray[np.generic]) -> Bytes:
    return np.ascontiguousarray(values_NX).view(np.uint8)


def _rows_of(parts: Sequence[Bytes]) -> list[bytes]:
    joined_NS = np.concatenate(parts, axis=1)
    whole, size = joined_NS.tobytes(), joined_NS.shape[1]
    return [whole[start : start + size] for start in range(0, len(whole), size)]
