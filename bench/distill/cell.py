"""One arm measured once, in a process of its own: `python -m bench.distill.cell PREPARED ARM [--steps N]` prints one JSON line.

Our arms are the product: `train_worker` in a `LocalWorker`, with its stream, its store and its real clients; what is measured are the rows
that the worker posts anyway. The control `pure` is a plain loop as one would write it without us.

Measured is the time between the first row after the warm-up and the first row at or after the last step; the epoch goes on for as many
steps as a stream may be ahead, and is then given up, so that no step is free because its crops and labels were made before the clock began.

Unit of data: one `Cell`. Shapes: B images, K classes.
"""

from __future__ import annotations

import asyncio
import json
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import torch.nn.functional as F

from bench.distill.answers import load_answers
from bench.distill.cases import TEACHER, Prepared
from bench.distill.stand_in import Running, stand_in
from bench.serving.load import cpu_seconds
from distill.cluster.worker import LocalWorker, Row
from distill.models.classifier import build_classifier
from distill.models.settings import NetworkSettings
from student_trainer.job import TrainJob
from student_trainer.worker import train_worker
from teacher_server.address import open_teacher
from teacher_server.serve import open_backend
from teacher_server.settings import ServerSettings

Cell = dict[str, Any]
CAPACITY = 20_000.0
"""Images a second of the teacher elsewhere: more than any student here can take."""


class Enough(Exception):
    """All steps that are measured are done."""


class Meter:
    """Takes the time, the CPU seconds and the losses of a loop that tells it each step, or some of them.

    Args:
        warmup, last: steps between which is measured.
        batch: images of a step.
        pids: further processes whose CPU time counts as the arm's; their children too.
    """

    def __init__(self, warmup: int, last: int, batch: int, stand_in: Running | None = None, pids: list[int] | None = None) -> None:
        self.warmup, self.last, self.batch, self.stand_in, self.pids = warmup, last, batch, stand_in, pids or []
        self.points: list[tuple[int, float, float, float]] = []
        self.losses: list[tuple[int, float]] = []
        """(steps done, loss of the last of them)."""
        self.asked = 0.0

    def tell(self, step: int, loss: float) -> None:
        """`step` steps are done.

        Raises:
            Enough: they are enough.
        """
        self.losses.append((step, loss))
        elsewhere = self.stand_in.cpu_s() if self.stand_in else 0.0
        if step < self.warmup or (self.points and step < self.last):
            return
        self.points.append((step, time.perf_counter(), cpu_seconds(self.pids), elsewhere))
        if step >= self.last:
            raise Enough

    def tell_row(self, row: Row) -> None:
        """A row of the product's worker."""
        if row["kind"] == "step":
            self.asked = float(row.get("totals", {}).get("asked", 0))
            loss = next(iter(row["losses"].values()))  # all students that are measured are alike
            self.tell(row["step"], float("nan") if loss is None else loss)

    def cell(self) -> Cell:
        """What came out.

        Raises:
            RuntimeError: nothing was measured, or the loss is not finite.
        """
        losses = [loss for _, loss in self.losses]
        if len(self.points) < 2 or not np.isfinite(losses).all():
            raise RuntimeError(f"no measurement: {len(self.points)} points, losses {losses[:3]} ... {losses[-3:]}")
        (first, began, cpu_before, elsewhere_before), (last, ended, cpu, elsewhere) = self.points[0], self.points[-1]
        images = (last - first) * self.batch
        return {
            "images_per_s": images / (ended - began),
            "images": images,
            "cpu_ms_per_image": 1000 * (cpu - cpu_before) / images,
            "stand_in_cpu_ms_per_image": 1000 * (elsewhere - elsewhere_before) / images,
            "losses": [(step, round(loss, 5)) for step, loss in self.losses],
            "asked": self.asked,
            "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }


def pure(prepared: Prepared, steps: int) -> Cell:
    """The control: the same crops and the same student, the teacher's logits ready in memory, a plain loop."""
    case = prepared.case
    settings = prepared.train().students[0].optimizer
    torch.manual_seed(0)
    network = build_classifier(NetworkSettings(name=f"timm:{case.student}"), case.num_classes, case.preprocessing)
    device = torch.device(case.device)
    network = network.to(device, memory_format=torch.channels_last)
    parameters = list(network.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(groups, lr=settings.learning_rate, momentum=settings.momentum, nesterov=True)
    logits_SBK = torch.from_numpy(load_answers(prepared.answers).logits_SBK)
    meter = Meter(case.warmup, steps, case.batch)
    network.train()
    try:
        for step, batch in enumerate(prepared.crops()):
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * settings.schedule_at(step, case.num_steps)
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
                student_BK = network(torch.from_numpy(batch.crops_VBHWC[0]).to(device)).float()
            teacher_BK = logits_SBK[step].to(device)
            loss = -(F.softmax(teacher_BK, dim=1) * F.log_softmax(student_BK, dim=1)).sum(dim=1).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            meter.tell(step + 1, loss.item())
    except Enough:
        pass
    return meter.cell()


def teacher(prepared: Prepared, steps: int) -> Cell:
    """The teacher alone in the product's embedded engine, one batch after another: t_T of the formula for several students."""
    batches = [np.ascontiguousarray(batch.crops_VBHWC[0]) for _, batch in zip(range(4), prepared.crops(), strict=False)]
    meter = Meter(2, steps, prepared.case.batch)

    async def ask() -> None:
        backend = open_teacher(prepared.embedded)
        try:
            for step in range(steps):
                await backend.logits(batches[step % len(batches)])
                meter.tell(step + 1, 0.0)
        finally:
            await backend.close()

    with suppress(Enough):
        asyncio.run(ask())
    return meter.cell()


def _train(prepared: Prepared, job: TrainJob, on_row: Callable[[Row], None], folder: Path) -> None:
    with suppress(Enough):
        train_worker(job.model_dump(mode="json"), LocalWorker(folder, on_row, torch.device(prepared.case.device)))


def live(prepared: Prepared, steps: int, latency_s: float) -> Cell:
    """Every label asked of a teacher on hardware of its own, simulated."""
    case = prepared.case
    with _scratch(prepared) as folder, stand_in(prepared.answers, prepared.info, latency_s, CAPACITY) as away:
        meter = Meter(case.warmup, steps, case.batch, away)
        _train(prepared, prepared.job(folder, away.address, folder / "store", prepared.train()), meter.tell_row, folder)
    return meter.cell()


def embedded(prepared: Prepared, steps: int, num_students: int = 1) -> Cell:
    """Every label asked of the real teacher, ONNX Runtime in this process."""
    case = prepared.case
    with _scratch(prepared) as folder:
        meter = Meter(case.warmup, steps, case.batch)
        train = prepared.train(num_students=num_students)
        _train(prepared, prepared.job(folder, prepared.embedded, folder / "store", train), meter.tell_row, folder)
    return meter.cell()


def triton(prepared: Prepared, steps: int) -> Cell:
    """Every label asked of the real Triton on the same cores, over gRPC."""
    case, settings = prepared.case, ServerSettings(backend="triton", port=0, auth="none")
    with _scratch(prepared) as folder, open_backend(settings, prepared.repository, TEACHER, folder) as served:
        meter = Meter(case.warmup, steps, case.batch, pids=_children())
        _train(prepared, prepared.job(folder, served.address, folder / "store", prepared.train()), meter.tell_row, folder)
    return meter.cell()


def store(prepared: Prepared, steps: int, crops_per_decode: int = 1) -> Cell:
    """All labels read from the store, which an earlier run over the same stream filled."""
    case, train = prepared.case, prepared.train(crops_per_decode=crops_per_decode)
    filled = prepared.folder / f"store-{crops_per_decode}"
    if not (filled / "filled").exists():
        _fill(prepared, filled, crops_per_decode)
    with _scratch(prepared) as folder:
        meter = Meter(case.warmup, steps, case.batch)
        _train(prepared, prepared.job(folder, prepared.embedded, filled, train), meter.tell_row, folder)
    if meter.asked:
        raise RuntimeError(f"{meter.asked} labels were not in the store {filled}")
    return meter.cell()


def _fill(prepared: Prepared, filled: Path, crops_per_decode: int) -> None:
    """One epoch against the stand-in."""
    shutil.rmtree(filled, ignore_errors=True)
    train = prepared.train(crops_per_decode=crops_per_decode)
    with _scratch(prepared) as folder, stand_in(prepared.answers, prepared.info, 0.0, CAPACITY) as away:
        # Several crops a decode are several epochs; only the first is needed. Its end is told when its labels are committed.
        job = prepared.job(folder, away.address, filled, train.replace(num_evaluations=train.epochs))
        _train(prepared, job, _end_of_epoch, folder)
    (filled / "filled").touch()


def _end_of_epoch(row: Row) -> None:
    if row["kind"] == "epoch":
        raise Enough


@contextmanager
def _scratch(prepared: Prepared) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="cell-", dir=prepared.folder) as folder:
        yield Path(folder)


def _children() -> list[int]:
    import psutil

    return [child.pid for child in psutil.Process().children()]


ARMS: dict[str, Callable[[Prepared, int], Cell]] = {
    "pure": pure,
    "live20": lambda prepared, steps: live(prepared, steps, 0.020),
    "live50": lambda prepared, steps: live(prepared, steps, 0.050),
    "live200": lambda prepared, steps: live(prepared, steps, 0.200),
    "store": store,
    "crops": lambda prepared, steps: store(prepared, steps, prepared.case.crops_per_decode),
    "teacher": teacher,
    "embedded": embedded,
    "triton": triton,
    "students": lambda prepared, steps: embedded(prepared, steps, prepared.case.num_students),
}
SLOW = ("teacher", "embedded", "triton", "students", "inline", "timm", "torchdistill")
"""The teacher computes on the same cores."""


def steps_of(prepared: Prepared, arm: str) -> int:
    """Steps that are measured of an arm, those of the warm-up included: the same for all that are compared."""
    return prepared.case.slow_steps if arm in SLOW else prepared.case.steps


@click.command()
@click.argument("prepared_json")
@click.argument("arm", type=click.Choice(list(ARMS)))
def main(prepared_json: str, arm: str) -> None:
    """Measure one arm once."""
    prepared = Prepared.from_json(prepared_json)
    torch.set_num_threads(prepared.threads)
    print(json.dumps(ARMS[arm](prepared, steps_of(prepared, arm))), flush=True)


if __name__ == "__main__":
    main()
