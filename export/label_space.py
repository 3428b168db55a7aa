"""Distances between what two classifiers say about the same crops. Always float64, always from logits.

Shapes: N crops, K classes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Crops = npt.NDArray[np.uint8]
"""uint8 [N,H,W,3], RGB."""
Logits = npt.NDArray[np.floating[Any]]
"""[N,K], before softmax."""
Reals = npt.NDArray[np.float64]


def softmax(logits_NK: npt.ArrayLike) -> Reals:
    """softmax over the classes, [N,K]. Divide by the temperature first."""
    return np.exp(log_softmax(logits_NK))


def log_softmax(logits_NK: npt.ArrayLike) -> Reals:
    """log of softmax over the classes, [N,K]."""
    values = np.asarray(logits_NK, dtype=np.float64)
    shifted = values - values.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def kl_divergence(reference_NK: npt.ArrayLike, other_NK: npt.ArrayLike, temperature: float = 1.0) -> Reals:
    """KL(softmax(reference / T) || softmax(other / T)) of each crop, [N], in nats. Never takes the log of a rounded probability."""
    log_p_NK = log_softmax(np.asarray(reference_NK, dtype=np.float64) / temperature)
    log_q_NK = log_softmax(np.asarray(other_NK, dtype=np.float64) / temperature)
    # Below about 1e-16 rounding can make the sum negative, which no KL is.
    return np.maximum((np.exp(log_p_NK) * (log_p_NK - log_q_NK)).sum(axis=-1), 0.0)


def top1_agreement(reference_NK: Logits, other_NK: Logits) -> float:
    """Share of crops with the same most likely class."""
    return float((reference_NK.argmax(axis=-1) == other_NK.argmax(axis=-1)).mean())
