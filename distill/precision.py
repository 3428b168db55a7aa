"""In which number format a network computes. Weights, losses and batch-norm statistics are always float32."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch

Precision: TypeAlias = Literal["auto", "fp32", "bf16"]
"""`auto` takes bf16 where the hardware multiplies it faster than float32."""


def resolve_precision(precision: Precision, device: torch.device) -> Literal["fp32", "bf16"]:
    """What `auto` means on this device."""
    if precision != "auto":
        return precision
    return "bf16" if _has_fast_bf16(device) else "fp32"


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """The context in which a network is run forward."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=resolve_precision(precision, device) == "bf16")


def _has_fast_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # Without these instructions bf16 is emulated, which is slower than float32.
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
