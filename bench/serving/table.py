"""Cells to a table: median over the rounds, ratios within a round.

Unit of data: one cell, a system under a load in a round.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.serving.load import LOADS

Cell = dict[str, Any]

WHAT = {
    "engine": "ONNX Runtime in the asking process",
    "grpc": "ours: Triton over gRPC",
    "shm": "ours: Triton, shared memory",
    "client": "ours: our client to REST, binary",
    "rest": "ours: REST, binary",
    "fastapi": "plain FastAPI",
    "litserve": "LitServe, batching",
    "ray_serve": "Ray Serve, batching",
    "decode": "decode + crop + engine, in the asking process",
    "jpeg": "ours: REST, one JPEG in, JSON out",
}
FILES = ("decode", "jpeg")


def write_table(results: Path) -> Path:
    """Write `TABLE.md`; returns its path."""
    lines = ["# What serving costs", "", "Made by `python -m bench.serving table`; do not edit.", ""]
    kept = {path.stem: json.loads(path.read_text()) for path in sorted(results.glob("*.json"))}
    for result in kept.values():
        lines += _one_teacher(result) if "cells" in result else []
    if "idle" in kept:
        lines += [f"Idle: {kept['idle']['share_of_a_core']:.2%} of one core over {kept['idle']['seconds']:g} s, Triton included.", ""]
    if "soak" in kept:
        lines += _soak(kept["soak"])
    target = results / "TABLE.md"
    target.write_text("\n".join(lines) + "\n")
    return target


def _soak(result: dict[str, Any]) -> list[str]:
    slopes = result["mb_per_hour"]
    total = sum(result["answers"].values())
    return [
        f"Soak: {result['minutes']:g} minutes of mixed good and bad requests, {total} answers, {result['num_wrong']} wrong, "
        f"{result['hung']} hung; memory grew by {slopes['gateway']} MB/h (gateway) and {slopes['triton']} MB/h (Triton).",
        "",
    ]


def _one_teacher(kept: dict[str, Any]) -> list[str]:
    cells: list[Cell] = kept["cells"]
    loads = [str(load) for load in LOADS]
    lines = [f"## {kept['teacher']}", "", f"{kept['machine']}; {kept['threads']} engine threads; median of {kept['rounds']} rounds.", ""]
    lines += ["Images/s as a share of the raw engine at batch 32 in the same round; in brackets p50 / p99 in ms and CPU-ms an image.", ""]
    lines += ["| crops a request x requests in flight | " + " | ".join(loads) + " |", "|---|" + "---|" * len(loads)]
    for system in (s for s in WHAT if s not in FILES and any(cell["system"] == s for cell in cells)):
        lines.append(f"| {WHAT[system]} | " + " | ".join(_entry(cells, system, load, ("engine", "32 x 1")) for load in loads) + " |")
    lines += ["", f"Raw engine at batch 32: {_median(cells, 'engine', '32 x 1', 'images_per_s'):.1f} images/s."]
    if any(cell["system"] == "jpeg" for cell in cells):
        lines += ["", f'{WHAT["jpeg"]}, 16 in flight, as a share of "{WHAT["decode"]}" at batch 32: ']
        lines[-1] += _entry(cells, "jpeg", "1 x 16", ("decode", "32 x 1")) + "."
    return [*lines, ""]


def _entry(cells: Sequence[Cell], system: str, load: str, control: tuple[str, str]) -> str:
    """Share of the control's rate, p50 / p99, CPU; the engine, which runs one call at a time, is the same at every concurrency."""
    if system == "engine":
        load = f"{load.split(' x ')[0]} x 1"
    ratio = np.median([_of(cells, system, load, n) / _of(cells, *control, n) for n in sorted({cell["round"] for cell in cells})])
    p50, p99, cpu = (_median(cells, system, load, key) for key in ("p50_ms", "p99_ms", "cpu_ms_per_image"))
    return f"**{ratio:.2f}** ({p50:.0f} / {p99:.0f}; {cpu:.2f})"


def _of(cells: Sequence[Cell], system: str, load: str, number: int) -> float:
    """Images a second in one round: the mean where it was measured twice."""
    return float(np.mean([c["images_per_s"] for c in cells if (c["system"], c["load"], c["round"]) == (system, load, number)]))


def _median(cells: Sequence[Cell], system: str, load: str, key: str) -> float:
    return float(np.median([c[key] for c in cells if (c["system"], c["load"]) == (system, load)]))
