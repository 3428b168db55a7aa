"""The stream alone, without labels or a student: what several crops a decode save where decoding is what a run waits for.

Unit of data: one pass over as many crops as the case has images.
"""

from __future__ import annotations

import time

from bench.distill.cases import Prepared


def measure_decoding(prepared: Prepared, crops_per_decode: int) -> dict[str, float]:
    """Read, decode and crop; `prepared.threads` threads decode.

    Returns:
        crops_per_s, and cpu_ms_per_crop of this process.
    """
    wall, cpu = time.perf_counter(), time.process_time()
    num_crops = sum(len(batch.image_ids) for batch in prepared.crops(crops_per_decode))
    return {
        "crops_per_decode": crops_per_decode,
        "crops_per_s": num_crops / (time.perf_counter() - wall),
        "cpu_ms_per_crop": 1e3 * (time.process_time() - cpu) / num_crops,
    }
