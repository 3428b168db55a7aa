"""Which machine a number was measured on. Unit of data: one line of text."""

from __future__ import annotations

import os
import platform
from pathlib import Path

VECTOR_FLAGS = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm")
"""Of the flags of /proc/cpuinfo, those that decide how fast int8 is."""


def describe_machine() -> str:
    """Processor, cores and system, in a few words."""
    model = _cpuinfo("model name") or platform.processor() or platform.machine()
    return f"{model}, {os.cpu_count()} cores, {platform.system()}"


def vector_instructions() -> tuple[str, ...]:
    """The vector instructions for small integers that this processor has; empty where the system does not say."""
    flags = set((_cpuinfo("flags") or _cpuinfo("Features")).split())
    return tuple(flag for flag in VECTOR_FLAGS if flag in flags)


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpuinfo(key: str) -> str:
    """The first value of a key in /proc/cpuinfo; empty where there is none."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    return next((value.strip() for name, _, value in (line.partition(":") for line in lines) if name.strip() == key), "")
