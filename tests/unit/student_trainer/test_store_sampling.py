"""Asking the teacher about a sample: what labels would cost, and whether kept ones are what it says. The teacher is the fake one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from distill.errors import ConfigError, FingerprintMismatch, TeacherUnavailable
from distill.loader import CropLoader, LoaderSettings
from distill.rejections import RejectionLog
from distill.soft_labels import encode
from student_trainer import store_sampling
from student_trainer.job import TrainJob
from student_trainer.label_path import LabelPath
from student_trainer.open_store import open_label_store
from student_trainer.store import SoftLabelStore, StoreIdentity
from student_trainer.store_sampling import check_against_teacher, plan_store
from teacher_server.fake import FakeTeacher

CLASSES = ("dark", "light")
NUM_CLASSES = 10


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """15 images of noise in each of two class folders."""
    folder = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for name in CLASSES:
        (folder / name).mkdir()
        for image in range(15):
            pixels = np.clip(random.integers(0, 256) + random.normal(0, 30, (12, 12, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{image}.png")
    return folder


@pytest.fixture
def job(photos: Path, tmp_path: Path) -> TrainJob:
    images = {"path": str(photos), "records_per_shard": 7}
    student = {"name": "small", "network": {"depth": 10, "width_multiplier": 0.125, "stem": "cifar"}}
    names = [f"class {k}" for k in range(NUM_CLASSES)]
    tree = {
        "objective": "distill",
        "data": {"unlabelled": {"path": str(photos)}, "labelled": images, "test": images, "image_size": 8, "class_names": names},
        "train": {"students": [student], "global_batch": 5, "num_views": 3, "temperature": 2.0},
        "store": {"max_tv": 0.02, "temperatures": [1.0]},
        "epochs": 1,
        "seed": 3,
        "class_names": names,
        "rejected_path": str(tmp_path / "rejected.jsonl"),
        "teacher": {"model": "fake", "repository": "nowhere"},
        "store_folder": str(tmp_path / "store"),
    }
    tree["data"]["labelled"] = tree["data"]["test"] = tree["data"]["unlabelled"]
    made = TrainJob.model_validate(tree)
    identity = StoreIdentity(fingerprint="f" * 64, num_classes=NUM_CLASSES, recipe=made.recipe, seed=3, images=made.open_images().digest())
    return made.replace(store_identity=identity)


@pytest.fixture
def teachers(monkeypatch: pytest.MonkeyPatch) -> list[FakeTeacher]:
    opened: list[FakeTeacher] = []

    def open_fake(address: object) -> FakeTeacher:
        opened.append(FakeTeacher(NUM_CLASSES))
        return opened[-1]

    monkeypatch.setattr(store_sampling, "open_teacher", open_fake)
    return opened


def fill(job: TrainJob, spoil: Callable[[Any], Any] = lambda logits: logits) -> SoftLabelStore:
    """All labels of view 0, through the label path; `spoil` changes what the teacher says."""

    class Spoilt(FakeTeacher):
        async def _infer(self, crops_BHWC: Any, temperature_B1: Any, names: Any) -> Any:
            tensors = await super()._infer(crops_BHWC, temperature_B1, names)
            return {name: spoil(tensor) for name, tensor in tensors.items()}

    loading = LoaderSettings(job.seed, 5, drop_last=False, shuffle=False)
    loader = CropLoader(job.open_images(), job.recipe, loading, lambda epoch: (epoch,), RejectionLog(Path(job.rejected_path), 0.0))

    async def label() -> SoftLabelStore:
        path = LabelPath(open_label_store(job), Spoilt(NUM_CLASSES), job.rules)
        for batch in loader.epoch(0):
            await path.read(batch)
        path.commit()
        return path.store

    return asyncio.run(label())


def test_the_plan_counts_what_the_store_will_hold(job: TrainJob, teachers: list[FakeTeacher]) -> None:
    told: list[int] = []
    plan = plan_store(job, 30, told.append)
    assert (plan.num_images, plan.num_views, plan.num_sampled) == (30, 3, sum(told))
    own = plan.options[0]
    assert own.is_runs
    assert not any(option.is_runs for option in plan.options[1:])
    assert (own.sizes.max_tv, own.sizes.temperatures) == (0.02, (1.0, 2.0))
    assert own.sizes.largest_tv <= 0.02
    assert len({(option.sizes.max_tv, option.sizes.temperatures) for option in plan.options}) == len(plan.options) >= 4
    tighter = next(option for option in plan.options if option.sizes.max_tv == 0.01)
    assert tighter.total_bytes >= own.total_bytes
    assert sum(teachers[0].calls) == 30
    assert teachers[0].closed
    store = fill(job)
    assert own.total_bytes / 3 == pytest.approx(store.stats().size_bytes, rel=0.25)  # of one view, from a sample of all three


def test_the_same_seed_draws_the_same_sample(job: TrainJob, teachers: list[FakeTeacher]) -> None:
    assert plan_store(job, 10) == plan_store(job, 10)
    assert plan_store(job, 10).options[0].sizes.num_labels == 10


def test_labels_are_within_their_bound(job: TrainJob, teachers: list[FakeTeacher]) -> None:
    found = check_against_teacher(fill(job), job, 12, seed=0, logit_tolerance=1e-4)
    assert found.num_checked >= 10
    assert [at.temperature for at in found.temperatures] == [1.0, 2.0]
    assert found.num_beyond == 0
    for at in found.temperatures:
        assert 0 < at.true_tv.largest <= at.stated_tv.largest + 1e-4
    assert check_against_teacher(fill(job), job, 12, seed=0, logit_tolerance=1e-4) == found
    assert check_against_teacher(fill(job), job, 12, seed=1, logit_tolerance=1e-4) != found


def test_labels_of_a_teacher_that_said_something_else_are_found(job: TrainJob, teachers: list[FakeTeacher]) -> None:
    store = fill(job, lambda logits: np.roll(logits, 1, axis=1))
    found = check_against_teacher(store, job, 12, seed=0, logit_tolerance=1e-3)
    assert found.num_beyond > 12
    assert "view 0" in found.temperatures[0].worst[0]


def test_a_stated_error_that_is_too_small_is_found(job: TrainJob, teachers: list[FakeTeacher]) -> None:
    """Rough records that claim to be good ones."""
    store = fill(job)
    rough = open_label_store(job.replace(store_folder=f"{job.store_folder}-rough"))
    for segment, table in [(s, t) for unit in {(s.view, s.shard) for s in store.segments} for s, t in store.tables(*unit)]:
        logits = store.read(segment.view, segment.shard, 1.0, 1.0).logits_NK
        lying = [r.__class__(r.encoding, r.data, 1e-6, 1e-6) for r in encode(logits, (1.0,), 0.4)]
        rough.commit(segment.view, segment.shard, table["row"].to_pylist(), table["image_id"].to_pylist(), lying, (1.0, 2.0))
    assert check_against_teacher(rough, job, 12, seed=0, logit_tolerance=1e-3).num_beyond > 0
    assert check_against_teacher(rough, job, 12, seed=0, logit_tolerance=100).num_beyond == 0  # a tolerance that excuses everything


def test_another_teacher_and_an_empty_store_are_refused(job: TrainJob, monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(FakeTeacher):
        async def _load_info(self) -> Any:
            return (await super()._load_info()).replace(fingerprint="e" * 64)

    monkeypatch.setattr(store_sampling, "open_teacher", lambda address: Other(NUM_CLASSES))
    with pytest.raises((TeacherUnavailable, FingerprintMismatch), match="eeeeeeeeeeee"):
        check_against_teacher(fill(job), job, 5, seed=0, logit_tolerance=1e-3)
    with pytest.raises(ConfigError, match="holds no label to check"):
        check_against_teacher(open_label_store(job.replace(store_folder=f"{job.store_folder}-empty")), job, 5, 0, 1e-3)
