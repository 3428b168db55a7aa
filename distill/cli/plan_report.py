"""A capacity plan as data and as tables, and beside what a finished run did.

Unit of data: one `CapacityPlan`; one `Compared` for each number that was predicted.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.table import Table

from distill.cli.plan_measure import Measurements
from distill.cli.run import Run
from distill.config import Section, validate
from distill.errors import StageMissing
from distill.progress import console, duration
from student_trainer.capacity import MOST_IDLE, Needs, Prediction, StageRates, Way, Work
from student_trainer.capacity_scale import Quantity
from student_trainer.pipeline_simulation import NO_LIMIT

_WAYS_OUT = {
    "store": "labels are encoded and kept more slowly than students train; give the store a faster disk, or take more student workers",
    "in flight": (
        "too few batches are with the teacher for its latency; raise train.requests_in_flight or train.global_batch,"
        " or bring the teacher nearer"
    ),
}
_VARIATION = "no station is too slow on its own, but the times vary more than so few batches ahead even out; raise train.requests_in_flight"


class CapacityPlan(Section):
    """What `distill plan` found."""

    work: Work
    rates: StageRates
    measured: Measurements | None
    """None where all rates were given."""
    assumptions: list[str]
    needs: Needs
    ways: list[Way]
    traffic: list[Quantity]
    memory: list[Quantity]
    growth: list[Quantity]
    prediction: Prediction | None
    """Of the run as the run file has it, on this machine as busy as it was; None where nothing was measured."""
    undisturbed: Prediction | None = None
    """The same if the run had the machine to itself."""


class Compared(Section):
    """One number."""

    what: str
    predicted: float
    """With the machine as busy as it was while it was measured."""
    undisturbed: float | None
    """With the machine to itself."""
    actual: float

    @property
    def ratio(self) -> float | None:
        """Predicted over actual."""
        return self.predicted / self.actual if self.actual else None


def read_plan(path: Path) -> CapacityPlan:
    """A plan that was kept.

    Raises:
        StageMissing: there is none.
        ConfigError: it is of another version of this command.
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StageMissing(f"there is no plan at {path}; make it with `distill plan` before the run") from error
    return validate(CapacityPlan, tree, origin=str(path))


def compared(plan: CapacityPlan, result: dict[str, Any]) -> list[Compared]:
    """The plan's prediction beside a finished training's totals.

    Raises:
        StageMissing: the plan predicts nothing, because nothing was measured for it.
    """
    predicted = plan.prediction
    if predicted is None:
        raise StageMissing("this plan was made of given rates only and predicts no run; make one that measures")
    totals, store = result["totals"], result["store"]
    waited = sum(totals[name] for name in predicted.waits)
    done = {
        "seconds": totals["seconds"],
        "images/s": totals["images"] / totals["seconds"],
        "images": totals["images"],
        "labels asked for": totals["asked"],
        "labels from the store": totals["from_store"],
        "bytes a label": store["size_bytes"] / max(1, store["num_labels"]),
        "seconds outside the stream (evaluations)": totals["seconds"] - waited,
        **{f"share of the stream's time: {name}": totals[name] / waited for name in predicted.waits},
    }
    first, second = _numbers(predicted), _numbers(plan.undisturbed) if plan.undisturbed else {}
    return [Compared(what=what, predicted=first[what], undisturbed=second.get(what), actual=actual) for what, actual in done.items()]


def _numbers(prediction: Prediction) -> dict[str, float]:
    return {
        "seconds": prediction.seconds,
        "images/s": prediction.images_per_s,
        "images": prediction.images,
        "labels asked for": prediction.asked,
        "labels from the store": prediction.from_store,
        "bytes a label": prediction.label_bytes,
        "seconds outside the stream (evaluations)": prediction.evaluation_s,
        **{f"share of the stream's time: {name}": share for name, share in prediction.waits.items()},
    }


def compared_table(rows: list[Compared]) -> Table:
    """Predicted, actual, ratio."""
    table = _table("predicted and done", "", "predicted", "with the machine to itself", "done", "predicted / done")
    for row in rows:
        free = "-" if row.undisturbed is None else _number(row.undisturbed)
        table.add_row(row.what, _number(row.predicted), free, _number(row.actual), "-" if row.ratio is None else f"{row.ratio:.2f}")
    return table


def assumptions(run: Run, rates: StageRates, measured: Measurements | None, options: dict[str, Any]) -> list[str]:
    """What the numbers rest on."""
    said = []
    given = [name for name in ("teacher_rate", "decode_rate", "student_rate", "label_bytes", "image_bytes") if options[name]]
    if measured is not None:
        said += [
            f"rates were measured on this machine, each station alone: {measured.cores} cores, load {measured.load:.1f} before, students on"
            f" {measured.device}; the busiest station got {measured.cores_had:.1f} cores",
            "one teacher instance is the service as server.* and teacher.repository have it, asked with"
            f" {run.file.train.requests_in_flight} batches of {run.file.train.global_batch} under way",
        ]
        if measured.rates.decode_scaling < 0.95:
            said.append(f"{run.file.data.num_threads} decode threads are {measured.rates.decode_scaling:.0%} of so many times one")
    if given:
        said.append(f"given, not measured: {', '.join(given)}")
    if measured is None and not options["label_bytes"]:
        said.append(f"a label takes {rates.label_bytes:.0f} bytes (fp16 logits, the most there is); measured ones are mostly smaller")
    said += [
        "rates add up: n teachers do n times what one does, and workers lose nothing to the exchange of gradients",
        "a worker trains its students one after the other; decode threads run on its host and cost nothing of their own",
        f'"nobody waits": a worker waits for less than {MOST_IDLE:.0%} of its time; service times vary by 20 %, training steps by 2 %',
        "the ways are closed forms: the slowest station of each phase, as if nothing varied",
        "made ahead: only the teachers are paid for while they label; asked while training: teachers only as long as labels are asked for",
        "inline: the teacher as fast on a student's device, asked in every epoch, no labels kept, nobody waits for decoding",
        "not counted: starting workers, checkpoints, failures, limits of the network; evaluations only in the prediction of this run",
    ]
    if run.file.train.compile_backend:
        said.append("students were measured without train.compile_backend")
    return said


def print_plan(plan: CapacityPlan) -> None:
    """All tables."""
    console.print(_rates_table(plan))
    if plan.measured is not None:
        table = _table("the teacher", "crops a request", "under way", "images/s", "p50 ms", "p99 ms")
        for row in plan.measured.teacher:
            table.add_row(str(row.batch), str(row.under_way), f"{row.images_per_s:.0f}", f"{row.p50_ms:.1f}", f"{row.p99_ms:.1f}")
        console.print(table)
    found = plan.needs
    waits = ", ".join(f"{name} {share:.0%}" for name, share in found.waits.items() if name != "student" and share >= 0.005) or "nobody"
    heading = "so that nobody waits" if found.converged else "as many as are of use"
    console.print(
        f"[bold]{heading}[/bold]: {found.student_workers} student worker(s), {found.teachers} teacher(s),"
        f" {found.decode_threads} decode thread(s) a worker: {found.images_per_s:.0f} images/s simulated (waits: {waits}),"
        f" {min(found.bounds.values()):.0f} by the slowest station alone"
    )
    if not found.converged:
        console.print(f"[bold]somebody waits whatever there is[/bold]: {_WAYS_OUT.get(found.limited_by, _VARIATION)}")
    console.print(_ways_table(plan))
    for title, rows in (("network and store", plan.traffic), ("memory of one worker", plan.memory), ("what grows", plan.growth)):
        console.print(_quantities(title, rows))
    if plan.prediction is not None:
        console.print("[bold]this run on this machine[/bold]")
        console.print(f"  as busy as it was while measuring: {_predicted(plan.prediction)}")
    if plan.undisturbed is not None:
        console.print(f"  with the machine to itself: {_predicted(plan.undisturbed)}")
    console.print("[bold]assumptions[/bold]")
    for line in plan.assumptions:
        console.print(f"  - {line}", markup=False)


def _rates_table(plan: CapacityPlan) -> Table:
    rates, work = plan.rates, plan.work
    title = f"{work.images:,} images, {work.epochs} epochs, {work.views} views: {work.trained:,} images to train on, {work.asked:,} labels"
    table = _table(title, "station", "images/s", "core-ms an image")
    rows = [
        ("one decode thread", rates.decode, rates.decode_core_s),
        ("one teacher", rates.teacher, rates.teacher_core_s),
        *((f"student {name}", rate, None) for name, rate in rates.students.items()),
        ("all students, one worker", rates.all_students, rates.student_core_s),
        ("encode and keep labels", rates.keep, rates.keep_core_s),
        ("read labels", rates.read, rates.read_core_s),
    ]
    for name, rate, core_s in rows:
        table.add_row(name, _number(rate), "-" if core_s is None else f"{1000 * core_s:.3f}")
    return table


def _ways_table(plan: CapacityPlan) -> Table:
    priced = plan.ways[0].cost is not None
    headings = ["way", "time", "images/s", "device-hours", *(["cost"] if priced else []), "phases"]
    table = _table("ways", *headings)
    for way in plan.ways:
        phases = "; ".join(f"{p.name} {duration(p.seconds)}, {p.devices} device(s), {p.limited_by}" for p in way.phases)
        cost = [f"{way.cost:,.2f}"] if way.cost is not None else []
        table.add_row(way.name, duration(way.seconds), f"{way.images_per_s:.0f}", f"{way.device_hours:,.2f}", *cost, phases)
    return table


def _quantities(title: str, rows: list[Quantity]) -> Table:
    table = _table(title, "", "", "")
    for row in rows:
        table.add_row(row.what, _with_unit(row.value, row.unit), f"too much: {row.way_out}" if row.bites else "")
    return table


def _predicted(prediction: Prediction) -> str:
    waits = ", ".join(f"{name} {share:.0%}" for name, share in prediction.waits.items())
    return (
        f"{duration(prediction.seconds)} in the training loop,"
        f" {prediction.images_per_s:.0f} images/s ({prediction.asking_rate:.0f} while asking, {prediction.reading_rate:.0f} later,"
        f" {duration(prediction.evaluation_s)} of evaluations); limited by {prediction.limited_by}; a worker's time: {waits}"
    )


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title, title_justify="left", show_header=any(headings))
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="left" if number == 0 or heading in ("", "phases") else "right")
    return table


def _number(value: float) -> str:
    if value >= NO_LIMIT:
        return "no limit"
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def _with_unit(value: float, unit: str) -> str:
    if unit == "s":
        return duration(value)
    if not unit.startswith("bytes"):
        return f"{value:,.0f}"
    for scale, name in ((1e15, "PB"), (1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= scale:
            return f"{value / scale:.3g} {name}{unit.removeprefix('bytes')}"
    return f"{value:.0f} B{unit.removeprefix('bytes')}"
