"""Rows are means over intervals of at most a 500th of the run, and a restart neither loses nor doubles a step."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from teacher_trainer.contrastive import ContrastiveOutcome
from teacher_trainer.curve import MAX_ROWS, Curve, CurveRow


def outcome(step: int) -> ContrastiveOutcome:
    return ContrastiveOutcome(*(torch.tensor(float(step) * scale) for scale in (1.0, 0.01, -2.0)))


def rows_of(num_steps: int, restart_at: int = -1, skipped: frozenset[int] = frozenset()) -> list[CurveRow]:
    curve = Curve(num_steps, torch.device("cpu"))
    for done in range(1, num_steps + 1):
        if done not in skipped:
            curve.add(outcome(done))
        if curve.is_due(done):
            curve.end_row(done, done // 100, 1 / done, curve.sums)
        if done == restart_at:
            saved, rows = copy.deepcopy(curve.state_dict(curve.sums)), copy.deepcopy(curve.rows)
            curve = Curve(num_steps, torch.device("cpu"))
            curve.load_state_dict(saved, rows, rank=0)
    return curve.rows


@pytest.mark.parametrize(("num_steps", "interval"), [(1, 1), (7, 1), (500, 1), (501, 2), (1307, 3)])
def test_means_of_intervals(num_steps: int, interval: int) -> None:
    rows = rows_of(num_steps)
    assert len(rows) <= MAX_ROWS
    steps = np.arange(1, num_steps + 1)
    for row, part in zip(rows, np.split(steps, range(interval, num_steps, interval)), strict=True):
        assert (row["step"], row["learning_rate"]) == (part[-1], 1 / part[-1])
        assert row["loss"] == pytest.approx(part.mean())
        assert row["accuracy"] == pytest.approx(0.01 * part.mean())
        assert row["entropy"] == pytest.approx(-2 * part.mean())


@pytest.mark.parametrize("restart_at", [1, 3, 4, 1306, 1307])
def test_a_restart_changes_nothing(restart_at: int) -> None:
    assert rows_of(1307, restart_at) == rows_of(1307)


def test_steps_that_were_passed_over_do_not_count() -> None:
    rows = rows_of(1307, skipped=frozenset({2, 4, 5, 6}))
    assert (rows[0]["step"], rows[0]["loss"]) == (3, 2.0)
    assert (rows[1]["step"], rows[1]["loss"]) == (9, 8.0)


def test_another_worker_starts_from_nothing() -> None:
    """Worker 0 takes over what all had added up, so the others must not bring it in again."""
    curve = Curve(1307, torch.device("cpu"))
    curve.add(outcome(5))
    state = copy.deepcopy(curve.state_dict(curve.sums))
    sums = []
    for rank in range(3):
        own = Curve(1307, torch.device("cpu"))
        own.load_state_dict(state, [], rank)
        sums.append(own.sums)
    assert torch.equal(sum(sums, torch.zeros(3)), curve.sums)
