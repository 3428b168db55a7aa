"""Which layers of a student must not be rounded to 8 bits: found on calibration crops, one layer at a time, within a time limit; putting
the worst ones together may take as long again.

Each layer's harm is how much nearer the int8 file comes to the fp32 file (KL over the crops) when that layer alone stays in float. Then
the most harmful ones stay in float together, as long as each helps and the file stays small enough. No test crop is looked at.

Unit of data: one layer of one file. Shapes: N crops, K classes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from export.gate import MIN_INT8_WEIGHT_SHARE
from export.label_space import Crops, Logits, kl_divergence, top1_agreement
from export.measured import logits_of
from export.quantize import Quantizer, int8_weight_share
from export.runtimes.onnx_runtime import open_file
from export.settings import Int8Gate, SensitiveLayers

NUM_CROPS = 128
"""Calibration crops that every trial goes through."""


@dataclass(frozen=True)
class Found:
    """What the search brought."""

    keep_in_float: tuple[str, ...]
    """Layers, the most harmful first; empty where none helps."""
    num_tried: int
    """Layers that were looked at before the time was over."""
    num_layers: int
    """Layers that there are."""

    def describe(self) -> str:
        """In words."""
        tried = f"{self.num_tried} of {self.num_layers} layers tried alone"
        return f"in float: {', '.join(self.keep_in_float)} ({tried})" if self.keep_in_float else f"no layer helps in float ({tried})"


@dataclass(frozen=True)
class _Trial:
    """One int8 file compared with fp32 on the crops."""

    kl: float
    agreement: float
    size_bytes: int
    is_int8: bool
    """Whether enough of it is for the name."""


def find_sensitive_layers(
    quantizer: Quantizer, fp32: Path, crops_NHWC: Crops, settings: SensitiveLayers, gate: Int8Gate, folder: Path, reduce_range: bool
) -> Found:
    """The layers that stay in float.

    Args:
        quantizer: of the fp32 file.
        crops_NHWC: uint8 [N,H,W,3], calibration crops; the first `NUM_CROPS` are used.
        folder: for files that are written on the way.
        reduce_range: as in `Quantizer.write`.
    """
    search = _Search(quantizer, fp32, crops_NHWC[:NUM_CROPS], folder / "trial.onnx", reduce_range)
    started = time.monotonic()
    plain, layers = search.try_keeping(()), quantizer.layers
    gains: dict[str, float] = {}
    for layer in _ends_first(layers):
        if time.monotonic() - started > settings.max_seconds:
            break
        gains[layer] = plain.kl - search.try_keeping((layer,)).kl
    kept: tuple[str, ...] = ()
    best = plain
    for layer in sorted((name for name in gains if gains[name] > 0), key=lambda name: -gains[name]):
        is_late = time.monotonic() - started > 2 * settings.max_seconds
        if is_late or len(kept) == settings.max_layers or (kept and 1 - best.agreement <= gate.max_accuracy_drop / 2):
            break
        trial = search.try_keeping((*kept, layer))
        if trial.kl < best.kl and trial.is_int8 and trial.size_bytes <= gate.max_size_ratio * fp32.stat().st_size:
            kept, best = (*kept, layer), trial
    return Found(kept, len(gains), len(layers))


def _ends_first(layers: Sequence[str]) -> list[str]:
    """First, last, second, last but one: most harm is done near the ends, and the time may run out."""
    order = []
    for near, far in zip(layers, reversed(layers), strict=True):
        order += [near, far]
    return list(dict.fromkeys(order))


class _Search:
    def __init__(self, quantizer: Quantizer, fp32: Path, crops_NHWC: Crops, target: Path, reduce_range: bool) -> None:
        self._quantizer, self._crops, self._target, self._reduce_range = quantizer, crops_NHWC, target, reduce_range
        self._fp32_NK: Logits = logits_of(open_file(fp32, 1), crops_NHWC, fp32.name)

    def try_keeping(self, layers: Sequence[str]) -> _Trial:
        self._quantizer.write(self._target, keep_in_float=layers, reduce_range=self._reduce_range)
        logits_NK = logits_of(open_file(self._target, 1), self._crops, self._target.name)
        kl = float(kl_divergence(self._fp32_NK, logits_NK).mean())
        is_int8 = int8_weight_share(self._target) >= MIN_INT8_WEIGHT_SHARE
        return _Trial(kl, top1_agreement(self._fp32_NK, logits_NK), self._target.stat().st_size, is_int8)
