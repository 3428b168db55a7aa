"""The report: a page that a browser can read, with the run's numbers in it, and nothing of an image's name taken for HTML."""

from __future__ import annotations

import copy
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import sync_playwright

from distill.errors import ConfigError
from distill.label_metrics import agreement, confusions, score
from export.edge import EdgeFile
from student_trainer.report import distinct_tails, write_comparison, write_report
from student_trainer.sweep_report import write_sweep
from student_trainer.waits import Waits

RANDOM = np.random.default_rng(0)
LABELS = RANDOM.integers(0, 10, 200)
HOSTILE = "<script>alert('x')</script>&amp;.png"
VOID = {"meta", "br", "wbr", "img", "link", "hr", "input"}


def logits(share_right: float) -> Any:
    logits_NK = RANDOM.normal(0, 1, (200, 10)).astype(np.float32)
    right = RANDOM.random(200) < share_right
    logits_NK[right, LABELS[right]] += 6
    return logits_NK


def edge_file(kind: str, shipped: bool) -> dict[str, Any]:
    return EdgeFile(
        student="small", kind=kind, path=f"small.{kind}.onnx", sha256="a" * 64, size_bytes=123_456, int8_weight_share=0.99, num_images=200,
        top1=0.8125, agreement=0.9875, kl=0.01, latency_p50_ms=1.234, latency_p99_ms=2.345, latency_all_p50_ms=0.765,
        latency_all_p99_ms=0.987, peak_memory_bytes=12_300_000,
        size_ratio=0.28, latency_ratio=0.6, shipped=shipped, reason="int8 is 3 % slower",
    ).model_dump(mode="json")  # fmt: skip


@pytest.fixture
def gathered() -> dict[str, Any]:
    """What the verbs gather for a run of one student, with real scores of made-up logits."""
    teacher_NK, student_NK, control_NK = logits(0.9), logits(0.8), logits(0.5)

    def judged(logits_NK: Any) -> dict[str, Any]:
        return {
            "scores": score(logits_NK, LABELS).model_dump(),
            "confusions": confusions(logits_NK, LABELS).model_dump(mode="json"),
            "to_teacher": agreement(teacher_NK, logits_NK).model_dump(),
            "num_parameters": 1_234_567,
        }

    totals = {"images": 4000.0, "asked": 2100.0, "from_store": 1900.0, "seconds": 80.0, **Waits(student=60, teacher=20).model_dump()}
    totals |= {"images of small": 4000.0, "seconds of small": 45.5}
    epochs = [{"epoch": n, "step": 40 * n, "loss": {"small": 1 / n}, "top1": {"small": 0.1 * n}} for n in (1, 2, 3)]
    points = [
        {
            "step": step, "seconds": 20.0 * step, "images_per_s": 50.0, "losses": {"small": 3 / step}, "agreement": {"small": step / 5},
            "waits": Waits(student=15.0 * step, teacher=5.0 * step).model_dump(),
        }
        for step in (1, 2, 3, 4)
    ]  # fmt: skip
    stopped = {"tiny": {"why": "diverged", "step": 12, "detail": "the loss is not finite"}}
    trained = {"totals": totals, "epochs": epochs, "store": {"num_labels": 2100, "num_segments": 8, "size_bytes": 210_000}}
    return {
        "run": {"run_dir": "runs/example", "seed": 0, "data": {"unlabelled": {"path": "a<b>&c"}}},
        "class_names": [f"class {number}" for number in range(10)],
        "stages": {
            "evaluate": {
                "teacher": {
                    "scores": score(teacher_NK, LABELS).model_dump(),
                    "confusions": confusions(teacher_NK, LABELS).model_dump(mode="json"),
                },
                "students": {"small": judged(student_NK)},
                "controls": {"small": judged(control_NK)},
            },
            "train": {**trained, "stopped": stopped},
            "control": {"totals": totals, "epochs": epochs[:2]},
            "export-student": {
                "files": [edge_file("fp32", True), edge_file("fp16", True), edge_file("int8", False)],
                "recommended": {"small": {"path": "small.fp32.onnx", "why": "the next best"}},
            },
            "export-teacher": {
                "fingerprint": "c0ffee" * 10 + "0000",
                "parity": {"num_images": 64, "max_logit_error": 1.5e-5, "top1_agreement": 1.0},
            },
            "pretrain": {},
            "finetune": {},
        },
        "teacher": "export-teacher",
        "pretrain_curve": [{"step": step, "loss": 5 - step / 10, "accuracy": step / 20} for step in range(10)],
        "history": {"train": {"points": points}, "control": {"points": []}},
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
        "4000 crops trained the students, each until it stopped, in 80 s (50/s)",
        "(50/s); 2100 of their labels came from the teacher, 1900 from the store. The",
        "2100 labels in 0.2 MB (100 bytes each",
        "Student busy 75%, waits for teacher 25%",
        "small/ small.int8.onnx",  # it may break there
        "123 kB",
        "1.234 ms",
        "int8 is 3 % slower",
        "c0ffee" * 10 + "0000",
        "largest logit error 1.5e-05",
        "small, labels only",
        "Distillation report: example",
        "tiny diverged at step 12: the loss is not finite",
        "small 4,000 100% 45.5 s 2,100 210 kB",
    ):
        assert words in page.words, words
    assert page.tags.count("svg") == 8


def test_what_early_ends_and_held_out_crops_change_is_said(tmp_path: Path, gathered: dict[str, Any]) -> None:
    train = gathered["stages"]["train"]
    train |= {"stopped": {}, "selection": {"rungs": [], "final": {}, "best": {}}}
    words = Page(write_report(tmp_path / "whole", gathered).read_text()).words
    assert "4000 crops trained every student in 80 s" in words
    assert "stopped early (see below)" not in words
    assert "come on top" not in words
    train["stopped"] = {"small": {"why": "halving", "step": 40, "detail": "number 2 of 2"}}
    train["selection"]["rungs"] = [{"step": 40, "scores": {"small": 0.5}, "kept": []}]
    gathered["history"]["train"]["unreadable"] = 3
    words = Page(write_report(tmp_path / "cut", gathered).read_text()).words
    assert "labelled images alone. small stopped early (see below) and took fewer steps than the control did." in words
    assert "from the store. Those of the held-out crops, on which students were compared while they trained, come on top." in words
    assert "3 lines of the journal of training could not be read" in words


def test_dollars_in_names_are_dollars(tmp_path: Path, gathered: dict[str, Any]) -> None:
    """Two of them would begin and end a formula, and `\\` in it is no word of TeX's."""
    name = r"$\small$"
    gathered = json.loads(json.dumps(gathered).replace('"small"', json.dumps(name)))
    gathered["class_names"] = [rf"${number} \off$" for number in range(10)]
    svgs = write_report(tmp_path, gathered).read_text()
    assert r"$3 \off$</text>" in svgs
    assert f"{name}</text>" in svgs


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
    assert page.tags.count("svg") == 6
    assert "labels only" not in page.words.replace("labels only (control)", "")
    assert "Images that could not be used None." in page.words


def test_a_run_of_before_there_were_histories_and_confusions(tmp_path: Path, gathered: dict[str, Any]) -> None:
    evaluation = gathered["stages"]["evaluate"]
    for entry in (evaluation["teacher"], evaluation["students"]["small"], evaluation["controls"]["small"]):
        del entry["confusions"]
    del gathered["stages"]["train"]["stopped"]
    for row in gathered["stages"]["train"]["epochs"]:
        row.pop("step", None)
    gathered["history"] = {}
    page = Page(write_report(tmp_path, gathered).read_text(encoding="utf-8"))
    assert page.tags.count("svg") == 6
    assert "Mistakes that distillation changed" not in page.words


def test_mistakes_are_counted_in_the_best_students_name(tmp_path: Path, gathered: dict[str, Any]) -> None:
    """Cell by cell against the matrices: nothing changed more than the first line of the table."""
    page = Page(write_report(tmp_path, gathered).read_text(encoding="utf-8"))
    matrices = {}
    for group in ("students", "controls"):
        matrices[group] = np.zeros((10, 10), dtype=int)
        for true, answer, count in gathered["stages"]["evaluate"][group]["small"]["confusions"]["cells"]:
            matrices[group][true, answer] = count
    change_KK = (matrices["students"] - matrices["controls"]) / matrices["students"].sum(axis=1, keepdims=True)
    np.fill_diagonal(change_KK, 0)
    true, answer = np.unravel_index(np.abs(change_KK).argmax(), change_KK.shape)
    first = re.search(r"change, points (class \d+ taken for class \d+) (\d+) (\d+) (\d+) (\d+) (\S+)", page.words)
    assert first is not None
    assert first[1] == f"class {true} taken for class {answer}"
    assert (int(first[3]), int(first[4])) == (matrices["controls"][true, answer], matrices["students"][true, answer])
    assert first[6] == f"{100 * change_KK[true, answer]:+.1f}"


def test_students_have_a_page_of_their_own(tmp_path: Path, gathered: dict[str, Any]) -> None:
    page = Page((write_report(tmp_path, gathered).parent / "students.html").read_text(encoding="utf-8"))
    assert "Students of example" in page.words
    assert "small 4,000 100% 45.5 s" in page.words
    assert page.tags.count("svg") == 1


def test_students_of_several_runs_are_compared_on_one_page(tmp_path: Path, gathered: dict[str, Any]) -> None:
    other = copy.deepcopy(gathered)
    other["run"]["run_dir"] = "runs/other"
    other["stages"]["evaluate"]["students"]["small"]["scores"]["top1"] = 0.9999
    reports = [write_report(tmp_path / name, one).with_suffix(".json") for name, one in (("a", gathered), ("b", other))]
    page = Page(write_comparison(tmp_path / "all" / "students.html", reports).read_text(encoding="utf-8"))
    assert "4 students of 2 runs" in page.words
    assert page.words.index("other/small 100.0%") < page.words.index("example/small")


def test_runs_of_one_name_keep_their_students_apart(tmp_path: Path, gathered: dict[str, Any]) -> None:
    folders = [tmp_path / run / "exp" / "report" for run in ("a", "b")] + [tmp_path / "other" / "report"]
    for folder in folders:
        write_report(folder, {**gathered, "run": {**gathered["run"], "run_dir": str(folder.parent)}})
    reports = [folder / "report.json" for folder in (*folders, folders[0])]  # one is given twice
    page = Page(write_comparison(tmp_path / "students.html", reports).read_text(encoding="utf-8"))
    assert "6 students of 3 runs" in page.words
    for name in ("a/exp/small", "b/exp/small", "other/small"):
        assert page.words.count(f" {name} ") >= 2, name


@pytest.mark.parametrize(
    ("paths", "tails"),
    [
        ([("a", "x"), ("b", "y")], ["x", "y"]),
        ([("a", "x"), ("b", "x"), ("b", "y")], ["a/x", "b/x", "y"]),
        ([("r", "a", "x"), ("s", "a", "x"), ("b", "x")], ["r/a/x", "s/a/x", "b/x"]),
        ([("x",), ("a", "x")], ["x", "a/x"]),
    ],
)
def test_names_are_as_short_as_they_can_be(paths: list[tuple[str, ...]], tails: list[str]) -> None:
    assert distinct_tails(paths) == tails


def test_nothing_but_a_page_of_ours_is_written_over(tmp_path: Path, gathered: dict[str, Any]) -> None:
    report = write_report(tmp_path / "report", gathered).with_suffix(".json")
    page = tmp_path / "students.html"
    assert write_comparison(page, [report]) == write_comparison(page, [report])
    for there in (report, tmp_path):
        before = report.read_bytes()
        with pytest.raises(ConfigError, match="exists and is no page of distill; give another place"):
            write_comparison(there, [report])
        assert report.read_bytes() == before


def test_a_file_that_is_no_report_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text('{"run": {"run_dir": "x"}}')
    with pytest.raises(ConfigError, match=r"report\.json is no report\.json that can be compared \(KeyError: 'stages'\)"):
        write_comparison(tmp_path / "students.html", [path])


def test_the_same_numbers_give_the_same_page(tmp_path: Path, gathered: dict[str, Any]) -> None:
    pages = [write_report(tmp_path / name, gathered).read_bytes() for name in ("one", "two")]
    assert pages[0] == pages[1]


def test_a_sweep_has_all_its_students_on_one_page(tmp_path: Path, gathered: dict[str, Any]) -> None:
    best = {"student": "small.1", "settings": {"optimizer.learning_rate": 0.1}, "rung": 1, "score": 0.75, "ended": None}
    worst = {"student": "small.2", "settings": {"optimizer.learning_rate": 9.0}, "rung": 0, "score": None, "ended": "diverged at step 12"}
    costs = [{"top1": 0.625, "latency_ms": 0.1234, "size_bytes": 325_000}, {"top1": None, "latency_ms": None, "size_bytes": None}]
    rows = [{**row, **cost, "num_parameters": 900} for row, cost in zip((best, worst), costs, strict=True)]
    totals = {**gathered["stages"]["train"]["totals"], "images of small.1": 3000.0, "seconds of small.1": 9.5}
    epochs = [{"epoch": 1, "step": 40, "top1": {"small.1": 0.5}}]
    points = [{"step": step, "losses": {"small.1": 2.0}, "agreement": {"small.1": 0.5}} for step in (1, 2)]
    result = {**gathered["stages"]["train"], "ranking": rows, "totals": totals, "epochs": epochs}
    page = Page(write_sweep(tmp_path / "new" / "sweep.html", "example", result, {"points": points}).read_text(encoding="utf-8"))
    assert "Sweep of example: 2 students" in page.words
    assert re.search(r"small.1 learning_rate 0.1 1 0.7500 62.5% 0.123 ms 325 kB 900 3,000 43% 9.5 s at the end", page.words)
    assert re.search(r"small.2 learning_rate 9.0 0 900 diverged at step 12", page.words)
    assert page.tags.count("svg") == 2


@pytest.mark.integration
@pytest.mark.parametrize("width", [1280, 420])
def test_nothing_is_cut_off_in_a_browser(tmp_path: Path, gathered: dict[str, Any], width: int) -> None:
    """In a real Chromium: the page is no wider than the window, and every letter of a picture is inside it."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("there is no Chromium here")
    report = write_report(tmp_path, gathered)
    complaints: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        for path in (report, report.with_name("students.html")):
            page.goto(path.as_uri())
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert page.locator("svg").count() > 0
            assert page.evaluate(LETTERS_OUTSIDE) == []
        browser.close()
    assert complaints == []


LETTERS_OUTSIDE = """() => [...document.querySelectorAll('svg')].flatMap(svg => {
    const frame = svg.getBoundingClientRect();
    return [...svg.querySelectorAll('text')].filter(text => {
        const box = text.getBoundingClientRect();
        return box.left < frame.left - 2 || box.right > frame.right + 2 || box.top < frame.top - 2 || box.bottom > frame.bottom + 2;
    }).map(text => text.textContent);
})"""
