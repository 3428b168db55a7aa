"""The report of a run: one HTML page with its pictures inside, and the same numbers as JSON for programs.

Beside it `students.html` compares the students only, of this run or of several (`write_comparison`). What the pages say of students is
worked out in `comparison` and `changed_confusions`, the pictures are painted in `plots` and `comparison_plots`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import yaml

from distill import __version__
from distill.errors import ConfigError
from distill.label_metrics import NUM_BINS
from distill.machine import describe_machine
from student_trainer import comparison_plots, plots
from student_trainer.changed_confusions import ChangedPair, changed_pairs, mistakes
from student_trainer.comparison import Candidate, EdgePoint, candidates, in_order
from student_trainer.waits import Waits

HELD_OUT = " Those of the held-out crops, on which students were compared while they trained, come on top."
MADE_BY = "Made by distill "
"""What each page of ours says at its end."""
LIGHTEST_HISTORY = 2
"""Points below which there is nothing to draw over time."""


def write_report(folder: Path, gathered: dict[str, Any]) -> Path:
    """Write `report.html`, `report.json` and `students.html`.

    Args:
        gathered: plain data: `run` (the run file), `stages` (name -> result or None), `teacher` (the stage that exported it),
            `pretrain_curve`, `rejected`, `class_names`, `history` (stage -> `student_trainer.history.read_history` of its journal).

    Returns:
        The path of the HTML page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    machine = describe_machine()
    (folder / "report.json").write_text(json.dumps({**gathered, "machine": machine, "version": __version__}, indent=1), encoding="utf-8")
    students = candidates(gathered)
    path = write_page(folder / "report.html", "report.html.j2", machine, _content(gathered, students))
    write_page(folder / "students.html", "students.html.j2", machine, _students_content(f"Students of {_run_name(gathered)}", students))
    return path


def write_comparison(path: Path, reports: Sequence[Path]) -> Path:
    """One page at `path` with the students of all the runs whose `report.json` are given, each once.

    A student is named after its run: the name of the run's folder, with as many of the folders above as tell it from the other runs.

    Raises:
        ConfigError: a file that is no report of ours, or of another version that had no students to compare; or `path` is something else
            than a page of ours.
    """
    if path.is_dir() or (path.exists() and MADE_BY not in path.read_text(encoding="utf-8", errors="replace")):
        raise ConfigError(f"{path} exists and is no page of distill; give another place, or move it away")
    read = {report: _read_report(report) for report in {report.resolve(): report for report in reports}.values()}
    names = distinct_tails([_place(report, run_name) for report, (run_name, _) in read.items()])
    students = [
        student.replace(name=f"{name}/{student.name}") for name, (_, found) in zip(names, read.values(), strict=True) for student in found
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    title = f"{len(students)} students of {len(read)} runs"
    return write_page(path, "students.html.j2", describe_machine(), _students_content(title, in_order(students)))


def _read_report(report: Path) -> tuple[str, list[Candidate]]:
    """Name and students of a run."""
    try:
        gathered = json.loads(report.read_text(encoding="utf-8"))
        return _run_name(gathered), candidates(gathered)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{report} is no report.json that can be compared ({type(error).__name__}: {error}); make it with `distill report`"
        ) from error


def _place(report: Path, run_name: str) -> tuple[str, ...]:
    """The folders down to the run of which `report` is, and its name. A report may lie elsewhere than its run did."""
    parts = report.resolve().with_suffix("").parts
    while parts and parts[-1] == "report":  # RUN/report/report.json
        parts = parts[:-1]
    return parts if parts[-1:] == (run_name,) else (*parts, run_name)


def distinct_tails(paths: Sequence[tuple[str, ...]]) -> list[str]:
    """Of each of the `paths`, as few of its last parts, at least one, as no other ends with, joined by `/`."""
    found = []
    for path in paths:
        lengths = range(1, len(path) + 1)
        fewest = next((n for n in lengths if sum(other[-n:] == path[-n:] for other in paths) == 1), len(path))
        found.append("/".join(path[-fewest:]))
    return found


def write_page(path: Path, template: str, machine: str, content: dict[str, Any]) -> Path:
    """Render a template of this package at `path`."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    page = environment.get_template(template).render(content, machine=machine, version=__version__)
    path.write_text(page, encoding="utf-8")
    return path


def _run_name(gathered: dict[str, Any]) -> str:
    return Path(gathered["run"]["run_dir"]).name


def _content(gathered: dict[str, Any], students: list[Candidate]) -> dict[str, Any]:
    stages = gathered["stages"]
    evaluation, train, edge = stages["evaluate"], stages["train"], stages["export-student"]
    control = stages.get("control")
    epochs = {"distilled": train["epochs"]} | ({"labels only": control["epochs"]} if control else {})
    points = gathered["history"].get("train", {}).get("points", [])
    drawn = len(points) >= LIGHTEST_HISTORY
    return {
        **_students_content(f"Distillation report: {_run_name(gathered)}", students),
        "summary": _summary(gathered),
        "rows": _rows(evaluation),
        "confusions": _confusions(evaluation, gathered["class_names"]),
        "labels": _labels(train),
        "has_controls": bool(evaluation["controls"]),
        "cut_short": [name for name in evaluation["students"] if name in train.get("stopped", {})],
        "unreadable": gathered["history"].get("train", {}).get("unreadable", 0),
        "waits": Waits(**{name: train["totals"][name] for name in Waits.model_fields}).describe().capitalize() + ".",
        "files": [_file(file) for file in edge["files"]] if edge else [],
        "recommended": [{"student": name, **chosen} for name, chosen in edge["recommended"].items()] if edge else [],
        "fingerprint": stages[gathered["teacher"]]["fingerprint"],
        "parity": stages[gathered["teacher"]]["parity"],
        "num_bins": NUM_BINS,
        "fewest_in_bin": plots.FEWEST_IN_BIN,
        "rejected": gathered["rejected"],
        "run_file": yaml.safe_dump(gathered["run"], sort_keys=False, allow_unicode=True),
        "plots": {
            "accuracy": plots.accuracy(evaluation),
            "curves": plots.curves(plots.best_students(evaluation), epochs, points if drawn else []),
            "reliability": plots.reliability(evaluation),
            "waits": plots.waits(train["totals"]),
            "waits_over_time": plots.waits_over_time(points) if drawn else "",
            "pretraining": plots.pretraining(gathered["pretrain_curve"]) if gathered["pretrain_curve"] else "",
        },
    }


def _students_content(title: str, students: list[Candidate]) -> dict[str, Any]:
    """What both pages show of the students."""
    measured = any(file.top1 is not None for student in students for file in student.files)
    return {
        "title": title,
        "students": [_student(student) for student in students],
        "stopped": [student for student in students if student.stopped],
        "tradeoffs": comparison_plots.tradeoffs(students) if measured else "",
    }


def _summary(gathered: dict[str, Any]) -> str:
    evaluation = gathered["stages"]["evaluate"]
    best = _best(evaluation)
    student = evaluation["students"][best]["scores"]["top1"]
    teacher = evaluation["teacher"]["scores"]
    words = (
        f"The teacher is right on {teacher['top1']:.1%} of {teacher['num_images']} test images; the best student, {best}, on {student:.1%}"
    )
    if best in evaluation["controls"]:
        words += f", and on {evaluation['controls'][best]['scores']['top1']:.1%} when it learns from the labelled images alone"
    return words + "."


def _best(evaluation: dict[str, Any]) -> str:
    return max(evaluation["students"], key=lambda name: evaluation["students"][name]["scores"]["top1"])


def _rows(evaluation: dict[str, Any]) -> list[dict[str, str]]:
    rows = [_row("teacher", evaluation["teacher"])]
    if "first_teacher" in evaluation:
        rows = [_row("first teacher", evaluation["first_teacher"]), _row("teacher, self-distilled", evaluation["teacher"])]
    for name, entry in evaluation["students"].items():
        rows.append(_row(f"{name}, distilled", entry))
        if name in evaluation["controls"]:
            rows.append(_row(f"{name}, labels only", evaluation["controls"][name]))
    return rows


def _row(name: str, entry: dict[str, Any]) -> dict[str, str]:
    scores, near = entry["scores"], entry.get("to_teacher")
    return {
        "name": name,
        "parameters": f"{entry['num_parameters']:,}" if "num_parameters" in entry else "",
        "top1": f"{scores['top1']:.1%}",
        "top5": f"{scores['top5']:.1%}",
        "ece": f"{scores['ece']:.3f}",
        "agreement": f"{near['top1_agreement']:.1%}" if near else "",
        "kl": f"{near['kl']:.3f}" if near else "",
    }


def _student(student: Candidate) -> dict[str, str]:
    """A line of the table that compares students; empty cells where a stage has not been made."""
    shipped = [file for file in student.files if file.shipped]
    cost, best = student.cost, next((file for file in shipped if file.recommended), shipped[-1] if shipped else None)
    return {
        "name": student.name,
        "top1": "" if student.top1 is None else f"{student.top1:.1%}",
        "agreement": "" if student.agreement is None else f"{student.agreement:.1%}",
        "parameters": "" if student.num_parameters is None else f"{student.num_parameters:,}",
        "kind": "" if best is None else _kind(best),
        "size": "" if best is None else f"{best.size_bytes / 1000:,.0f} kB",
        "latency": "" if best is None else f"{best.latency_ms:.3f} ms",
        "images": "" if cost is None else f"{cost.images:,.0f}",
        "stream_share": "" if cost is None else f"{cost.stream_share:.0%}",
        "step_seconds": "" if cost is None else f"{cost.step_seconds:,.1f} s",
        "teacher_calls": "" if cost is None else f"{cost.teacher_calls:,.0f}",
        "label_bytes": "" if cost is None else f"{cost.label_bytes / 1000:,.0f} kB",
    }


def _kind(file: EdgePoint) -> str:
    return file.kind if file.runtime == "onnxruntime" else f"{file.kind} ({file.runtime})"


def _confusions(evaluation: dict[str, Any], class_names: list[str]) -> dict[str, Any] | None:
    """What distillation changed in the best student's mistakes; None for an evaluation that did not keep them."""
    name = _best(evaluation)
    student, control, teacher = evaluation["students"][name], evaluation["controls"].get(name), evaluation["teacher"]
    if "confusions" not in student:
        return None
    others = ([("distilled minus labels only", control)] if control else []) + [("distilled minus teacher", teacher)]
    panels = [(title, mistakes(student) - mistakes(other)) for title, other in others]
    return {
        "student": name,
        "pairs": [_pair(pair) for pair in changed_pairs(student, control, teacher, class_names)],
        "has_control": control is not None,
        "plot": comparison_plots.changed_confusions(panels, class_names),
    }


def _pair(pair: ChangedPair) -> dict[str, str]:
    before = pair.teacher if pair.control is None else pair.control
    return {
        "pair": f"{pair.true} taken for {pair.answer}",
        "teacher": str(pair.teacher),
        "control": "" if pair.control is None else str(pair.control),
        "student": str(pair.student),
        "change": f"{100 * (pair.student - before) / pair.num_images:+.1f}",
        "num_images": str(pair.num_images),
    }


def _labels(train: dict[str, Any]) -> str:
    totals, store = train["totals"], train["store"]
    rate = totals["images"] / max(totals["seconds"], 1e-9)
    whom = "the students, each until it stopped," if train.get("stopped") else "every student"
    return (
        f"{totals['images']:.0f} crops trained {whom} in {totals['seconds']:.0f} s ({rate:.0f}/s);"
        f" {totals['asked']:.0f} of their labels came from the teacher, {totals['from_store']:.0f} from the store."
        f"{HELD_OUT if any(train.get('selection', {}).values()) else ''}"
        f" The store holds {store['num_labels']} labels in {store['size_bytes'] / 1e6:.1f} MB"
        f" ({store['size_bytes'] / max(1, store['num_labels']):.0f} bytes each, image ids and error bounds included)."
    )


def _file(file: dict[str, Any]) -> dict[str, Any]:
    return {
        "path": f"{file['student']}/{file['path']}",
        "size": f"{file['size_bytes'] / 1000:.0f} kB",
        "p50": f"{file['latency_p50_ms']:.3f} ms",
        "p99": f"{file['latency_p99_ms']:.3f} ms",
        "all_cores": f"{file['latency_all_p50_ms']:.3f} ms",
        "memory": "" if file["peak_memory_bytes"] is None else f"{file['peak_memory_bytes'] / 1e6:.1f} MB",
        "top1": "" if file["top1"] is None else f"{file['top1']:.1%}",
        "agreement": f"{file['agreement']:.1%}",
        "shipped": file["shipped"],
        "reason": file["reason"],
    }
