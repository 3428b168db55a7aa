"""What the GPU can do at most, measured as any program can have it: a large copy and a large matrix product.

Unit of data: the two rates.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

REPEATS = 10


def measure_ceilings() -> dict[str, float]:
    """`copy_bytes_per_s` (bytes read and bytes written), and `matmul_flops` of bf16 factors of random numbers."""
    found = {"copy_bytes_per_s": _copy_bytes_per_s(), "matmul_flops": _matmul_flops()}
    torch.cuda.empty_cache()  # the arms, in processes of their own, need the memory
    return found


def _copy_bytes_per_s() -> float:
    source = torch.randn(2**29, device="cuda")  # 2 GiB: no cache holds it
    target = torch.empty_like(source)
    return 2 * source.nbytes / _median_s(lambda: target.copy_(source))


def _matmul_flops() -> float:
    one, other = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / _median_s(lambda: one @ other)


def _median_s(work: Callable[[], object]) -> float:
    """Seconds of one call, by the device's clock."""
    for _ in range(3):
        work()
    seconds = []
    for _ in range(REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        seconds.append(begin.elapsed_time(end) / 1000)
    return float(np.median(seconds))
