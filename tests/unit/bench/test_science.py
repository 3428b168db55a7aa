"""The science table: its recipes train what it trains, its stages are made once, its differences are paired by seed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.science.__main__ import _stages
from bench.science.arms import ARMS, SETTINGS, STUDENT, Arms, self_training, small_training
from bench.science.datasets import write_shards
from bench.science.table import write_table
from distill.cli.run_file import read_run_file
from distill.config import Section, digest_of
from teacher_trainer.settings import FinetuneSettings

ROOT = Path(__file__).parents[3]


def same(ours: Section, theirs: Section, but: set[str]) -> bool:
    return ours.model_dump(exclude=but) == theirs.model_dump(exclude=but)


@pytest.mark.parametrize("name", ["fashion", "cifar10"])
@pytest.mark.parametrize("fraction", [0.01, 0.1])
def test_a_recipe_trains_what_the_table_trains(name: str, fraction: float) -> None:
    """But for the number format, left to the machine, how often the test images are looked at, and the control."""
    path, setting = ROOT / "recipes" / f"{name}.yaml", SETTINGS[name]
    overrides = re.findall(r"^# 10 %.*--config \S+ (.*)$", path.read_text(), re.MULTILINE)[0].split() if fraction == 0.1 else []
    run = read_run_file(path, overrides)
    assert (run.data.label_fraction, run.data.image_size, run.data.crop_ratio) == (fraction, 32, 1.0)
    assert same(run.pretrain, setting.pretrain, {"precision"})
    assert same(run.finetune, setting.finetune[fraction], {"precision"})
    differ = {"precision", "students", "control", "num_evaluations"}
    temperature = 0.1 if (name, fraction) == ("fashion", 0.01) else 1.0
    trained = small_training(setting, temperature=temperature)
    assert same(run.train, trained, differ)
    assert same(run.train.students[0], trained.students[0], {"name"})
    again = self_training(setting, temperature)
    assert run.self_distill is not None
    own = {name: value for name, value in run.self_distill.model_dump().items() if name in type(again).model_fields}
    wanted = again.model_dump()
    assert {name for name, value in own.items() if value != wanted[name]} <= differ
    assert run.self_distill.optimizer == again.students[0].optimizer


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """256 images of noise and of two classes to train on, 20 to test on."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "class_names.txt").write_text("a\nb\n")
    pixels = np.random.default_rng(0).integers(0, 255, (256, 32, 32, 3), dtype=np.uint8)
    for part, size in (("train", 256), ("test", 20)):
        write_shards(tmp_path / "images", part, pixels, np.arange(256) % 2, list(range(size)))
    return tmp_path / "images"


def test_a_stage_is_made_once_and_again_for_other_settings(images: Path, tmp_path: Path) -> None:
    def scores(epochs: int, fraction: float, seed: int) -> dict[str, Any]:
        settings = FinetuneSettings(num_head_layers=0, epochs=epochs, global_batch=4, precision="fp32")
        return _stages(images, tmp_path / "cache", "test", seed, 1).classify(STUDENT, settings, fraction, None).result["scores"]

    first = scores(1, 0.03125, 0)
    assert first["num_images"] == 20
    (made,) = (tmp_path / "cache").iterdir()
    written = (made / "stage.json").stat().st_mtime_ns
    assert scores(1, 0.03125, 0) == first
    for other in [(2, 0.03125, 0), (1, 0.0625, 0), (1, 0.03125, 1)]:
        scores(*other)
    assert len(list((tmp_path / "cache").iterdir())) == 4
    assert (made / "stage.json").stat().st_mtime_ns == written


def test_an_arm_of_distillation_goes_through_every_stage(images: Path, tmp_path: Path) -> None:
    """Pretrained, fine-tuned, self-distilled, distilled: one step each."""
    few = SETTINGS["fashion"]
    short: Callable[[Any], Any] = lambda settings: settings.replace(epochs=1, global_batch=64)  # noqa: E731
    setting = type(few)(
        **vars(few)
        | {"num_images": 256, "pretrain": short(few.pretrain), "finetune": {0.5: short(few.finetune[0.01])}}
        | {"distill_epochs": 1, "self_distill_epochs": 1}
    )
    arms = Arms(setting, _stages(images, tmp_path / "cache", "test", 0, 1), 0.5)
    for arm in ("teacher, + self-distilled", "student, distilled on labelled images only", "student, distilled + labels (alpha 0.5)"):
        assert 0 <= ARMS[arm](arms)["top1"] <= 1
    stages = sorted(path.name.split("-")[0] for path in (tmp_path / "cache").iterdir())
    assert stages == ["classify", "distill", "distill", "distill", "pretrain", "serve", "serve"]


def test_differences_are_paired_by_seed(tmp_path: Path) -> None:
    """The spread of the two arms is 10 points, that of their difference is none; a seed without its partner does not count, nor does a
    cell of other settings."""
    tops = {"teacher, pretrained + fine-tuned": [0.5, 0.6, 0.7], "teacher, supervised only": [0.4, 0.5]}
    cells = [
        {"arm": arm, "fraction": 0.01, "seed": seed, "top1": top, "ece": top / 10, "num_parameters": 1000, "machine": "a machine"}
        for arm, values in tops.items()
        for seed, top in enumerate(values)
    ]
    setting = {"epochs": 1}
    cells = [{**cell, "setting": digest_of(setting)} for cell in cells]
    cells.append({**cells[0], "seed": 7, "top1": 0.1, "setting": digest_of({"epochs": 2})})
    (tmp_path / "small.json").write_text(json.dumps({"dataset": "small", "setting": setting, "cells": cells}))
    text = write_table(tmp_path, list(ARMS))[0].read_text()
    assert "| teacher, pretrained + fine-tuned | 1,000 | 60.0 ± 10.0 (3); ECE 0.06 |" in text
    assert "| teacher, supervised only | 1,000 | 45.0 ± 7.1 (2); ECE 0.04 |" in text
    assert "| pretraining helps the teacher | +10.0 ± 0.0 |" in text
    assert "5 cells: a machine. 1 cells of other settings are left out." in text
    assert (tmp_path / "science.png").stat().st_size > 1000
