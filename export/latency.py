"""How long one crop takes, on files measured by turns: on a busy machine the absolute times wander, their ratio does not.

Unit of data: one timed run of one session at batch 1.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from onnxruntime import InferenceSession

from export.graph import IMAGES, LOGITS
from export.label_space import Crops

NUM_WARMUP_RUNS = 5
Name = TypeVar("Name", bound=str)


@dataclass(frozen=True)
class Latency:
    """One session's times, each the median over the rounds."""

    p50_ms: float
    p99_ms: float
    ratio: float
    """p50 divided by that of the first session, within a round."""


def measure_latency(sessions: Mapping[Name, InferenceSession], crop_1HWC: Crops, rounds: int, repeats: int) -> dict[Name, Latency]:
    """Time sessions by turns: every repeat runs each of them once.

    Args:
        sessions: name -> student session; the first is the one that the ratios refer to.
        crop_1HWC: uint8 [1,H,W,3].
        rounds: each gives a median and a 99th percentile.
        repeats: timed runs of each session in one round.

    Returns:
        name -> latency.
    """
    for session in sessions.values():
        for _ in range(NUM_WARMUP_RUNS):
            session.run([LOGITS], {IMAGES: crop_1HWC})
    times_ms = np.array(
        [[_one_turn_ms(list(sessions.values()), crop_1HWC) for _ in range(repeats)] for _ in range(rounds)]
    )  # [rounds, repeats, sessions]
    p50_ms, p99_ms = np.median(times_ms, axis=1), np.percentile(times_ms, 99, axis=1)  # [rounds, sessions]
    ratio = p50_ms / p50_ms[:, :1]
    return {
        name: Latency(float(np.median(p50_ms[:, column])), float(np.median(p99_ms[:, column])), float(np.median(ratio[:, column])))
        for column, name in enumerate(sessions)
    }


def _one_turn_ms(sessions: list[InferenceSession], crop_1HWC: Crops) -> list[float]:
    times_ms = []
    for session in sessions:
        start = time.perf_counter()
        session.run([LOGITS], {IMAGES: crop_1HWC})
        times_ms.append(1000 * (time.perf_counter() - start))
    return times_ms
