"""The card of a student: what it learnt from whom on what, how good and how fast it is, what it is not fit for. JSON for programs, Markdown
for people, both in the student's folder (after Mitchell et al. 2019, "Model Cards for Model Reporting").

Unit of data: one student. The bytes are a function of what is told: no date stands in it.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from distill import __version__
from distill.config import Section
from export.edge import EdgeFile, EdgeReport
from export.files import write_atomically
from export.settings import Int8Gate

CARD_JSON, CARD_MARKDOWN = "card.json", "card.md"
_GATE = Int8Gate()


class ImageSet(Section):
    """One set of images."""

    used_for: str
    """What it was used for."""
    path: str
    """Where it lay: a URL, or the last part of a path, as the rest says more of a machine than of images."""
    num_images: int
    """Images in it, usable or not; of labelled images those that the run may use."""
    content_digest: str
    """Names its content."""


class StudentCard(Section):
    """`card.json`."""

    format: Literal["distill.student-card/1"] = "distill.student-card/1"
    """Version of this form."""
    made_by: str = f"distill {__version__}"
    """The program."""
    name: str
    """Name of the student."""
    num_parameters: int
    """Of its network."""
    data: tuple[ImageSet, ...]
    """The images that had a part in it."""
    teacher: dict[str, Any]
    """Name, fingerprint, precision and accuracy (null where it was not judged) of the teacher."""
    recipe: dict[str, Any]
    """Settings of the distillation: the student's own and the common ones, as in the run file."""
    numbers: dict[str, Any] | None
    """Scores on the test images, in torch, of the student, its control and the teacher; null where the run was not evaluated."""
    edge: EdgeReport
    """Its files, each measured in its own runtime."""
    limits: tuple[str, ...] = Field(min_length=1)
    """What must not be expected of it."""

    def write(self, folder: Path) -> None:
        """Write `card.json` and `card.md` into `folder`."""
        write_atomically(folder / CARD_JSON, (self.model_dump_json(indent=2) + "\n").encode())
        write_atomically(folder / CARD_MARKDOWN, markdown(self).encode())


def limits_of(edge: EdgeReport, numbers: dict[str, Any] | None, max_accuracy_drop: float = _GATE.max_accuracy_drop) -> tuple[str, ...]:
    """What follows from the numbers for whoever deploys the student.

    Args:
        numbers: as in `StudentCard`.
        max_accuracy_drop: the gate's limit, as a share.
    """
    how, files = edge.student.preprocessing, edge.files
    said = [
        f"It knows {len(edge.student.class_names)} classes and names one of them for every image, also for one that shows none of them.",
        f"It sees one centre crop of {how.image_size} x {how.image_size} pixels (the shorter side resized to"
        f" {round(how.image_size / how.crop_ratio)}, {how.interpolation}, RGB, uint8); other preprocessing gives other answers.",
        f"Latency and memory were measured on {edge.machine}, one crop at a time; another processor is another measurement.",
    ]
    top1, count = files[0].top1, files[0].num_images
    if top1 is None:
        said.append(f"The {count} test crops had no labels: only the agreement with the fp32 file is known, not the accuracy.")
    else:
        likely = (top1 * count + 2) / (count + 4)  # Agresti and Coull 1998: no error of 0 where all few images are right
        error = math.sqrt(likely * (1 - likely) / (count + 4))
        said.append(f"Accuracy is that of {count} test images (standard error {100 * error:.1f} points), of one training.")
    if 1 / count > max_accuracy_drop:
        said.append(
            f"With {count} test crops one of them is {1 / count:.1%}, more than the {max_accuracy_drop:.1%} that the gate lets a file lose."
        )
    if len(edge.int8_attempts) > 1:
        said.append(f"The int8 file is one of {len(edge.int8_attempts)} attempts, all judged on these same test crops.")
    if numbers is None:
        said.append("The run was not evaluated: nothing is known of its calibration and of its nearness to the teacher.")
    said += [f"{file.path.rpartition('/')[2]}: {file.reason}." for file in files if not file.shipped]
    said += [f"{file.path}: not measured, {file.reason}." for file in edge.not_measured]
    return tuple(said)


def markdown(card: StudentCard) -> str:
    """The card as a page."""
    edge = card.edge
    lines = [
        f"# {_text(card.name)}",
        "",
        f"A student of {card.num_parameters:,} parameters, distilled from teacher {_text(str(card.teacher['name']))}. Take"
        f" **{_text(edge.recommended)}**: {_text(edge.why)}.",
        "",
        "## Numbers",
        "",
        *_scores(card.numbers),
        "## Files",
        "",
        f"Measured in {edge.engine}, on {edge.machine} ({', '.join(edge.vector_instructions) or 'no integer vector instructions known'});"
        f" latency of one crop, p50 / p99; memory beyond the runtime's own.",
        "",
        "| file | size | top-1 | agrees with fp32 | KL | 1 thread, ms | all cores, ms | memory | verdict |",
        "|---|---|---|---|---|---|---|---|---|",
        *(_file_row(file) for file in edge.files),
        *(
            f"| {_text(file.path)} | {file.size_bytes / 1000:,.0f} kB | | | | | | | not measured: {_text(file.reason)} |"
            for file in edge.not_measured
        ),
        "",
        *(f"- {_text(note)}" for note in edge.int8_notes),
        *([""] if edge.int8_notes else []),
        "## Limits",
        "",
        *(f"- {_text(limit)}" for limit in card.limits),
        "",
        "## Where it comes from",
        "",
        f"Teacher: {_text(str(card.teacher['name']))}, fingerprint `{card.teacher['fingerprint']}`.",
        "",
        "| images | used for | number | digest |",
        "|---|---|---|---|",
        *(f"| {_text(s.path)} | {_text(s.used_for)} | {s.num_images:,} | `{s.content_digest[:16]}` |" for s in card.data),
        "",
        "Recipe:",
        "",
        *(f"- {_text(key)}: `{_text(_value(value))}`" for key, value in card.recipe.items() if value is not None),
        "",
        f"Classes: {', '.join(_text(name) for name in edge.student.class_names)}.",
        "",
        "## Checksums (SHA-256)",
        "",
        *(f"- `{digest}` {_text(name)}" for file in edge.files for name, digest in {file.path: file.sha256, **file.beside}.items()),
        *(f"- `{digest}` {_text(name)}" for package in edge.not_measured for name, digest in package.files.items()),
        "",
        f"Made by {card.made_by}. The same for programs: {CARD_JSON}.",
    ]
    return "\n".join(lines) + "\n"


def _scores(numbers: dict[str, Any] | None) -> list[str]:
    if numbers is None:
        return ["Not evaluated.", ""]
    rows = ["| network | top-1 | top-5 | ECE | agrees with teacher | KL to teacher |", "|---|---|---|---|---|---|"]
    for name, entry in numbers.items():
        scores, near = entry["scores"], entry.get("to_teacher")
        near_said = f"{near['top1_agreement']:.1%} | {near['kl']:.3f}" if near else " | "
        rows.append(f"| {_text(name)} | {scores['top1']:.1%} | {scores['top5']:.1%} | {scores['ece']:.3f} | {near_said} |")
    return [*rows, ""]


def _file_row(file: EdgeFile) -> str:
    top1 = "" if file.top1 is None else f"{file.top1:.1%}"
    memory = "" if file.peak_memory_bytes is None else f"{file.peak_memory_bytes / 1e6:.1f} MB"
    cells = [
        _text(file.path),
        f"{file.size_bytes / 1000:,.0f} kB",
        top1,
        f"{file.agreement:.1%}",
        f"{file.kl:.2g}",
        f"{file.latency_p50_ms:.3f} / {file.latency_p99_ms:.3f}",
        f"{file.latency_all_p50_ms:.3f} / {file.latency_all_p99_ms:.3f}",
        memory,
        _text(file.reason),
    ]
    return f"| {' | '.join(cells)} |"


def _value(value: Any) -> str:
    """A setting as a person writes it; what was left open of a group of them is left out."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_value(part)}" for key, part in value.items() if part is not None)
    return str(value)


def _text(text: str) -> str:
    """A name from outside that stays one cell of one table."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("`", "'")
