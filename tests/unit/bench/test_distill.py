"""The pure parts of bench/distill: what becomes of cells, of samples, and of what the teacher said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.distill.answers import key_of, load_answers, save_answers
from bench.distill.profile import sort_samples
from bench.distill.table import write_table

CASE = {
    "name": "small",
    "teacher": "big",
    "student": "little",
    "image_size": 32,
    "num_classes": 10,
    "batch": 8,
    "shorter_side": None,
    "num_students": 4,
}


def _cell(arm: str, number: int, rate: float, losses: list[tuple[int, float]] | None = None) -> dict[str, Any]:
    return {
        "arm": arm,
        "round": number,
        "turn": 0,
        "images_per_s": rate,
        "cpu_ms_per_image": 2.0,
        "stand_in_cpu_ms_per_image": 0.25,
        "losses": losses or [(1, 3.0), (5, 2.0)],
    }


def _table(folder: Path, cells: list[dict[str, Any]]) -> str:
    kept = {"case": CASE, "threads": 2, "machine": "a machine", "torch": "2", "cells": cells}
    (folder / "small.json").write_text(json.dumps(kept))
    return write_table(folder).read_text()


def _line(text: str, beginning: str) -> str:
    (line,) = [line for line in text.splitlines() if line.startswith(beginning)]
    return line


def test_a_ratio_is_taken_within_its_round_against_the_mean_of_both_controls(tmp_path: Path) -> None:
    # The second round runs at half the speed of the first: no ratio may see that.
    cells = [_cell("pure", 0, 90), _cell("pure", 0, 110), _cell("store", 0, 99), _cell("pure", 1, 50), _cell("store", 1, 48)]
    line = _line(_table(tmp_path, cells), "| ours from stored labels |")
    assert "**0.97** (0.96 to 0.99), promise 0.98" in line
    assert "**73.5** (48.0 to 99.0)" in line


def test_losses_are_compared_at_the_same_steps_only(tmp_path: Path) -> None:
    cells = [_cell("pure", 0, 100, [(1, 3.0), (2, 2.5), (3, 2.0)]), _cell("live50", 0, 98, [(2, 2.51), (9, 1.0)])]
    assert "2.510 to 1.000; 0.0100 from pure at step 2" in _table(tmp_path, cells)


def test_several_students_are_held_against_the_ideal_and_against_as_many_runs(tmp_path: Path) -> None:
    # t_T = 10 ms, t_S = 5 ms, 4 students: ideal 1 / 30 ms; measured 1 / 40 ms. One student alone measured 1 / 16 ms.
    cells = [_cell("teacher", 0, 100), _cell("pure", 0, 200), _cell("students", 0, 25), _cell("embedded", 0, 62.5)]
    line = _line(_table(tmp_path, cells), "4 students on one stream")
    assert "**0.75**" in line
    assert "**1.60**" in line


def test_a_peer_that_did_not_run_is_named_with_its_reason(tmp_path: Path) -> None:
    failed = {"arm": "timm", "round": 0, "turn": 9, "error": "no module named timm"}
    text = _table(tmp_path, [_cell("pure", 0, 100), _cell("embedded", 0, 60), _cell("torchdistill", 0, 48), failed])
    assert "timm's train.py, teacher inline: did not run. no module named timm" in text
    assert "/ torchdistill, teacher inline: **1.25**" in text


def test_several_crops_a_decode_are_held_against_one_of_the_same_round(tmp_path: Path) -> None:
    rates = {(0, 1): 100, (0, 4): 150, (1, 1): 40, (1, 4): 64}
    cells = [{"round": r, "crops_per_decode": m, "crops_per_s": rate, "cpu_ms_per_crop": 2.0} for (r, m), rate in rates.items()]
    kept = {"case": CASE, "threads": 2, "machine": "a machine", "torch": "2", "cells": cells}
    (tmp_path / "decoding-small.json").write_text(json.dumps(kept))
    assert "| 4 | **107** (64 to 150) | **1.55** (1.50 to 1.60) | 2.00 |" in write_table(tmp_path).read_text()


def test_samples_are_sorted_by_their_innermost_known_frame() -> None:
    loop = "thread (1): MainThread;train_worker (/r/student_trainer/worker.py:40)"
    lines = [
        f"{loop};step (/r/student_trainer/students.py:5);Classifier.forward (/r/distill/models/classifier.py:9);relu (/t/F.py:1) 60",
        f"{loop};step (/r/student_trainer/students.py:6);take_step (/r/distill/optimizers.py:9);Tensor.backward (/t/torch/_tensor.py:2) 30",
        f"{loop};LabelledStream.epoch (/r/student_trainer/stream.py:70);Queue.get (/p/queue.py:171) 10",
        f"{loop};open_lessons (/r/student_trainer/lessons.py:7) 500",
        "thread (2): crop_0;_worker (/p/concurrent/futures/thread.py:3);decode_image (/r/distill/decoding.py:4) 25",
        "thread (2): crop_0;_worker (/p/concurrent/futures/thread.py:3) 75",
        "thread (3): feeder;LabelledStream._feed (/r/student_trainer/stream.py:9);Condition.wait (/p/threading.py:327) 100",
    ]
    found = sort_samples(lines)
    assert found["samples"] == 100
    assert found["loop"] == {"forward": 0.6, "backward": 0.3, "waits for a batch": 0.1}
    assert found["beside"] == {"decode": 0.25}


@pytest.mark.parametrize("size", [8, 32, 224])
def test_answers_are_found_again_by_the_pixels_of_the_crop(tmp_path: Path, size: int) -> None:
    generator = np.random.default_rng(size)
    crops_SBHWC = generator.integers(0, 256, (2, 3, size, size, 3), dtype=np.uint8)
    keys = np.array([[np.frombuffer(key_of(crop), np.uint8) for crop in batch] for batch in crops_SBHWC])
    logits_SBK = generator.normal(size=(2, 3, 5)).astype(np.float32)
    save_answers(tmp_path / "answers.npz", {1: (keys, logits_SBK), 4: (keys[:1], logits_SBK[:1])})
    answers = load_answers(tmp_path / "answers.npz")
    np.testing.assert_array_equal(answers.logits_SBK, logits_SBK)
    np.testing.assert_array_equal(answers.by_crop[key_of(crops_SBHWC[1, 2])], logits_SBK[1, 2])
