"""What the teacher said of every crop that any arm trains on, kept in one file; needs numpy only.

Unit of data: one crop's logits. Shapes: S steps, B images of a step, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Keys: TypeAlias = npt.NDArray[np.uint8]
Logits: TypeAlias = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Answers:
    """Of the first epoch, with one crop a decode and with several."""

    logits_SBK: Logits
    """With one crop a decode, in the order of its batches."""
    by_crop: dict[bytes, Logits]
    """Of both, by `key_of`."""


def key_of(crop_HWC: npt.NDArray[np.uint8]) -> bytes:
    """Every eighth of the rows and columns, to the byte: enough to tell the crops of a bench apart, at no cost worth a mention."""
    step = max(1, len(crop_HWC) // 8)
    return crop_HWC[::step, ::step].tobytes()


def save_answers(path: Path, asked: Mapping[int, tuple[Keys, Logits]]) -> None:
    """`asked`: crops a decode -> keys uint8 [S,B,bytes] and logits float32 [S,B,K] of its first epoch; 1 is one of them."""
    arrays = {f"{what}-{number}": array for number, pair in asked.items() for what, array in zip(("keys", "logits"), pair, strict=True)}
    np.savez(path, **arrays)  # type: ignore[arg-type]


def load_answers(path: Path) -> Answers:
    """What `save_answers` kept."""
    by_crop: dict[bytes, Logits] = {}
    with np.load(path) as kept:
        for name in kept.files:
            if name.startswith("keys-"):
                keys, logits = kept[name], kept[name.replace("keys", "logits")]
                rows = zip(keys.reshape(-1, keys.shape[-1]), logits.reshape(-1, logits.shape[-1]), strict=True)
                by_crop |= {key.tobytes(): row for key, row in rows}
        return Answers(kept["logits-1"], by_crop)
