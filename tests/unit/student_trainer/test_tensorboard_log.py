"""TensorBoard's own reader finds what was written, each step once, however often the run was cut off."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from student_trainer.tensorboard_log import TensorBoardLog


def step_row(step: int, loss: float, **more: Any) -> dict[str, Any]:
    return {
        "kind": "step", "time": 1000.0 + step, "step": step, "images_per_s": 500.0, "losses": {"small": loss, "big": None},
        "agreement": {"small": 0.75}, "learning_rate": {"small": 0.1, "big": 0.2},
        "waits_recent": {"student": 3.0, "decode": 0.0, "teacher": 1.0, "store": 0.0},
        "totals": {"asked": 30.0, "from_store": 10.0}, **more,
    }  # fmt: skip


def epoch_row(step: int, top1: float) -> dict[str, Any]:
    return {"kind": "epoch", "time": 1000.0 + step, "step": step, "epoch": 1, "top1": {"small": top1}}


def write(folder: Path, rows: Iterable[dict[str, Any]]) -> None:
    log = TensorBoardLog(folder)
    for row in rows:
        log.show(row)
    log.close(failed=False)


def read(folder: Path, tag: str) -> list[tuple[int, float]]:
    found = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    found.Reload()
    return [(event.step, pytest.approx(event.value)) for event in found.Scalars(tag)]


def test_every_scalar_is_under_its_tag(tmp_path: Path) -> None:
    write(tmp_path, [step_row(10, 2.0), epoch_row(10, 0.5), {"kind": "checkpoint", "time": 0.0, "step": 10}, step_row(20, 1.5)])
    found = EventAccumulator(str(tmp_path))
    found.Reload()
    assert set(found.Tags()["scalars"]) == {
        "loss/small", "agreement/small", "lr/small", "lr/big", "rate/images_per_s", "labels/hit_rate",
        "waits/student", "waits/decode", "waits/teacher", "waits/store", "top1/small",
    }  # fmt: skip
    assert read(tmp_path, "loss/small") == [(10, 2.0), (20, 1.5)]
    assert read(tmp_path, "waits/teacher") == [(10, 0.25), (20, 0.25)]
    assert read(tmp_path, "labels/hit_rate")[-1] == (20, 0.25)
    assert read(tmp_path, "top1/small") == [(10, 0.5)]
    assert found.Scalars("loss/small")[0].wall_time == 1010.0


def test_a_run_that_was_cut_off_and_resumed_shows_no_step_twice(tmp_path: Path) -> None:
    """Steps 30 and 40 came after the last checkpoint (at 25); the resumed process says 28 and 38 in their place."""
    write(tmp_path, [step_row(10, 2.0), step_row(20, 1.8), epoch_row(20, 0.3), step_row(30, 9.0), step_row(40, 9.0), epoch_row(40, 0.9)])
    write(tmp_path, [step_row(28, 1.6), step_row(38, 1.4), epoch_row(40, 0.4), step_row(48, 1.2)])
    assert read(tmp_path, "loss/small") == [(10, 2.0), (20, 1.8), (28, 1.6), (38, 1.4), (48, 1.2)]
    assert read(tmp_path, "top1/small") == [(20, 0.3), (40, 0.4)]
    assert len(list(tmp_path.iterdir())) == 2


def test_so_does_one_whose_workers_died_under_a_driver_that_lives(tmp_path: Path) -> None:
    rows = [step_row(10, 2.0), step_row(20, 9.0), epoch_row(20, 0.9), step_row(12, 1.9), epoch_row(20, 0.3), step_row(22, 1.7)]
    write(tmp_path, rows)
    assert read(tmp_path, "loss/small") == [(10, 2.0), (12, 1.9), (22, 1.7)]
    assert read(tmp_path, "top1/small") == [(20, 0.3)]
    assert len(list(tmp_path.iterdir())) == 1


def test_an_evaluation_at_the_step_of_the_last_row_is_no_restart(tmp_path: Path) -> None:
    write(tmp_path, [step_row(20, 2.0), epoch_row(20, 0.5), step_row(21, 1.0)])
    assert read(tmp_path, "loss/small") == [(20, 2.0), (21, 1.0)]
    assert read(tmp_path, "top1/small") == [(20, 0.5)]


def test_a_run_that_says_nothing_leaves_no_folder(tmp_path: Path) -> None:
    write(tmp_path / "tensorboard", [{"kind": "silence", "seconds": 3.0, "time": 0.0}])
    assert not (tmp_path / "tensorboard").exists()
