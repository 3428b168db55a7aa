"""The ways to keep a label, and how many bytes each takes: a form is an encoding, how many classes it retains, and the bits of its codes.

Shapes: K classes, M forms, R retained classes.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from distill.soft_label_bits import packed_bytes, planes

Ints = npt.NDArray[np.int64]

RETAINED = (*range(1, 9), 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512)
"""Numbers of retained classes R that are written. Their places stand in records: add none, move none."""


class Encoding(enum.IntEnum):
    """How the bytes of a record are to be read."""

    DENSE16 = 0
    TOPK = 1
    QDENSE = 2
    QTOPK = 3


@dataclass(frozen=True)
class Form:
    """One way to keep a label."""

    encoding: Encoding
    retained: int
    """R; 0 for dense16."""
    bits: int
    """b; 16 where logits are fp16."""

    def num_bytes(self, num_classes: int) -> int:
        """Size of a record."""
        if self.encoding == Encoding.DENSE16:
            return 2 * num_classes
        if self.encoding == Encoding.TOPK:
            return self.retained * (np.dtype(id_type(num_classes)).itemsize + 2) + 4
        if self.encoding == Encoding.QDENSE:
            return 7 + 2 * self.num_halves + packed_bytes(num_classes, self.bits)
        return 3 + self.num_id_bytes(num_classes) + (2 + packed_bytes(self.retained, self.bits) if self.retained > 1 else 0)

    @property
    def num_halves(self) -> int:
        """fp16 logits in a qdense record."""
        return self.retained if self.retained > 1 else 0

    def num_low_bits(self, num_classes: int) -> int:
        """Bits of a class id that a qtopk record holds as they are."""
        return _id_split(self.retained, num_classes)[0]

    def num_high_bytes(self, num_classes: int) -> int:
        """Bytes for the rest of the ids: a one for each, and a zero for each step of what is left of the ids without their lower bits."""
        return _id_split(self.retained, num_classes)[1]

    def num_id_bytes(self, num_classes: int) -> int:
        """Bytes of all ids of a qtopk record."""
        num_low, num_high_bytes = _id_split(self.retained, num_classes)
        return _bytes_of_ids(self.retained, num_low) + num_high_bytes

    @property
    def head(self) -> int:
        """The head byte of qdense and qtopk."""
        return RETAINED.index(self.retained) << 3 | self.bits - 1


@lru_cache(maxsize=1024)
def _id_split(retained: int, num_classes: int) -> tuple[int, int]:
    """(lower bits of each id, bytes of the upper bits of all); all bits are lower ones where that is no larger."""
    whole, low = (num_classes - 1).bit_length(), (num_classes // retained).bit_length() - 1
    num_high_bytes = packed_bytes(retained + (num_classes - 1 >> low), 1)
    return (whole, 0) if _bytes_of_ids(retained, whole) <= _bytes_of_ids(retained, low) + num_high_bytes else (low, num_high_bytes)


def _bytes_of_ids(retained: int, num_bits: int) -> int:
    return sum(packed_bytes(retained, width) for _, width in planes(num_bits))


DENSE16 = Form(Encoding.DENSE16, 0, 16)
"""The form that is taken when no smaller one fits."""


@dataclass(frozen=True)
class FormTable:
    """Every form that is smaller than dense16, smallest first, as columns."""

    forms: tuple[Form, ...]
    encoding_M: Ints
    retained_M: Ints
    bits_M: Ints
    size_M: Ints
    """Bytes."""
    family_M: Ints
    """Equal for forms that are alike but for the number of retained classes."""

    @property
    def num_families(self) -> int:
        """How many."""
        return int(self.family_M.max(initial=-1)) + 1


@lru_cache(maxsize=16)
def form_table(num_classes: int) -> FormTable:
    """The forms that the writer chooses from."""
    retained = [r for r in RETAINED if r < num_classes]
    forms = [Form(Encoding.TOPK, r, 16) for r in retained]
    forms += [Form(Encoding.QTOPK, r, bits) for r in retained for bits in (range(2, 8) if r > 2 else (1,))]  # the two largest need no codes
    forms += [Form(Encoding.QDENSE, r, bits) for r in retained[::2] if r < 256 for bits in range(1, 9)]
    smaller = [form for form in forms if form.num_bytes(num_classes) < DENSE16.num_bytes(num_classes)]
    smaller.sort(key=lambda form: form.num_bytes(num_classes))
    families = {pair: place for place, pair in enumerate(dict.fromkeys((form.encoding, form.bits) for form in smaller))}
    columns = [(f.encoding, f.retained, f.bits, f.num_bytes(num_classes), families[f.encoding, f.bits]) for f in smaller]
    return FormTable(tuple(smaller), *np.array(columns, dtype=np.int64).reshape(-1, 5).T)


def id_type(num_classes: int) -> str:
    """numpy's name of the type of a topk record's ids."""
    # Never fp16 (exact to 2048 only) and never int16 (wraps above 32,767).
    return "u1" if num_classes <= 2**8 else "<u2" if num_classes <= 2**16 else "<u4"
