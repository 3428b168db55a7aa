"""A sweep: every student of the run with every point of a grid of settings, trained on one label stream with successive halving.

    train.students x sweep.grid -> students -> training (`student_trainer.halving`) -> one row for each, the best first

Unit of data: one row. Nothing is asked for twice: all share each batch, and later sweeps and trainings read the same store.
"""

from __future__ import annotations

import itertools
import json
from typing import Any

from distill.config import validate, with_overrides
from distill.errors import ConfigError
from student_trainer.settings import StudentSettings, SweepSettings, TrainSettings


def expanded(train: TrainSettings, sweep: SweepSettings) -> tuple[TrainSettings, dict[str, dict[str, Any]]]:
    """The training of all students of a sweep, and what each of them has of the grid (student -> field -> value).

    Raises:
        ConfigError: the grid names `name` or a field that students do not have, gives a value out of range, or asks for more than
            `max_students`.
    """
    if "name" in sweep.grid:
        raise ConfigError("sweep.grid has values for `name`, but the sweep itself names what it makes (NAME.1, NAME.2, ...): take it out")
    points = [dict(zip(sweep.grid, values, strict=True)) for values in itertools.product(*sweep.grid.values())]
    if len(points) * len(train.students) > sweep.max_students:
        raise ConfigError(
            f"sweep.grid makes {len(points)} of each of {len(train.students)} students, over sweep.max_students {sweep.max_students};"
            " they are all in memory at once: take values out of the grid, or raise the limit"
        )
    students, chosen = [], {}
    for base in train.students:
        for number, point in enumerate(points, start=1):
            student = _changed(base, f"{base.name[:60]}.{number:0{len(str(len(points)))}d}", point)
            students.append(student)
            chosen[student.name] = point
    changes: dict[str, Any] = {"students": students, "control": False, "halving": sweep.halving}
    return train.replace(**changes, epochs=sweep.epochs or train.epochs), chosen


def _changed(base: StudentSettings, name: str, point: dict[str, Any]) -> StudentSettings:
    tree = base.model_dump(mode="json", exclude_unset=True)
    words = [f"{field}={json.dumps(value)}" for field, value in point.items()]
    return validate(StudentSettings, {**with_overrides(tree, words), "name": name}, origin=f"sweep.grid on student {base.name}")


def ranking(chosen: dict[str, dict[str, Any]], result: dict[str, Any], costs: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each student, the best first: plain data.

    Args:
        chosen: see `expanded`.
        result: of `train_students`.
        costs: student -> `latency_ms` and `size_bytes` of its file, as far as they are known.

    Returns:
        `student`, `settings` (of the grid), `rung` (how many it passed), `score` (its last on held-out crops; None without one), `ended`
        (why before the others, or None), `num_parameters`, `top1` (on the test images; None for one that ended before the others),
        `latency_ms` and `size_bytes` (None where they are not known).
    """
    rungs: list[dict[str, Any]] = result["selection"]["rungs"]
    final: dict[str, float | None] = result["selection"]["final"]
    top1: dict[str, float] = result["epochs"][-1]["top1"] if result["epochs"] else {}
    rows = []
    for name, settings in chosen.items():
        scores = [scores[name] for scores in (*(rung["scores"] for rung in rungs), final) if name in scores]
        stopped = result["stopped"].get(name)
        rows.append(
            {
                "student": name,
                "settings": settings,
                "rung": sum(name in rung["kept"] for rung in rungs),
                "score": scores[-1] if scores else None,
                "ended": f"{stopped['why']} at step {stopped['step']}" if stopped else None,
                "num_parameters": result["num_parameters"][name],
                "top1": None if stopped else top1.get(name),
                "latency_ms": costs.get(name, {}).get("latency_ms"),
                "size_bytes": costs.get(name, {}).get("size_bytes"),
            }
        )
    return sorted(rows, key=lambda row: (-row["rung"], row["ended"] is not None, row["score"] is None, -(row["score"] or 0.0)))
