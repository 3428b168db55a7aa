"""Cells to a table: ratios within a round, then the median of the rounds.

Unit of data: one cell, an arm in a round.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Cell = dict[str, Any]

WHAT = {
    "pure": "pure training: no teacher, logits ready in memory",
    "timm-pure": "timm's train.py without a teacher",
    "live20": "ours live, teacher elsewhere (simulated), 20 ms away",
    "live50": "ours live, teacher elsewhere (simulated), 50 ms away",
    "live200": "ours live, teacher elsewhere (simulated), 200 ms away",
    "store": "ours from stored labels",
    "crops": "ours from stored labels, several crops a decode",
    "teacher": "the teacher's engine alone",
    "embedded": "ours live, teacher on the same machine, embedded",
    "triton": "ours live, teacher on the same machine, Triton over gRPC",
    "students": "ours live, several students on one stream, embedded",
    "timm": "timm's train.py, teacher inline",
    "torchdistill": "torchdistill, teacher inline",
    "inline": "inline as timm and torchdistill do it, written by us",
}
PROMISES = {"live20": 0.95, "live50": 0.95, "live200": 0.95, "store": 0.98, "crops": 1.1}
"""Of the control's rate."""
SAME_STEPS = ("live20", "live50", "live200", "store", "embedded", "triton", "students")
"""Arms that take the same steps as `pure`, but for the rounding of the labels that are kept."""
INLINE = ("timm", "torchdistill", "inline")
INLINE_PROMISE = 1.2
STUDENTS_PROMISE = 0.85


def write_table(results: Path) -> Path:
    """Write `TABLE.md`; returns its path."""
    lines = ["# What distilling costs", "", "Made by `python -m bench.distill table`; do not edit.", ""]
    for path in sorted(results.glob("*.json")):
        kept = json.loads(path.read_text())
        if path.stem.startswith("profile-"):
            lines += _profile(kept)
        elif path.stem.startswith("workers-"):
            lines += _workers(kept)
        elif path.stem.startswith("decoding-"):
            lines += _decoding(kept)
        else:
            lines += _case(kept)
    target = results / "TABLE.md"
    target.write_text("\n".join(lines) + "\n")
    return target


def _head(kept: dict[str, Any], what: str) -> list[str]:
    case = kept["case"]
    size = f"{case['image_size']} pixels" + (f", files enlarged to {case['shorter_side']}" if case["shorter_side"] else "")
    return [
        f"## {case['name']}: {what}",
        "",
        f"{case['teacher']} teaches {case['student']}, {size}, {case['num_classes']} classes, batch {case['batch']}, {_computed(kept)};"
        f" {kept['threads']} threads; {kept['machine']}; torch {kept['torch']}.",
        "",
    ]


def _computed(kept: dict[str, Any]) -> str:
    if "gpu" not in kept:
        return "fp32"
    if "ceilings" not in kept:
        return f"student in bf16 and teacher in fp16 on one {kept['gpu']}"
    copy, matmul = kept["ceilings"]["copy_bytes_per_s"] / 1e12, kept["ceilings"]["matmul_flops"] / 1e12
    return f"student in bf16 and teacher in fp16 on one {kept['gpu']} (it copies {copy:.2f} TB/s and multiplies {matmul:.0f} TFLOP/s)"


def _case(kept: dict[str, Any]) -> list[str]:
    cells = [cell for cell in kept["cells"] if "error" not in cell]
    failed = {cell["arm"]: cell["error"] for cell in kept["cells"] if "error" in cell}
    lines = [*_head(kept, "side by side"), "Medians over the rounds, least and greatest in brackets; ratios within a round.", ""]
    lines += ["| arm | rounds | images/s | of pure training | CPU-ms an image | loss |", "|---|---|---|---|---|---|"]
    lines += [_row(cells, arm) for arm in WHAT if any(cell["arm"] == arm for cell in cells)]
    lines += ["", *_against_inline(cells), *_students(cells, kept["case"]), *_stand_in(cells)]
    lines += [f"{WHAT[arm]}: did not run. {error}" for arm, error in failed.items()]
    return [*lines, ""]


def _row(cells: Sequence[Cell], arm: str) -> str:
    ratio = ""
    if arm not in ("pure", "teacher"):
        ratio = _spread(_ratios(cells, lambda r: _rate(cells, arm, r), lambda r: _rate(cells, "pure", r)))
        promise = PROMISES.get(arm)
        ratio += f", promise {promise:g}" if promise else ""
    own = [cell for cell in cells if cell["arm"] == arm]
    rates, cpu = [cell["images_per_s"] for cell in own], float(np.median([cell["cpu_ms_per_image"] for cell in own]))
    rounds = len({cell["round"] for cell in own})
    return f"| {WHAT[arm]} | {rounds} | {_spread(rates, '.1f')} | {ratio} | {cpu:.2f} | {_losses(cells, arm)} |"


def _losses(cells: Sequence[Cell], arm: str) -> str:
    """Of the last round: first and last loss; for arms that take the steps of `pure`, how far the first that both tell of are apart.

    Later ones drift: training is chaotic, and kept labels are rounded.
    """
    if arm == "teacher":
        return ""
    losses = dict(map(tuple, [cell for cell in cells if cell["arm"] == arm][-1]["losses"]))
    said = f"{losses[min(losses)]:.3f} to {losses[max(losses)]:.3f}"
    pure = dict(map(tuple, [cell for cell in cells if cell["arm"] == "pure"][-1]["losses"])) if arm in SAME_STEPS else {}
    both = losses.keys() & pure.keys()
    return f"{said}; {abs(losses[min(both)] - pure[min(both)]):.4f} from pure at step {min(both)}" if both else said


def _against_inline(cells: Sequence[Cell]) -> list[str]:
    lines = []
    for peer in INLINE:
        for ours in ("embedded", "triton"):
            ratios = _ratios(cells, lambda r, arm=ours: _rate(cells, arm, r), lambda r, arm=peer: _rate(cells, arm, r))  # type: ignore[misc]
            if ratios:
                lines.append(f"{WHAT[ours]} / {WHAT[peer]}: {_spread(ratios)}, promise {INLINE_PROMISE:g}.")
    return [*lines, ""] if lines else []


def _students(cells: Sequence[Cell], case: dict[str, Any]) -> list[str]:
    """t_T and t_S are seconds an image, of the teacher's engine alone and of pure training; a step of N students takes t_N an image."""
    number = case["num_students"]

    def ideal(r: int) -> float | None:
        teacher, student = _rate(cells, "teacher", r), _rate(cells, "pure", r)
        return None if teacher is None or student is None else 1 / (1 / teacher + number / student)

    shares = _ratios(cells, lambda r: _rate(cells, "students", r), ideal)
    if not shares:
        return []

    def speedup_of(r: int) -> float | None:
        rate = _rate(cells, "students", r)
        return None if rate is None else number * rate

    speedups = _ratios(cells, speedup_of, lambda r: _rate(cells, "embedded", r))
    line = f"{number} students on one stream / ideal N (t_T + t_S) / (t_T + N t_S): {_spread(shares)}, promise {STUDENTS_PROMISE:g}"
    line += f"; against {number} runs of one student, as measured: {_spread(speedups)} times as fast" if speedups else ""
    return [f"{line}.", ""]


def _stand_in(cells: Sequence[Cell]) -> list[str]:
    cpu = [cell["stand_in_cpu_ms_per_image"] for cell in cells if cell["arm"].startswith("live")]
    return [f"The simulated teacher itself took {np.median(cpu):.2f} CPU-ms an image of this machine.", ""] if cpu else []


def _profile(kept: dict[str, Any]) -> list[str]:
    lines = _head(kept, "where the time goes")
    arms: dict[str, Any] = kept["arms"]
    for part, what in (
        ("loop", "The training loop's thread, shares of its time"),
        ("beside", "Other threads, seconds a second of the loop"),
    ):
        phases = list(dict.fromkeys(phase for found in arms.values() for phase in found[part]))
        lines += [f"| {what} | " + " | ".join(arms) + " |", "|---|" + "---|" * len(arms)]
        lines += [f"| {phase} | " + " | ".join(f"{found[part].get(phase, 0):.1%}" for found in arms.values()) + " |" for phase in phases]
        lines.append("")
    return lines


def _workers(kept: dict[str, Any]) -> list[str]:
    cells, numbers = kept["cells"], sorted({cell["workers"] for cell in kept["cells"]})
    lines = [*_head(kept, "from stored labels, several workers"), "Each has its share of the threads, at least one: more workers than"]
    lines[-1] += " cores share them."
    lines += ["", "| workers | images/s | of one worker |", "|---|---|---|"]
    for number in numbers:
        rates = [cell["images_per_s"] for cell in cells if cell["workers"] == number]
        one = {cell["round"]: cell["images_per_s"] for cell in cells if cell["workers"] == numbers[0]}
        ratios = [cell["images_per_s"] / one[cell["round"]] for cell in cells if cell["workers"] == number]
        lines.append(f"| {number} | {_spread(rates, '.1f')} | {_spread(ratios)} |")
    return [*lines, ""]


def _decoding(kept: dict[str, Any]) -> list[str]:
    lines = [*_head(kept, "the stream alone, several crops a decode"), "Read, decoded and cropped; no labels, no student.", ""]
    lines += ["| crops a decode | crops/s | of one a decode | CPU-ms a crop |", "|---|---|---|---|"]
    cells = kept["cells"]
    one = {cell["round"]: cell["crops_per_s"] for cell in cells if cell["crops_per_decode"] == 1}
    for number in sorted({cell["crops_per_decode"] for cell in cells}):
        own = [cell for cell in cells if cell["crops_per_decode"] == number]
        ratios = [cell["crops_per_s"] / one[cell["round"]] for cell in own]
        rates, cpu = [cell["crops_per_s"] for cell in own], float(np.median([cell["cpu_ms_per_crop"] for cell in own]))
        lines.append(f"| {number} | {_spread(rates, '.0f')} | {_spread(ratios)} | {cpu:.2f} |")
    return [*lines, ""]


def _rate(cells: Sequence[Cell], arm: str, number: int) -> float | None:
    """Images a second in one round: the mean where it was measured twice; None where it was not."""
    rates = [cell["images_per_s"] for cell in cells if (cell["arm"], cell["round"]) == (arm, number)]
    return float(np.mean(rates)) if rates else None


def _ratios(cells: Sequence[Cell], above: Callable[[int], float | None], below: Callable[[int], float | None]) -> list[float]:
    """One for each round that has both."""
    pairs = [(above(number), below(number)) for number in sorted({cell["round"] for cell in cells})]
    return [a / b for a, b in pairs if a is not None and b is not None]


def _spread(values: Sequence[float], form: str = ".2f") -> str:
    if not values:
        return ""
    return f"**{np.median(values):{form}}** ({min(values):{form}} to {max(values):{form}})"
