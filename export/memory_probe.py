"""The program that `export.memory` starts: loads one runtime, then one file, runs a few crops, and says how much memory that took.

python -m export.memory_probe RUNTIME FILE IMAGE_SIZE      prints the bytes, or `null` where the system does not tell
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from export.runtimes.runtime import RUNTIMES, load_runtime

NUM_RUNS = 5


def high_water_bytes() -> int | None:
    """Largest resident memory of this process so far; None where there is no Linux /proc. (`ru_maxrss` would not do: a child starts with
    its parent's.)"""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    line = next((line for line in status.read_text().splitlines() if line.startswith("VmHWM:")), None)
    return None if line is None else int(line.split()[1]) * 1024


def forget_high_water() -> None:
    """Let the high-water mark start again at what is in use now; where the kernel refuses, the import's own peak stays in the base."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def probe(runtime: str, path: Path, image_size: int) -> int | None:
    """Bytes that loading and running a file adds to the runtime alone."""
    name = next(known for known in RUNTIMES if known == runtime)
    loaded = load_runtime(name)
    loaded.engine()
    crop_1HWC = np.zeros((1, image_size, image_size, 3), np.uint8)
    forget_high_water()
    base = high_water_bytes()
    predict = loaded.open_file(path, 1)
    for _ in range(NUM_RUNS):
        predict(crop_1HWC)
    peak = high_water_bytes()
    return None if base is None or peak is None else max(0, peak - base)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(probe(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))) + "\n")
