"""The stream alone, without labels or a student: what several crops a decode save where the stream is what a run waits for.

    python -m bench.distill.decoding PREPARED CROPS_PER_DECODE      # one JSON line

Unit of data: one pass over as many crops as the case has images, from its first batch on.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time

from bench.distill.cases import Prepared


def measure_decoding(prepared: Prepared, crops_per_decode: int) -> dict[str, float]:
    """Read, decode and crop in a fresh process; `prepared.threads` threads decode.

    Returns:
        crops_per_decode, crops_per_s, and cpu_ms_per_crop of the process.
    """
    command = [sys.executable, "-m", "bench.distill.decoding", prepared.to_json(), str(crops_per_decode)]
    measured: dict[str, float] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    return measured


def main() -> None:
    prepared, crops_per_decode = Prepared.from_json(sys.argv[1]), int(sys.argv[2])
    batches = prepared.crops(crops_per_decode)
    next(batches)
    wall, cpu = time.perf_counter(), time.process_time()
    num_crops = sum(len(batch.image_ids) for batch in batches)
    seconds, cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu
    measured = {"crops_per_s": num_crops / seconds, "cpu_ms_per_crop": 1e3 * cpu_seconds / num_crops}
    print(json.dumps({"crops_per_decode": crops_per_decode, **measured}))


if __name__ == "__main__":
    main()
