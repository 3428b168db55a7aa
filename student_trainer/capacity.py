"""How many teachers, decode threads and student workers a distillation needs, how long it takes and what it costs: arithmetic on rates.

Flow: `StageRates` (measured, or given) + `Work` (images, epochs, views) -> `needs` (devices so that nobody waits) -> `ways` (labels asked
while training, labels made ahead, the teacher inside the training loop on the same devices). `capacity_scale` has the bytes: network,
store, memory, and what grows too large at billions of images. `predict` is for one machine whose cores all stations share.

Unit of data: one image in one epoch. Rates in images a second, sizes in bytes. Sources: the bottleneck law and Little's law (Lazowska et
al., Quantitative System Performance, 1984); the waits come from `pipeline_simulation`.
"""

from __future__ import annotations

import math

from pydantic import Field

from distill.config import Section
from student_trainer.pipeline_simulation import NO_LIMIT, Pipeline, bounds, simulate

MOST_IDLE = 0.05
"""Share of its time that a student worker may wait: "nobody waits"."""
MESSAGE_BYTES = 1_200_000
"""Crops in one message to a teacher; the teacher's clients cut batches so."""
_MOST_STEPS = 40
_IDLE_STEPS = 6
"""So many times in a row more devices may bring less than `_WORTH_MORE`: then it is not they that are waited for."""
_WORTH_MORE = 0.01
_MOST_PARTS = 16
"""In the simulation a batch has no more messages than this: more change nothing but the time that it takes."""
_BATCHES = 150


class StageRates(Section):
    """What one of each can do. `*_core_s` are core-seconds an image; None where they are not known (a rate given by hand, or a teacher on
    another machine)."""

    teacher: float = Field(gt=0)
    """Images a second of one teacher instance, busy."""
    teacher_latency_s: float = Field(default=0.0, ge=0)
    """Of a request beside the teacher's work."""
    decode: float = Field(gt=0)
    """Images a second of one thread: read, decode, crop."""
    decode_scaling: float = Field(default=1.0, gt=0)
    """Rate of `data.num_threads` threads together, over so many times that of one."""
    students: dict[str, float] = Field(min_length=1)
    """Images a second of each student on one worker's device."""
    evaluation: float | None = None
    """Test images a second of all students together, decoding included."""
    keep: float = Field(default=NO_LIMIT, gt=0)
    """Labels a second that one worker encodes and keeps."""
    read: float = Field(default=NO_LIMIT, gt=0)
    """Labels a second that one worker reads from the store."""
    teacher_core_s: float | None = None
    decode_core_s: float | None = None
    student_core_s: float | None = None
    keep_core_s: float | None = None
    read_core_s: float | None = None
    label_bytes: float = Field(gt=0)
    """Of a kept label, with its share of the file around it."""
    crop_bytes: float = Field(gt=0)
    """Of a crop on its way to the teacher."""
    answer_bytes: float = Field(gt=0)
    """Of its logits on their way back."""
    encoded_bytes: float = Field(default=0.0, ge=0)
    """Of an image file."""
    manifest_bytes: float = Field(default=450.0, gt=0)
    """Of one segment's entry in the store's manifest."""

    @property
    def all_students(self) -> float:
        """Images a second that one worker trains all students on, one after the other."""
        return 1 / sum(1 / rate for rate in self.students.values())


class Work(Section):
    """What is to be done."""

    images: int = Field(ge=1)
    epochs: int = Field(ge=1)
    views: int = Field(ge=1)
    """Different crops of an image; later epochs read labels that are there."""
    global_batch: int = Field(ge=1)
    num_classes: int = Field(ge=2)
    images_per_shard: float = Field(default=1000, ge=1)
    window_shards: int = 4
    num_threads: int = 2
    """Decode threads of a worker."""
    in_flight: int = 4
    batches_ahead: int = 4
    test_images: int = 0
    evaluations: int = 0
    """Those before the last image; the clock of a run stops there, before the last evaluation."""
    views_held: int = 8
    """(view, shard) pairs whose labels a worker holds: `LabelRules.views_held` of the job."""
    mixing_cache_bytes: float = Field(default=0.0, ge=0)
    """Of a worker's plain crops that wait for mixing; 0 where crops are not mixed."""

    @property
    def trained(self) -> int:
        """Images of all epochs; the last batch of an epoch is left out where it is not full."""
        return self.epochs * (self.images // self.global_batch) * self.global_batch

    @property
    def asked(self) -> int:
        """Labels of a training whose store is empty at first: at most every image in every view. (Each epoch leaves out other images where
        the last batch is not full, so a few labels are asked for in later epochs.)"""
        per_epoch = (self.images // self.global_batch) * self.global_batch
        return min(self.epochs, self.views) * per_epoch


class Needs(Section):
    """Devices with which no student worker waits for more than `MOST_IDLE` of its time."""

    student_workers: int
    teachers: int
    decode_threads: int
    """Of each worker."""
    images_per_s: float
    """With labels asked while training, as simulated."""
    waits: dict[str, float]
    """Shares of a worker's time, as simulated."""
    bounds: dict[str, float]
    """Most images a second of each station."""
    converged: bool = True
    """Whether that is so; else more teachers and decode threads change nothing, and these are as many as are of use."""
    limited_by: str = "student"
    """The station with the smallest bound."""


class Phase(Section):
    """A part of a way."""

    name: str
    seconds: float
    devices: int
    """Teachers and student workers that it occupies. (Decoding is on the workers' hosts.)"""
    limited_by: str
    """The station that decides how long it takes."""


class Way(Section):
    """One way to do the work."""

    name: str
    phases: list[Phase]
    seconds: float
    images_per_s: float
    """Images of all epochs over all seconds."""
    device_hours: float
    cost: float | None = None


def needs(rates: StageRates, work: Work, *, workers: int, variation: float = 0.2) -> Needs:
    """Teachers and decode threads for so many student workers.

    Begins with the closed form, then adds what the simulated workers wait for most until they wait for less than `MOST_IDLE`, or until
    more is of no use: something else (the store, batches in flight) is the slowest, or images a second rise no more. Then the fewest with
    nearly the best rate are given back, as not `converged`.
    """
    demand = workers * rates.all_students
    threads = max(1, math.ceil(rates.all_students / (rates.decode * rates.decode_scaling)))
    teachers = max(1, math.ceil(demand / rates.teacher))
    best: Needs | None = None
    idle_steps = 0
    for _ in range(_MOST_STEPS):
        pipeline = pipeline_of(rates, work, workers=workers, teachers=teachers, threads=threads, variation=variation)
        found = simulate(pipeline, num_batches=_BATCHES)
        limits = bounds(pipeline)
        tried = Needs(
            student_workers=workers,
            teachers=teachers,
            decode_threads=threads,
            images_per_s=found.images_per_s,
            waits=found.waits,
            bounds=limits,
            converged=found.waits["student"] >= 1 - MOST_IDLE,
            limited_by=_least(limits)[0],
        )
        if tried.converged:
            return tried
        if best is None or tried.images_per_s > (1 + _WORTH_MORE) * best.images_per_s:
            best, idle_steps = tried, 0
        else:
            idle_steps += 1
        if tried.limited_by in ("store", "in flight") or idle_steps >= _IDLE_STEPS:
            break
        worst = max(("decode", "teacher"), key=lambda name: found.waits[name])
        if worst == "decode":
            threads += max(1, threads // 8)
        else:
            teachers += max(1, teachers // 8)
    assert best is not None
    return best


def pipeline_of(
    rates: StageRates,
    work: Work,
    *,
    workers: int,
    teachers: int,
    threads: int,
    asks: bool = True,
    variation: float = 0.2,
    slower: float = 1.0,
) -> Pipeline:
    """The pipeline with so many of each; `slower`: every station's rate is divided by it."""
    batch = max(1, work.global_batch // workers)
    kept = rates.keep if asks else rates.read
    return Pipeline(
        workers=workers,
        batch=batch,
        decode_threads=threads,
        decode_rate=rates.decode * rates.decode_scaling / slower,
        batches_ahead=max(work.batches_ahead, threads),
        asks=asks,
        in_flight=work.in_flight,
        teachers=teachers,
        teacher_rate=rates.teacher / slower,
        part=max(min(batch, int(MESSAGE_BYTES // rates.crop_bytes)), math.ceil(batch / _MOST_PARTS), 1),
        latency_s=rates.teacher_latency_s,
        keep_rate=kept / slower,
        student_rate=rates.all_students / slower,
        variation=variation,
    )


def workers_for(rates: StageRates, work: Work, hours: float) -> int:
    """Student workers with which the training is over within so many hours, if nobody waits."""
    return max(1, math.ceil(work.trained / (rates.all_students * (1 - MOST_IDLE)) / (hours * 3600)))


def ways(rates: StageRates, work: Work, found: Needs, price_per_hour: float | None = None) -> list[Way]:
    """Live, ahead of time, and inline on as many devices. `price_per_hour` is of one device, teacher or student worker alike."""
    workers, teachers = found.student_workers, found.teachers
    decode = workers * found.decode_threads * rates.decode * rates.decode_scaling
    label = {"teacher": teachers * rates.teacher, "decode": decode, "store": workers * rates.keep}
    replay = {"student": workers * rates.all_students, "decode": decode, "store": workers * rates.read}
    everybody = workers + teachers

    def phase(name: str, images: int, devices: int, stations: dict[str, float]) -> Phase:
        station, rate = _least(stations)
        return Phase(name=name, seconds=images / rate, devices=devices, limited_by=station)

    def way(name: str, *phases: Phase) -> Way:
        seconds = sum(part.seconds for part in phases)
        hours = sum(part.seconds * part.devices for part in phases) / 3600
        cost = None if price_per_hour is None else price_per_hour * hours
        some = [part for part in phases if part.seconds > 0]
        return Way(name=name, phases=some, seconds=seconds, images_per_s=work.trained / seconds, device_hours=hours, cost=cost)

    training = phase("train", work.trained, workers, replay)
    asking = phase("ask and train", work.asked, everybody, {**replay, **label})
    made = [
        way("labels asked while training", asking, phase("train on stored labels", work.trained - work.asked, workers, replay)),
        way("labels made ahead", phase("label", work.asked, teachers, label), training),
        way("labels already there", training),
        way("inline, all students in one loop", phase("train", work.trained, everybody, {"device": everybody * _inline(rates)})),
    ]
    if len(rates.students) > 1:
        each = 1 / sum(1 / rates.teacher + 1 / rate for rate in rates.students.values())
        made.append(way("inline, one student after the other", phase("train", work.trained, everybody, {"device": everybody * each})))
    return made


def _inline(rates: StageRates) -> float:
    """Images a second of one device that runs the teacher and then all students, every epoch."""
    return 1 / (1 / rates.teacher + 1 / rates.all_students)


def _least(stations: dict[str, float]) -> tuple[str, float]:
    return min(stations.items(), key=lambda station: station[1])


class Prediction(Section):
    """What one run on one machine should do, to be compared with what it then did."""

    seconds: float
    """Of the training loop, evaluations included; starting the workers is not."""
    images: int
    images_per_s: float
    asked: int
    from_store: int
    label_bytes: float
    asking_rate: float
    """Images a second while labels are asked for."""
    reading_rate: float
    """Images a second of later epochs."""
    evaluation_s: float
    waits: dict[str, float]
    """Shares of the stream's time, of all epochs."""
    limited_by: str


def predict(rates: StageRates, work: Work, *, workers: int, cores: float, stored: int = 0, variation: float = 0.2) -> Prediction:
    """A run on a machine whose stations share `cores`, with one teacher instance and `stored` labels in the store before.

    Beside the bounds of the stations there is that of the cores: images a second <= cores / (core-seconds an image of all stations).
    Where that one is the smallest, all stations are taken to be slower by the same factor.
    """
    asking, asking_waits, limit = _shared(rates, work, workers, cores, variation, asks=True)
    reading, reading_waits, reading_limit = _shared(rates, work, workers, cores, variation, asks=False)
    asked = max(0, work.asked - stored)
    later = work.trained - asked
    asking_s, reading_s = asked / asking, later / reading
    evaluation_s = work.evaluations * work.test_images / rates.evaluation if rates.evaluation else 0.0
    stream_s = asking_s + reading_s
    names = asking_waits.keys()
    return Prediction(
        seconds=stream_s + evaluation_s,
        images=work.trained,
        images_per_s=work.trained / (stream_s + evaluation_s),
        asked=asked,
        from_store=later,
        label_bytes=rates.label_bytes,
        asking_rate=asking,
        reading_rate=reading,
        evaluation_s=evaluation_s,
        waits={name: (asking_waits[name] * asking_s + reading_waits[name] * reading_s) / stream_s for name in names},
        limited_by=limit if asked >= later else reading_limit,
    )


def undisturbed(rates: StageRates, cores: int, student_threads: int) -> StageRates:
    """The rates that the same core-seconds would give where nothing else ran: a thread has a core, and the teacher has all of them.

    Between these and the measured ones lies what a run on a busy machine does. A station whose core-seconds are not known stays as it is.
    """

    def freed(rate: float, threads: float, core_s: float | None) -> float:
        return max(rate, min(threads, cores) / core_s) if core_s else rate

    training = freed(rates.all_students, student_threads, rates.student_core_s) / rates.all_students
    decode = freed(rates.decode, 1, rates.decode_core_s)
    return rates.replace(
        teacher=freed(rates.teacher, cores, rates.teacher_core_s),
        decode=decode,
        decode_scaling=1.0,
        students={name: rate * training for name, rate in rates.students.items()},
        evaluation=rates.evaluation and rates.evaluation * min(training, decode / rates.decode),
        keep=freed(rates.keep, 1, rates.keep_core_s),
        read=freed(rates.read, 1, rates.read_core_s),
    )


def _shared(
    rates: StageRates, work: Work, workers: int, cores: float, variation: float, *, asks: bool
) -> tuple[float, dict[str, float], str]:
    """(images a second, waits, what limits) of one kind of epoch."""
    pipeline = pipeline_of(rates, work, workers=workers, teachers=1, threads=work.num_threads, asks=asks, variation=variation)
    limit, most = _least(bounds(pipeline))
    stations = (rates.teacher_core_s, rates.keep_core_s) if asks else (rates.read_core_s,)
    core_s = sum(part or 0.0 for part in (*stations, rates.decode_core_s, rates.student_core_s))
    together = cores / core_s if core_s > 0 else math.inf
    if together < most:
        limit = "cores"
    found = simulate(
        pipeline_of(
            rates,
            work,
            workers=workers,
            teachers=1,
            threads=work.num_threads,
            asks=asks,
            variation=variation,
            slower=max(1.0, most / together),
        )
    )
    waits = dict(found.waits)
    if asks:  # a run's own books cannot tell the two apart: see LabelledStream.epoch
        waits["teacher"] += waits["store"]
        waits["store"] = 0.0
    return found.images_per_s, waits, limit
