"""The paper's recipes are read, with every command in their headers, and come to the paper's numbers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from distill.cli.run_file import RunFile, read_run_file

ROOT = Path(__file__).parents[3]
RECIPES = sorted((ROOT / "recipes" / "imagenet").glob("*.yaml"))
SMALL = sorted((ROOT / "recipes").glob("*.yaml"))


def recipe(name: str, *overrides: str) -> RunFile:
    return read_run_file(ROOT / "recipes" / "imagenet" / name, list(overrides))


def header_of(path: Path) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()
    return "\n".join(line for line in lines[: lines.index(next(line for line in lines if not line.startswith("#")))])


@pytest.mark.parametrize("path", [*RECIPES, *SMALL], ids=lambda path: path.name)
def test_header_says_what_it_is_and_its_commands_are_read(path: Path) -> None:
    header = header_of(path)
    for said in ("# paper  ", "# command  ", "# run time  ", "# result  "):
        assert said in header
    assert ("never run here" in header) == (path in RECIPES)
    commands = re.findall(r"distill (?:quickstart|pretrain|finetune) --config (\S+)((?: [\w.]+=\S+)*)", header)
    assert len(commands) == header.count("--config") >= (2 if path in RECIPES else 1)
    for config, overrides in commands:
        assert ROOT / config == path
        read_run_file(path, overrides.split())


@pytest.mark.parametrize("name", ["simclrv2_r152_3x_sk.yaml", "simclrv2_r50.yaml", "linear_evaluation.yaml"])
def test_pretraining(name: str) -> None:
    stage = recipe(name).pretrain
    optimizer = stage.optimizer
    assert (stage.epochs, stage.global_batch, stage.num_head_layers, stage.contrastive_temperature) == (800, 4096, 3, 0.1)
    assert (optimizer.name, optimizer.weight_decay, optimizer.warmup_share, optimizer.momentum) == ("lars", 1e-4, 0.05, 0.9)
    assert optimizer.peak_rate(stage.global_batch) == pytest.approx(6.4)
    assert optimizer.trust_coefficient == 0.001
    assert stage.memory is not None
    assert (stage.memory.size, stage.memory.momentum) == (65536, 0.999)


@pytest.mark.parametrize(("name", "peak"), [("simclrv2_r152_3x_sk.yaml", 0.064), ("simclrv2_r50.yaml", 0.16)])
def test_finetuning(name: str, peak: float) -> None:
    stage = recipe(name).finetune
    assert (stage.epochs, stage.global_batch, stage.kept_head_layers, stage.optimizer.name) == (60, 1024, 1, "lars")
    assert (stage.optimizer.weight_decay, stage.optimizer.warmup_share) == (0, 0)
    assert stage.optimizer.peak_rate(stage.global_batch) == pytest.approx(peak)


def test_linear_evaluation() -> None:
    stage = recipe("linear_evaluation.yaml").finetune
    assert (stage.linear, stage.kept_head_layers, stage.epochs, stage.global_batch) == (True, 0, 90, 4096)
    assert (stage.optimizer.name, stage.optimizer.weight_decay, stage.optimizer.momentum) == ("sgd", 1e-6, 0.9)
    assert stage.optimizer.peak_rate(stage.global_batch) == pytest.approx(1.6)


def test_distillation() -> None:
    big_to_small, to_itself = recipe("simclrv2_r152_3x_sk.yaml").train, recipe("simclrv2_r50.yaml")
    assert (big_to_small.temperature, to_itself.train.temperature) == (1.0, 0.1)
    assert big_to_small.epochs == to_itself.train.epochs == 400
    assert to_itself.train.students[0].network == to_itself.pretrain.network
