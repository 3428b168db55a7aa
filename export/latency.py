"""How long one crop takes, on files measured by turns: on a busy machine the absolute times wander, their ratio does not.

Unit of data: one timed run of one file at batch 1, in whatever runtime.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from export.label_space import Crops
from export.runtimes.runtime import Predict

NUM_WARMUP_RUNS = 5
Name = TypeVar("Name", bound=str)


@dataclass(frozen=True)
class Latency:
    """One file's times, each the median over the rounds."""

    p50_ms: float
    p99_ms: float
    ratio: float
    """p50 divided by that of the first file, within a round."""


def measure_latency(files: Mapping[Name, Predict], crop_1HWC: Crops, rounds: int, repeats: int) -> dict[Name, Latency]:
    """Time files by turns: every repeat runs each of them once, in an order of its own.

    Args:
        files: name -> what runs a crop; the first is the one that the ratios refer to.
        crop_1HWC: uint8 [1,H,W,3].
        rounds: each gives a median and a 99th percentile.
        repeats: timed runs of each file in one round.

    Returns:
        name -> latency.
    """
    for predict in files.values():
        for _ in range(NUM_WARMUP_RUNS):
            predict(crop_1HWC)
    # In an order that is drawn anew each time: whoever always ran behind a large file would always find the cache cold.
    draws = random.Random(0)
    times_ms = np.array(
        [[_one_turn_ms(list(files.values()), crop_1HWC, draws) for _ in range(repeats)] for _ in range(rounds)]
    )  # [rounds, repeats, files]
    p50_ms, p99_ms = np.median(times_ms, axis=1), np.percentile(times_ms, 99, axis=1)  # [rounds, files]
    ratio = p50_ms / p50_ms[:, :1]
    return {
        name: Latency(float(np.median(p50_ms[:, column])), float(np.median(p99_ms[:, column])), float(np.median(ratio[:, column])))
        for column, name in enumerate(files)
    }


def _one_turn_ms(files: list[Predict], crop_1HWC: Crops, draws: random.Random) -> list[float]:
    times_ms = [0.0] * len(files)
    for number in draws.sample(range(len(files)), len(files)):
        start = time.perf_counter()
        files[number](crop_1HWC)
        times_ms[number] = 1000 * (time.perf_counter() - start)
    return times_ms
