"""From a grid to students, and from what they reached to a ranking."""

from __future__ import annotations

from typing import Any

import pytest

from distill.cli.sweep_table import MOST_ROWS, sweep_table
from distill.errors import ConfigError
from student_trainer.settings import SweepSettings, TrainSettings
from student_trainer.sweep import expanded, ranking


def training(*names: str) -> TrainSettings:
    students = [{"name": n, "network": {"depth": 10}, "optimizer": {"learning_rate": 0.5, "momentum": 0.8}} for n in names]
    return TrainSettings.model_validate({"students": students, "epochs": 7, "global_batch": 32})


class TestGrid:
    def test_every_student_with_every_combination(self) -> None:
        grid = {"optimizer.learning_rate": [0.1, 1e-05], "network.width_multiplier": [0.25, 0.5, 1], "ema_decay": [None]}
        made, chosen = expanded(training("a", "b"), SweepSettings(grid=grid))
        assert [s.name for s in made.students] == [f"{base}.{number}" for base in "ab" for number in range(1, 7)]
        assert list(chosen) == [s.name for s in made.students]
        for student in made.students:
            point = chosen[student.name]
            assert student.optimizer.learning_rate == point["optimizer.learning_rate"]
            assert student.network.width_multiplier == point["network.width_multiplier"]
            assert (student.optimizer.momentum, student.network.depth) == (0.8, 10)
        assert len({tuple(point.values()) for point in chosen.values()}) == 6
        assert (made.control, made.epochs, made.global_batch) == (False, 7, 32)
        assert made.halving is not None

    def test_its_own_epochs(self) -> None:
        made, _ = expanded(training("a"), SweepSettings(grid={"ema_decay": [0.9, 0.99]}, epochs=3, halving={"eta": 2}))
        assert (made.epochs, made.halving and made.halving.eta) == (3, 2)

    def test_names_stay_in_their_length(self) -> None:
        made, _ = expanded(training("n" * 64), SweepSettings(grid={"ema_decay": [0.9, 0.99]}))
        assert [len(s.name) for s in made.students] == [62, 62]

    @pytest.mark.parametrize(
        ("grid", "said"),
        [
            ({"optimizer.learning_rat": [1]}, "sweep.grid on student a: optimizer.learning_rat: unknown key; did you mean 'learning_rate'"),
            ({"name": ["b", "c"]}, "sweep.grid has values for `name`, but the sweep itself names"),
            ({"ema_decay": [0.5, 1.5]}, "sweep.grid on student a: ema_decay: Input should be less than 1"),
            ({"network.name": ["nothing"]}, "sweep.grid on student a: network: name is 'resnet'"),
            (
                {"ema_decay": [i / 100 for i in range(1, 60)], "num_head_layers": [0, 1]},
                "118 of each of 1 students, over .*max_students 64",
            ),
        ],
    )
    def test_what_is_impossible_is_refused(self, grid: dict[str, list[Any]], said: str) -> None:
        with pytest.raises(ConfigError, match=said):
            expanded(training("a"), SweepSettings(grid=grid))


RESULT = {
    "stopped": {
        "c": {"why": "halving", "step": 10, "detail": ""},
        "a": {"why": "halving", "step": 30, "detail": ""},
        "d": {"why": "diverged", "step": 3, "detail": ""},
    },
    "selection": {
        "rungs": [
            {"step": 10, "scores": {"a": 0.3, "b": 0.2, "c": 0.1}, "kept": ["a", "b"]},
            {"step": 30, "scores": {"a": 0.4, "b": 0.5}, "kept": ["b"]},
        ],
        "final": {"b": 0.6},
    },
    "num_parameters": {"a": 1000, "b": 2000, "c": 3000, "d": 4000},
    "epochs": [{"top1": {"a": 0.5, "b": 0.4}}, {"top1": {"a": 0.55, "b": 0.7}}],
}


def test_ranking() -> None:
    chosen = {name: {"ema_decay": number} for number, name in enumerate("dcab")}
    rows = ranking(chosen, RESULT, {"a": {"latency_ms": 1.5, "size_bytes": 4000}})
    assert [(row["student"], row["rung"], row["score"], row["ended"]) for row in rows] == [
        ("b", 2, 0.6, None),
        ("a", 1, 0.4, "halving at step 30"),
        ("c", 0, 0.1, "halving at step 10"),
        ("d", 0, None, "diverged at step 3"),
    ]
    assert [(row["top1"], row["latency_ms"], row["size_bytes"]) for row in rows[:2]] == [(0.7, None, None), (None, 1.5, 4000)]
    assert (rows[0]["settings"], rows[0]["num_parameters"]) == ({"ema_decay": 3}, 2000)


def test_the_table_says_what_it_leaves_out() -> None:
    row = {"student": "a.1", "settings": {"ema_decay": 0.9}, "rung": 1, "score": None, "ended": None, "num_parameters": 12345}
    row |= {"top1": None, "latency_ms": 0.25, "size_bytes": 50_000}
    assert sweep_table([row]).caption is None
    table = sweep_table([row] * (MOST_ROWS + 3))
    assert (table.row_count, table.caption) == (MOST_ROWS, "and 3 more, in sweep/stage.json")
