"""The report of a run: one HTML page with its pictures inside, and the same numbers as JSON for programs."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

import jinja2
import yaml

from distill import __version__
from distill.label_metrics import NUM_BINS
from student_trainer import plots
from student_trainer.waits import Waits


def write_report(folder: Path, gathered: dict[str, Any]) -> Path:
    """Write `report.html` and `report.json`.

    Args:
        gathered: plain data: `run` (the run file), `stages` (name -> result or None), `teacher` (the stage that exported it),
            `pretrain_curve`, `rejected`, `class_names`.

    Returns:
        The path of the HTML page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    machine = describe_machine()
    (folder / "report.json").write_text(json.dumps({**gathered, "machine": machine, "version": __version__}, indent=1), encoding="utf-8")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    page = environment.get_template("report.html.j2").render(_content(gathered), machine=machine, version=__version__)
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def describe_machine() -> str:
    """Processor, cores and system, in a few words."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0] if names else model
    return f"{model}, {os.cpu_count()} cores, {platform.system()}"


def _content(gathered: dict[str, Any]) -> dict[str, Any]:
    stages = gathered["stages"]
    evaluation, train, edge = stages["evaluate"], stages["train"], stages["export-student"]
    control = stages.get("control")
    return {
        "title": f"Distillation report: {Path(gathered['run']['run_dir']).name}",
        "summary": _summary(gathered),
        "rows": _rows(evaluation),
        "labels": _labels(train),
        "waits": Waits(**{name: train["totals"][name] for name in Waits.model_fields}).describe().capitalize() + ".",
        "files": [_file(file) for file in edge["files"]] if edge else [],
        "fingerprint": stages[gathered["teacher"]]["fingerprint"],
        "parity": stages[gathered["teacher"]]["parity"],
        "num_bins": NUM_BINS,
        "rejected": gathered["rejected"],
        "run_file": yaml.safe_dump(gathered["run"], sort_keys=False, allow_unicode=True),
        "plots": {
            "accuracy": plots.accuracy(evaluation),
            "curves": plots.curves(train["epochs"], control["epochs"] if control else []),
            "reliability": plots.reliability(evaluation),
            "waits": plots.waits(train["totals"]),
            "edge": plots.edge_files(edge["files"]) if edge and edge["files"][0]["top1"] is not None else "",
            "pretraining": plots.pretraining(gathered["pretrain_curve"]) if gathered["pretrain_curve"] else "",
        },
    }


def _summary(gathered: dict[str, Any]) -> str:
    evaluation = gathered["stages"]["evaluate"]
    best = max(evaluation["students"], key=lambda name: evaluation["students"][name]["scores"]["top1"])
    student = evaluation["students"][best]["scores"]["top1"]
    teacher = evaluation["teacher"]["scores"]
    words = (
        f"The teacher is right on {teacher['top1']:.1%} of {teacher['num_images']} test images; the best student, {best}, on {student:.1%}"
    )
    if best in evaluation["controls"]:
        words += f", and on {evaluation['controls'][best]['scores']['top1']:.1%} when it learns from the labelled images alone"
    return words + "."


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


def _labels(train: dict[str, Any]) -> str:
    totals, store = train["totals"], train["store"]
    rate = totals["images"] / max(totals["seconds"], 1e-9)
    return (
        f"{totals['images']:.0f} crops trained every student in {totals['seconds']:.0f} s ({rate:.0f}/s);"
        f" {totals['asked']:.0f} labels came from the teacher, {totals['from_store']:.0f} from the store."
        f" The store holds {store['num_labels']} labels in {store['size_bytes'] / 1e6:.1f} MB"
        f" ({store['size_bytes'] / max(1, store['num_labels']):.0f} bytes each, image ids and error bounds included)."
    )


def _file(file: dict[str, Any]) -> dict[str, Any]:
    return {
        "path": f"{file['student']}/{file['path']}",
        "size": f"{file['size_bytes'] / 1000:.0f} kB",
        "p50": f"{file['latency_p50_ms']:.3f} ms",
        "p99": f"{file['latency_p99_ms']:.3f} ms",
        "top1": "" if file["top1"] is None else f"{file['top1']:.1%}",
        "agreement": f"{file['agreement']:.1%}",
        "shipped": file["shipped"],
        "reason": file["reason"],
    }
