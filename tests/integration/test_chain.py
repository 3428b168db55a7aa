"""The paper's whole chain through the real command: pretrain, fine-tune, self-distil, distil; and linear evaluation of the same backbone.

Unit of data: one run at smoke size, shared by all tests: teacher -> self-distilled teacher -> students that also learn from labels, one
of which starts from the pretrained backbone.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from distill.checkpoint import file_sha256, load_checkpoint

if TYPE_CHECKING:  # the module of the fixtures, which importlib mode does not put on the path
    from tests.integration.conftest import Line

pytestmark = pytest.mark.integration

STUDENTS = ("resnet10-quarter", "resnet10-eighth")
CHAIN = (
    "self_distill.epochs=1",
    "self_distill.num_views=1",
    "self_distill.global_batch=100",
    "train.epochs=1",
    "train.alpha=0.5",
    "train.control=false",
    "train.students.0.network={name: resnet, depth: 14, width_multiplier: 0.0625, sk_ratio: 0.0625, stem: cifar}",
    "train.students.0.initial_weights=pretrained",
    "edge.int8=false",
)
STAGES = ("pretrain", "finetune", "export-teacher", "self-distill", "export-self-distilled", "train", "evaluate", "export-student")


@pytest.fixture(scope="module")
def finished(new_line: Callable[..., Line], tmp_path_factory: pytest.TempPathFactory) -> tuple[Line, str]:
    """A quickstart that ran to its end, and what it said."""
    line = new_line(tmp_path_factory.mktemp("chain") / "run", *CHAIN)
    return line, line.done("quickstart")


def record(line: Line, stage: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((line.folder / stage / "stage.json").read_text())
    return found


def result(line: Line, stage: str) -> dict[str, Any]:
    found: dict[str, Any] = record(line, stage)["result"]
    return found


def test_the_students_learn_from_the_second_teacher(finished: tuple[Line, str]) -> None:
    line, _ = finished
    first, second = (result(line, stage)["fingerprint"] for stage in ("export-teacher", "export-self-distilled"))
    assert first != second
    stores = [Path(result(line, stage)["store_folder"]) for stage in ("self-distill", "train")]
    assert [json.loads((store / "store.json").read_text())["fingerprint"] for store in stores] == [first, second]
    assert {path.parent for path in line.folder.glob("store/*/manifest.jsonl")} == set(stores)
    for student in STUDENTS:
        manifest = load_checkpoint(line.folder / "train" / "students" / student).manifest
        assert manifest["card"]["origin"]["teacher"] == second


def test_alpha_and_initial_weights_are_inputs_of_training(finished: tuple[Line, str]) -> None:
    line, _ = finished
    inputs = record(line, "train")["inputs"]
    assert "labelled" in inputs
    assert inputs[f"initial weights of {STUDENTS[0]}"] == file_sha256(line.folder / "pretrain" / "checkpoint" / "manifest.json")
    assert f"initial weights of {STUDENTS[1]}" not in inputs


def test_the_report_judges_both_teachers(finished: tuple[Line, str]) -> None:
    line, said = finished
    evaluation = result(line, "evaluate")
    page = (line.folder / "report" / "report.html").read_text()
    for title, name in (("first teacher", "first_teacher"), ("teacher, self-distilled", "teacher")):
        assert title in said
        assert title in page
        assert f"{evaluation[name]['scores']['top1']:.1%}" in page
    # What is served says what the network said when it was fine-tuned; a crop whose two best classes are near may tip over.
    assert evaluation["first_teacher"]["scores"]["top1"] == pytest.approx(result(line, "finetune")["scores"]["top1"], abs=0.005)
    assert set(evaluation["students"]) == set(STUDENTS)
    assert evaluation["controls"] == {}
    assert line.processes() == {}


def test_a_second_quickstart_reuses_everything(finished: tuple[Line, str]) -> None:
    line, _ = finished
    stages = {path: path.stat().st_mtime_ns for path in line.folder.glob("*/stage.json")}
    assert {path.parent.name for path in stages} == set(STAGES)
    assert line.done("quickstart").count("reused") == len(STAGES)
    assert {path: path.stat().st_mtime_ns for path in line.folder.glob("*/stage.json")} == stages


def test_linear_evaluation_of_the_same_backbone(finished: tuple[Line, str], tmp_path: Path) -> None:
    line = finished[0].copy(tmp_path / "run", "finetune.linear=true")
    said = line.done("finetune")
    scores = result(line, "finetune")["scores"]
    assert f"linear evaluation: top-1 {scores['top1']:.1%}, top-5 {scores['top5']:.1%}, ECE {scores['ece']:.3f}" in said
    assert scores["num_images"] == 1000
    pretrained, evaluated = (load_checkpoint(line.folder / stage / "checkpoint") for stage in ("pretrain", "finetune"))
    backbone = {name: tensor for name, tensor in pretrained.weights.items() if name.startswith("backbone.")}
    assert all(torch.equal(evaluated.weights[f"body.{name}"], tensor) for name, tensor in backbone.items())
    assert {name for name in evaluated.weights if not name.startswith("body.backbone.")} == {"body.linear.weight", "body.linear.bias"}
    assert evaluated.weights["body.linear.weight"].any()  # it starts at 0
    (_,) = (line.folder / "old").glob("finetune-*")  # the fine-tuned teacher is moved aside, not lost
