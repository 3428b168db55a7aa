"""What `distill plan` measures on this machine, with the run's own teacher, students and images: each station alone, some seconds each.

Flow: a run -> decoding, the teacher, the students, the labels, one after the other -> `StageRates`.
Unit of data: one station: images by wall-clock seconds, and by core-seconds of this process and its children (Triton among them).
"""

from __future__ import annotations

import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from distill.cli.run import Run
from distill.config import Section
from distill.errors import ConfigError
from distill.loader import CropBatch, CropLoader
from distill.progress import console
from distill.rejections import RejectionLog
from student_trainer.capacity import StageRates
from student_trainer.job import TrainJob
from teacher_server.address import TeacherAddress, open_teacher
from teacher_server.backend import TeacherBackend

if TYPE_CHECKING:
    from torch import Tensor

    from student_trainer.loss import Lesson

_MIN_ROUNDS = 3
_WARM_UP_STEPS = 3
_MANY_STEPS = 10**6
_SAMPLE_IMAGES = 1024
"""Labels that are encoded and kept to measure their size."""


class TeacherAtBatch(Section):
    """One row: the teacher asked for so many crops at once."""

    batch: int
    under_way: int
    """Requests at once."""
    images_per_s: float
    p50_ms: float
    p99_ms: float


class Measurements(Section):
    """What was found, and how long it took."""

    rates: StageRates
    teacher: list[TeacherAtBatch]
    seconds: float
    cores: int
    """Cores that this process may use."""
    load: float
    """Load average of the last minute, before measuring: other work on the machine makes every rate smaller."""
    cores_had: float
    """Most cores that one station kept busy."""
    device: str
    """Where the students ran."""


@dataclass
class _Meter:
    """What one station did in how much time."""

    count: int = 0
    """Images."""
    wall_s: float = 0.0
    core_s: float = 0.0
    batches: list[CropBatch] = field(default_factory=list)
    """Of decoding: the first ones."""

    @property
    def rate(self) -> float:
        """Images a second."""
        return self.count / self.wall_s

    @property
    def core_s_each(self) -> float:
        """Core-seconds an image."""
        return self.core_s / self.count


@contextmanager
def metered(meter: _Meter) -> Iterator[None]:
    """Add what the block takes."""
    wall, cores = time.perf_counter(), cpu_seconds()
    yield
    meter.wall_s += time.perf_counter() - wall
    meter.core_s += cpu_seconds() - cores


def cpu_seconds() -> float:
    """Core-seconds of this process and of all that descend from it and still run; of this process alone where there is no /proc."""
    parents, used = {}, {}
    try:
        entries = [entry for entry in os.listdir("/proc") if entry.isdigit()]
    except OSError:
        return time.process_time()
    for entry in entries:
        try:
            fields = Path(f"/proc/{entry}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        except OSError:
            continue  # ended while we looked
        parents[int(entry)], used[int(entry)] = int(fields[1]), int(fields[11]) + int(fields[12])
    ours, own = set[int](), os.getpid()
    for pid in used:
        chain, at = [], pid
        while at and at != own and at not in ours:
            chain.append(at)
            at = parents.get(at, 0)
        if at:
            ours.update(chain)
    ours.discard(own)
    return time.process_time() + sum(used[pid] for pid in ours) / os.sysconf("SC_CLK_TCK")


def measure(run: Run, address: TeacherAddress, seconds: float) -> Measurements:
    """Each station alone, about `seconds` each.

    Raises:
        DistillError: what opening the images, asking the teacher and building the students raise.
    """
    started, load = time.monotonic(), os.getloadavg()[0]
    job = run.distill_job(address, run.teacher, run.file.train)
    with tempfile.TemporaryDirectory() as scratch:
        found, meters = _stations(run, job, seconds, Path(scratch))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    had = max(meter.core_s / meter.wall_s for meter in meters)
    return Measurements(seconds=time.monotonic() - started, cores=cores, load=load, cores_had=had, **found)


def _stations(run: Run, job: TrainJob, seconds: float, scratch: Path) -> tuple[dict[str, Any], list[_Meter]]:
    rejections = RejectionLog(scratch / "rejected.jsonl", 1.0)
    threads = job.data.num_threads
    together = _decode(job, rejections, seconds, threads)
    alone = together if threads == 1 else _decode(job, rejections, seconds, 1)
    batches = together.batches
    _say(f"1 of 4, decoding: {together.rate:.0f} images/s in {threads} threads")
    crops_BHWC = np.concatenate([batch.crops_VBHWC[0] for batch in batches])
    asking, table, latency_s, logits_NK = asyncio.run(_teacher(job, crops_BHWC, seconds))
    _say(f"2 of 4, the teacher: {asking.rate:.0f} images/s")
    students, training, forward_s, device = _students(run, job, crops_BHWC, logits_NK, seconds)
    _say(f"3 of 4, the students: {training.rate:.0f} images/s, one after the other")
    kept = _labels(job, batches, logits_NK, scratch)
    _say(f"4 of 4, labels: {kept['label_bytes']:.0f} bytes each")
    encoded = statistics.fmean(len(record.data) for record in job.open_images().read_shard(0))
    rates = StageRates(
        teacher=asking.rate,
        teacher_latency_s=latency_s,
        decode=alone.rate,
        decode_scaling=min(1.0, together.rate / (threads * alone.rate)),
        students=students,
        evaluation=1 / (forward_s + len(students) * _test_decode_s(job, scratch)),
        teacher_core_s=asking.core_s_each,
        decode_core_s=together.core_s_each,
        student_core_s=training.core_s_each if device == "cpu" else None,
        crop_bytes=float(crops_BHWC[0].nbytes),
        answer_bytes=4.0 * logits_NK.shape[1],
        encoded_bytes=encoded,
        **kept,
    )
    return {"rates": rates, "teacher": table, "device": device}, [together, asking, training]


def _say(what: str) -> None:
    console.print(f"  measured {what}")


def _decode(job: TrainJob, rejections: RejectionLog, seconds: float, threads: int) -> _Meter:
    """Read, decode and crop the run's images in its own order; the first batches are kept."""
    images, meter = job.open_images(), _Meter()
    loader = CropLoader(
        images, job.recipe, replace(job.loading(images), num_threads=threads), lambda epoch: (epoch % job.train.num_views,), rejections
    )
    epoch, views = 0, max(job.epochs, 1)
    while meter.wall_s < seconds:
        batches = iter(loader.epoch(epoch % views))
        _keep(meter, next(batches))  # not measured: the threads start, the first shard is opened
        with metered(meter):
            until = time.perf_counter() + seconds - meter.wall_s
            for batch in batches:
                meter.count += len(batch.image_ids)
                _keep(meter, batch)
                if time.perf_counter() > until:
                    break
        if isinstance(batches, Generator):
            batches.close()
        epoch += job.train.crops_per_decode
        if meter.count == 0:
            raise ConfigError("one epoch is one batch: there are too few images to measure with; make train.global_batch smaller")
    return meter


def _keep(meter: _Meter, batch: CropBatch) -> None:
    if sum(len(kept.image_ids) for kept in meter.batches) < _SAMPLE_IMAGES:
        meter.batches.append(batch)


async def _teacher(
    job: TrainJob, crops_BHWC: npt.NDArray[np.uint8], seconds: float
) -> tuple[_Meter, list[TeacherAtBatch], float, npt.NDArray[np.float32]]:
    """(at the run's own batch, a row for each batch size, latency beside the work in s, logits of all crops)."""
    assert job.teacher is not None
    teacher = open_teacher(job.teacher)
    own = min(job.train.global_batch, len(crops_BHWC))
    try:
        logits_NK = np.concatenate([await teacher.logits(part) for part in np.array_split(crops_BHWC, -(-len(crops_BHWC) // 64))])
        rows = [(await _ask_for(teacher, crops_BHWC, size, 2, seconds / 4))[0] for size in (1, 8, 32) if size < own]
        alone, _ = await _ask_for(teacher, crops_BHWC, own, 1, seconds / 4)
        busy, meter = await _ask_for(teacher, crops_BHWC, own, job.train.requests_in_flight, seconds)
    finally:
        await teacher.close()
    return meter, [*rows, alone, busy], max(0.0, alone.p50_ms / 1000 - own / busy.images_per_s), logits_NK


async def _ask_for(
    teacher: TeacherBackend, crops_BHWC: npt.NDArray[np.uint8], batch: int, under_way: int, seconds: float
) -> tuple[TeacherAtBatch, _Meter]:
    latencies: list[float] = []
    meter = _Meter()
    until = time.perf_counter() + seconds

    async def ask(first: int) -> None:
        while time.perf_counter() < until or len(latencies) < _MIN_ROUNDS:
            first = (first + batch) % max(1, len(crops_BHWC) - batch + 1)
            asked = time.perf_counter()
            await teacher.logits(crops_BHWC[first : first + batch])
            latencies.append(time.perf_counter() - asked)

    with metered(meter):
        await asyncio.gather(*(ask(number * batch) for number in range(under_way)))
    meter.count = batch * len(latencies)
    p50, p99 = (1000 * float(np.quantile(latencies, share)) for share in (0.5, 0.99))
    return TeacherAtBatch(batch=batch, under_way=under_way, images_per_s=meter.rate, p50_ms=p50, p99_ms=p99), meter


def _students(
    run: Run, job: TrainJob, crops_BHWC: npt.NDArray[np.uint8], logits_NK: npt.NDArray[np.float32], seconds: float
) -> tuple[dict[str, float], _Meter, float, str]:
    """(images a second of each student, all of them, seconds that all take to look at a test image, device)."""
    import torch

    from distill.devices import best_device
    from distill.evaluation import network_logits
    from student_trainer.students import new_students

    device = best_device() if run.file.ray.use_gpu else torch.device("cpu")
    batch = min(len(crops_BHWC), max(2, job.train.global_batch // run.file.ray.num_workers))
    students = new_students(job, device, job.train.global_batch)
    lesson = _lesson(job, torch.from_numpy(crops_BHWC[:batch]).to(device), torch.from_numpy(logits_NK[:batch]).to(device))
    took: dict[str, list[float]] = {student.settings.name: [] for student in students}
    meter = _Meter()

    def step(number: int) -> None:
        for student in students:
            started = time.perf_counter()
            student.step(lesson, job.train, number, _MANY_STEPS)
            took[student.settings.name].append(time.perf_counter() - started)

    threads = torch.get_num_threads()
    torch.set_num_threads(run.file.ray.threads)
    try:
        for number in range(_WARM_UP_STEPS):  # memory is allocated, kernels are chosen
            step(number)
        with metered(meter):
            until = time.perf_counter() + seconds
            while time.perf_counter() < until or meter.count < _MIN_ROUNDS * batch:
                step(_WARM_UP_STEPS)
                meter.count += batch
        forward_s = sum(_forward_s(network_logits(student.judged), crops_BHWC[:batch]) for student in students)
    finally:
        torch.set_num_threads(threads)
    return {name: batch / statistics.fmean(times[_WARM_UP_STEPS:]) for name, times in took.items()}, meter, forward_s, device.type


def _lesson(job: TrainJob, crops_BHWC: Tensor, logits_BK: Tensor) -> Lesson:
    """As large as a real one: below alpha 1 labelled images are beside the teacher's."""
    import torch

    from student_trainer.loss import Lesson

    if not job.mixes_labels:
        return Lesson(crops_BHWC, logits_BK)
    labelled_BHWC = crops_BHWC[: job.train.labelled_batch or len(crops_BHWC)]
    labels_L = torch.zeros(len(labelled_BHWC), dtype=torch.int64, device=crops_BHWC.device)
    return Lesson(torch.cat([crops_BHWC, labelled_BHWC]), logits_BK, labels_L)


def _forward_s(predict: Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.float32]], crops_BHWC: npt.NDArray[np.uint8]) -> float:
    """Seconds a crop, the best of some times: evaluations are too short to be measured for long."""
    took = []
    for _ in range(_MIN_ROUNDS):
        started = time.perf_counter()
        predict(crops_BHWC)
        took.append(time.perf_counter() - started)
    return min(took) / len(crops_BHWC)


def _test_decode_s(job: TrainJob, scratch: Path) -> float:
    """Seconds a test image is decoded in, with the run's threads, the best of some times."""
    from distill.evaluation import evaluation_batches
    from distill.image_sets import open_labelled

    test, took = open_labelled(job.data.test, job.data), []
    rejections = RejectionLog(scratch / "rejected-test.jsonl", 1.0)
    for _ in range(_MIN_ROUNDS):
        started, count = time.perf_counter(), 0
        for batch in evaluation_batches(test, job.data, rejections):
            count += len(batch.image_ids)
            if count >= _SAMPLE_IMAGES:
                break
        took.append((time.perf_counter() - started) / max(1, count))
    rejections.close()
    return min(took)


def _labels(job: TrainJob, batches: list[CropBatch], logits_NK: npt.NDArray[np.float32], scratch: Path) -> dict[str, float]:
    """Sizes and rates of labels in a store of their own."""
    from distill.soft_labels import encode
    from student_trainer.store import SoftLabelStore

    assert job.store_identity is not None
    store = SoftLabelStore(scratch / "store", job.store_identity)
    keeping, reading = _Meter(), _Meter()
    ids = [image_id for batch in batches for image_id in batch.image_ids]
    ids.sort()  # as neighbours in a shard, whose ids share most of their letters
    count, rules = len(ids), job.rules
    keeping.count = reading.count = count
    with metered(keeping):
        records = encode(logits_NK, rules.temperatures, rules.max_tv)
        store.commit(0, 0, list(range(count)), ids, records, rules.temperatures)
    with metered(reading):
        store.read(0, 0, rules.temperature, rules.max_tv)
    manifest = sum(path.stat().st_size for path in (scratch / "store").glob("manifest*") if path.is_file())
    return {
        "label_bytes": store.stats().size_bytes / count,
        "manifest_bytes": float(manifest or 300),
        "keep": keeping.rate,
        "read": reading.rate,
        "keep_core_s": keeping.core_s_each,
        "read_core_s": reading.core_s_each,
    }
