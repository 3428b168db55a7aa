"""The report: a page that a browser can read, with the run's numbers in it, and nothing of an image's name taken for HTML."""

from __future__ import annotations

import copy
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distill.label_metrics import agreement, score
from export.edge import EdgeFile
from student_trainer.report import write_report
from student_trainer.waits import Waits

RANDOM = np.random.default_rng(0)
LABELS = RANDOM.integers(0, 10, 200)
HOSTILE = "<script>alert('x')</script>&amp;.png"
VOID = {"meta", "br", "img", "link", "hr", "input"}


def logits(share_right: float) -> Any:
    logits_NK = RANDOM.normal(0, 1, (200, 10)).astype(np.float32)
    right = RANDOM.random(200) < share_right
    logits_NK[right, LABELS[right]] += 6
    return logits_NK


def edge_file(kind: str, shipped: bool) -> dict[str, Any]:
    return EdgeFile(
        student="small", kind=kind, path=f"small.{kind}.onnx", sha256="a" * 64, size_bytes=123_456, int8_weight_share=0.99, num_images=200,
        top1=0.8125, agreement=0.9875, kl=0.01, latency_p50_ms=1.234, latency_p99_ms=2.345,
        size_ratio=0.28, latency_ratio=0.6, shipped=shipped, reason="int8 is 3 % slower",
    ).model_dump(mode="json")  # fmt: skip


@pytest.fixture
def gathered() -> dict[str, Any]:
    """What the verbs gather for a run of one student, with real scores of made-up logits."""
    teacher_NK, student_NK, control_NK = logits(0.9), logits(0.8), logits(0.5)

    def judged(logits_NK: Any) -> dict[str, Any]:
        return {
            "scores": score(logits_NK, LABELS).model_dump(),
            "to_teacher": agreement(teacher_NK, logits_NK).model_dump(),
            "num_parameters": 1_234_567,
        }

    totals = {"images": 4000.0, "asked": 2100.0, "from_store": 1900.0, "seconds": 80.0, **Waits(student=60, teacher=20).model_dump()}
    epochs = [{"epoch": number, "loss": {"small": 1 / number}, "top1": {"small": 0.1 * number}} for number in (1, 2, 3)]
    return {
        "run": {"run_dir": "runs/example", "seed": 0, "data": {"unlabelled": {"path": "a<b>&c"}}},
        "class_names": [f"class {number}" for number in range(10)],
        "stages": {
            "evaluate": {
                "teacher": {"scores": score(teacher_NK, LABELS).model_dump()},
                "students": {"small": judged(student_NK)},
                "controls": {"small": judged(control_NK)},
            },
            "train": {"totals": totals, "epochs": epochs, "store": {"num_labels": 2100, "num_segments": 8, "size_bytes": 210_000}},
            "control": {"totals": totals, "epochs": epochs[:2]},
            "export-student": {"files": [edge_file("fp32", True), edge_file("int8", False)]},
            "export-teacher": {
                "fingerprint": "c0ffee" * 10 + "0000",
                "parity": {"num_images": 64, "max_logit_error": 1.5e-5, "top1_agreement": 1.0},
            },
            "pretrain": {},
            "finetune": {},
        },
        "teacher": "export-teacher",
        "pretrain_curve": [{"step": step, "loss": 5 - step / 10, "accuracy": step / 20} for step in range(10)],
        "rejected": [{"image_id": HOSTILE, "reason": "truncated"}],
    }


class Page(HTMLParser):
    """Elements must close in order; text and tags are kept."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.text: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    @property
    def words(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.text))


def test_the_page_says_the_runs_numbers(tmp_path: Path, gathered: dict[str, Any]) -> None:
    page = Page(write_report(tmp_path / "report", gathered).read_text(encoding="utf-8"))
    evaluation = gathered["stages"]["evaluate"]
    student, control = evaluation["students"]["small"], evaluation["controls"]["small"]
    right = (np.asarray(evaluation["teacher"]["scores"]["top1"]) * 200).round()
    assert f"The teacher is right on {right / 200:.1%} of 200 test images" in page.words
    for entry in (student, control):
        assert f"{entry['scores']['top1']:.1%}" in page.words
        assert f"{entry['to_teacher']['kl']:.3f}" in page.words
    for words in (
        "1,234,567",
        "4000 crops trained every student in 80 s (50/s); 2100 labels came from the teacher, 1900 from the store.",
        "2100 labels in 0.2 MB (100 bytes each",
        "Student busy 75%, waits for teacher 25%",
        "small/small.int8.onnx",
        "123 kB",
        "1.234 ms",
        "int8 is 3 % slower",
        "c0ffee" * 10 + "0000",
        "largest logit error 1.5e-05",
        "small, labels only",
        "Distillation report: example",
    ):
        assert words in page.words, words
    assert page.tags.count("svg") == 6


def test_both_teachers_of_a_chain_are_in_the_table(tmp_path: Path, gathered: dict[str, Any]) -> None:
    assert "self-distilled" not in write_report(tmp_path, gathered).read_text()
    first = {"scores": {**gathered["stages"]["evaluate"]["teacher"]["scores"], "top1": 0.1234}}
    gathered["stages"]["evaluate"]["first_teacher"] = first
    words = " ".join(Page(write_report(tmp_path, gathered).read_text()).text)
    assert words.index("first teacher") < words.index("12.3%") < words.index("teacher, self-distilled")


def test_names_from_outside_stay_text(tmp_path: Path, gathered: dict[str, Any]) -> None:
    page = Page(write_report(tmp_path, gathered).read_text(encoding="utf-8"))
    assert "script" not in page.tags
    assert "b" not in page.tags
    assert HOSTILE in page.words
    assert "a<b>&c" in page.words


def test_json_beside_it_is_what_was_gathered(tmp_path: Path, gathered: dict[str, Any]) -> None:
    before = copy.deepcopy(gathered)
    path = write_report(tmp_path / "new", gathered)
    assert path == tmp_path / "new" / "report.html"
    kept = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    assert kept.pop("machine")
    assert kept.pop("version")
    assert kept == json.loads(json.dumps(before))
    assert gathered == before


def test_a_run_without_control_edge_files_or_pretraining(tmp_path: Path, gathered: dict[str, Any]) -> None:
    stages = gathered["stages"]
    del stages["control"]
    stages["export-student"] = None
    stages["evaluate"]["controls"] = {}
    gathered |= {"pretrain_curve": [], "rejected": []}
    page = Page(write_report(tmp_path, gathered).read_text(encoding="utf-8"))
    assert page.tags.count("svg") == 4
    assert "labels only" not in page.words.replace("labels only (control)", "")
    assert "Images that could not be used None." in page.words


def test_the_same_numbers_give_the_same_page(tmp_path: Path, gathered: dict[str, Any]) -> None:
    pages = [write_report(tmp_path / name, gathered).read_bytes() for name in ("one", "two")]
    assert pages[0] == pages[1]
