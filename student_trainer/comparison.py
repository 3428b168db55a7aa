"""The students of one run, or of several, beside each other: how good, how fast, how large, at what cost.

Flow: what the stages `evaluate`, `export-student` and `train` left behind -> one `Candidate` a student -> the front of those that no other
beats. Unit of data: one student.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from distill.config import Section
from student_trainer.totals import of_each_student


class EdgePoint(Section):
    """One edge file of a student."""

    kind: str
    """`fp32`, `fp16` or `int8`."""
    runtime: str = "onnxruntime"
    """What runs it."""
    latency_ms: float
    """Median of one crop."""
    size_bytes: int
    """Of the file."""
    top1: float | None
    """Share of test images that are right; None where the test images have no labels."""
    shipped: bool
    """Whether it passed the gate."""
    recommended: bool = False
    """Whether it is the one to take, as far as the machine that measured it can tell."""


class Cost(Section):
    """What one student took. A label is asked for once and serves all: each student bears its share of the stream."""

    images: float
    """Crops it was trained on."""
    stream_share: float
    """Of all crops that students were trained on, summed over the students."""
    step_seconds: float
    """Its own training steps, summed over the devices of the group; as many as there were last, if that changed at a restart."""
    teacher_calls: float
    """Its share of the labels asked for."""
    label_bytes: float
    """Its share of the store at the end, which may hold labels of earlier runs too."""


class Candidate(Section):
    """One student."""

    name: str
    """Its name, after that of its run if there are several."""
    top1: float | None
    """On the test images; None for one that was not judged."""
    agreement: float | None
    """With the teacher."""
    num_parameters: int | None
    """Of its network."""
    files: tuple[EdgePoint, ...] = ()
    """fp32 first."""
    cost: Cost | None = None
    """None for a run that did not count it."""
    stopped: str = ""
    """Why and when its training ended early; empty if it did not."""


def candidates(gathered: dict[str, Any]) -> list[Candidate]:
    """The students of one run, best first; those that were not judged (they diverged) come last.

    Args:
        gathered: see `student_trainer.report.write_report`.
    """
    stages = gathered["stages"]
    judged = stages["evaluate"]["students"]
    stops = {name: f"{stop['why']} at step {stop['step']}: {stop['detail']}" for name, stop in stages["train"].get("stopped", {}).items()}
    costs = costs_of(stages["train"])
    found = []
    for name in dict.fromkeys((*judged, *stops)):
        entry = judged.get(name)
        found.append(
            Candidate(
                name=name,
                top1=entry["scores"]["top1"] if entry else None,
                agreement=entry["to_teacher"]["top1_agreement"] if entry else None,
                num_parameters=entry["num_parameters"] if entry else None,
                files=_files(stages.get("export-student"), name),
                cost=costs.get(name),
                stopped=stops.get(name, ""),
            )
        )
    return in_order(found)


def in_order(found: Sequence[Candidate]) -> list[Candidate]:
    """Best first, those that were not judged last."""
    return sorted(found, key=lambda one: (one.top1 is None, -(one.top1 or 0.0), one.name))


def _files(edge: dict[str, Any] | None, student: str) -> tuple[EdgePoint, ...]:
    files = [file for file in edge["files"] if file["student"] == student] if edge else []
    recommended = edge.get("recommended", {}).get(student, {}).get("path") if edge else None  # older runs name none
    return tuple(
        EdgePoint(
            kind=f["kind"], runtime=f.get("runtime", "onnxruntime"), latency_ms=f["latency_p50_ms"], size_bytes=f["size_bytes"],
            top1=f["top1"], shipped=f["shipped"], recommended=f["path"] == recommended,
        )
        for f in files
    )  # fmt: skip


def costs_of(train: dict[str, Any]) -> dict[str, Cost]:
    """Student -> its cost."""
    each = of_each_student(train["totals"])
    whole = sum(counts["images"] for counts in each.values()) or 1.0
    return {
        name: Cost(
            images=counts["images"],
            stream_share=counts["images"] / whole,
            step_seconds=counts["seconds"] * train.get("num_workers", 1),  # runs of an earlier version do not say
            teacher_calls=train["totals"]["asked"] * counts["images"] / whole,
            label_bytes=train["store"]["size_bytes"] * counts["images"] / whole,
        )
        for name, counts in each.items()
    }


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Positions of the (cost, worth) pairs that no other beats: none is at most as dear and worth more, or cheaper and worth as much.

    In the order of cost. Of equal pairs the first is taken.
    """
    front: list[int] = []
    for position in sorted(range(len(points)), key=lambda n: (points[n][0], -points[n][1], n)):
        if not front or points[position][1] > points[front[-1]][1]:
            front.append(position)
    return front
