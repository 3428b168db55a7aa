"""Asking the run's own teacher about a few crops: what labels would cost before a job, and whether kept ones are what it says.

Unit of data: a sample of (view, shard, row), and the teacher's logits of those crops. Shapes: N crops, K classes.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from distill.config import Section
from distill.errors import ConfigError, SourceError
from distill.loader import CropLoader
from distill.rejections import RejectionLog
from distill.soft_label_sizes import LabelSizes, describe_sizes
from distill.soft_labels import FloatArray, decode, encode
from student_trainer.job import TrainJob
from student_trainer.store import SoftLabelStore
from student_trainer.store_segments import SCHEMA, errors_at, image_ids_of, make_table, table_bytes
from student_trainer.store_stats import Spread, total_variation
from teacher_server.address import open_teacher

MOST_SHARDS = 16
"""Image shards that a sample comes from: whole shards are read."""
ASK_AT_ONCE = 64

Sample = dict[tuple[int, int], list[int]]
"""(view, shard) -> rows."""
OnCrops = Callable[[int], None]


class Option(Section):
    """One way of keeping the labels."""

    sizes: LabelSizes
    """Bytes and errors of the sample's records."""
    total_bytes: int
    """All views of all images: records, rows, image ids and the files around them."""
    is_runs: bool
    """Whether it is what the run file says."""


class StorePlan(Section):
    """What labels would cost."""

    num_images: int
    """Images."""
    num_views: int
    """Views of each."""
    num_shards: int
    """Image shards."""
    num_sampled: int
    """Crops that the teacher was asked about."""
    options: list[Option]
    """The run's own first, alternatives behind it."""


class AtTemperature(Section):
    """Stored labels against the teacher's answers, at one temperature."""

    temperature: float
    """T."""
    true_tv: Spread
    """Total variation between the stored label and the teacher's answer now."""
    stated_tv: Spread
    """The bound that the store states for it."""
    beyond: int
    """Labels whose true error is over the bound and the tolerance."""
    worst: list[str]
    """The first few of those, by name."""


class TeacherCheck(Section):
    """Stored labels against the teacher."""

    num_checked: int
    """Labels."""
    logit_tolerance: float
    """Difference of two logits of the same engine that is its own noise; at T it allows tanh(tolerance / 2T) of total variation more."""
    temperatures: list[AtTemperature]
    """For each temperature of the job."""

    @property
    def num_beyond(self) -> int:
        """Labels over their bound, over all temperatures."""
        return sum(at.beyond for at in self.temperatures)


def plan_store(job: TrainJob, count: int, on_crops: OnCrops = lambda count: None) -> StorePlan:
    """Ask the teacher for `count` random crops and say what all labels would cost, as the run keeps them and in a few other ways.

    Raises:
        SourceError: not one of the crops can be used.
        what asking the teacher raises.
    """
    images, views = job.open_images(), job.train.num_views
    sizes = [shard.num_records for shard in images.shards]
    logits_NK, image_ids, _ = asyncio.run(_ask(job, _draw_images(sizes, views, count, job.seed), on_crops))
    options = list[Option]()
    for max_tv, temperatures in _alternatives(job):
        sizes_of = describe_sizes(logits_NK, temperatures, max_tv)
        empty = len(table_bytes(SCHEMA.empty_table()))
        whole = len(table_bytes(make_table(range(len(logits_NK)), image_ids, encode(logits_NK, temperatures, max_tv))))
        total = views * (sum(sizes) * (whole - empty) / len(logits_NK) + len(sizes) * empty)
        options.append(Option(sizes=sizes_of, total_bytes=round(total), is_runs=not options))
    return StorePlan(num_images=sum(sizes), num_views=views, num_shards=len(sizes), num_sampled=len(logits_NK), options=options)


def check_against_teacher(
    store: SoftLabelStore, job: TrainJob, count: int, seed: int, logit_tolerance: float, on_crops: OnCrops = lambda count: None
) -> TeacherCheck:
    """Ask the teacher again about `count` random labels of the store, and compare their errors with what is stated.

    Raises:
        ConfigError: the store holds no label.
        what asking the teacher raises.
    """
    sample = _draw_labels(store, count, seed)
    asked_NK, _, keys = asyncio.run(_ask(job, sample, on_crops))
    position = {key: at for at, key in enumerate(keys)}
    found: dict[float, list[tuple[float, float, str]]] = {temperature: [] for temperature in job.rules.temperatures}
    num_checked = 0
    for unit, rows in sample.items():
        for segment, table in store.tables(*unit):
            at = np.flatnonzero(np.isin(table["row"].to_numpy(), rows))
            at = np.array([a for a in at if (*unit, table["row"][int(a)].as_py()) in position], dtype=np.int64)
            if not len(at):
                continue
            part = table.take(at)
            true_NK = asked_NK[[position[*unit, row] for row in part["row"].to_pylist()]]
            kept_NK = decode(part["encoding"].to_pylist(), part["record"].to_pylist(), store.identity.num_classes)
            names = [f"view {unit[0]} {image_id.encode('utf-8', 'backslashreplace').decode()}" for image_id in image_ids_of(part)]
            num_checked += len(names)
            for temperature, rows_of in found.items():
                tv_N = total_variation(true_NK, kept_NK, temperature)
                rows_of += zip(tv_N.tolist(), errors_at(segment, part, temperature).tolist(), names, strict=True)
    return TeacherCheck(
        num_checked=num_checked,
        logit_tolerance=logit_tolerance,
        temperatures=[_judge(t, rows, float(np.tanh(logit_tolerance / (2 * t)))) for t, rows in found.items()],
    )


def _judge(temperature: float, found: list[tuple[float, float, str]], tolerance: float) -> AtTemperature:
    beyond = sorted(((tv - stated, f"{name}: {tv:.3g}, stated {stated:.3g}") for tv, stated, name in found if tv > stated + tolerance))
    return AtTemperature(
        temperature=temperature,
        true_tv=Spread.of(np.array([tv for tv, _, _ in found])),
        stated_tv=Spread.of(np.array([stated for _, stated, _ in found])),
        beyond=len(beyond),
        worst=[says for _, says in beyond[::-1][:5]],
    )


def _alternatives(job: TrainJob) -> list[tuple[float, tuple[float, ...]]]:
    """(max_tv, temperatures): the run's, then half and more than twice its error, one temperature, and several."""
    own, own_temperatures = job.store.max_tv, job.rules.temperatures
    wanted = [(own, own_temperatures), (own / 2, own_temperatures), (min(0.5, own * 2.5), own_temperatures)]
    wanted += [(own, (job.train.temperature,)), (own, tuple(sorted({*own_temperatures, 1.0, 2.0, 4.0})))]
    return list(dict.fromkeys(wanted))


def _draw_images(sizes: Sequence[int], views: int, count: int, seed: int) -> Sample:
    random = np.random.default_rng([seed, 1])
    filled = np.flatnonzero(np.asarray(sizes))
    shards = random.choice(filled, size=min(MOST_SHARDS, len(filled)), replace=False)
    shares = np.asarray(sizes, dtype=np.float64)[shards]
    sample: Sample = defaultdict(list)
    for number, rows in enumerate(random.multinomial(count, shares / shares.sum())):
        size = sizes[shards[number]]
        view = int(random.integers(views))
        sample[view, int(shards[number])] = random.choice(size, size=min(int(rows), size), replace=False).tolist()
    return {unit: rows for unit, rows in sample.items() if rows}


def _draw_labels(store: SoftLabelStore, count: int, seed: int) -> Sample:
    segments = store.segments
    weights = np.array([segment.num_labels for segment in segments], dtype=np.float64)
    if not weights.sum():
        raise ConfigError(f"the label store {store.folder} holds no label to check; fill it with `distill label`")
    random = np.random.default_rng([seed, 2])
    sample: Sample = defaultdict(list)
    for segment, rows in zip(segments, random.multinomial(count, weights / weights.sum()), strict=True):
        if not rows:
            continue
        for found, table in store.tables(segment.view, segment.shard, ("row",)):
            if found.file == segment.file:
                chosen = random.choice(len(table), size=min(int(rows), len(table)), replace=False)
                sample[segment.view, segment.shard] += table["row"].to_numpy()[chosen].tolist()
    return {unit: sorted(set(rows)) for unit, rows in sample.items()}


async def _ask(job: TrainJob, sample: Sample, on_crops: OnCrops) -> tuple[FloatArray, list[str], list[tuple[int, int, int]]]:
    """The teacher's logits of the sample's crops, their image ids and their (view, shard, row). Unusable images are left out."""
    assert job.teacher is not None
    assert job.store_identity is not None
    rejections = RejectionLog(Path(job.rejected_path), 1.0)
    images = job.open_images()
    loading = replace(job.loading(images), global_batch=ASK_AT_ONCE, drop_last=False, shuffle=False)
    loader = CropLoader(images, job.recipe, loading, lambda epoch: (epoch,), rejections)
    teacher = open_teacher(job.teacher)
    logits, image_ids, keys = [], list[str](), list[tuple[int, int, int]]()
    try:
        for (view, shard), rows in sample.items():
            for at in range(0, len(rows), ASK_AT_ONCE):
                part = np.array([(shard, row) for row in rows[at : at + ASK_AT_ONCE]], dtype=np.int64)
                batch = await asyncio.to_thread(loader.make, view, 0, (view,), part)
                if len(batch.image_ids):
                    logits.append(await teacher.logits(batch.crops_VBHWC[0], fingerprint=job.store_identity.fingerprint))
                image_ids += batch.image_ids
                keys += [(view, int(s), int(r)) for s, r in batch.rows]
                on_crops(len(part))
    finally:
        await teacher.close()
        rejections.close()
    if not logits:
        raise SourceError("not one of the sampled images can be used; see the list of rejected images")
    return np.concatenate(logits), image_ids, keys
