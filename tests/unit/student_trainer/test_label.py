"""`distill label` as a whole, its actors in this process: bad images are over the limit however few the images are.

Unit of data: one labelling job over a folder of small images. `FakeTeacher` is the teacher.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from distill.cluster.settings import RaySettings
from distill.errors import TooManyRejected
from student_trainer import label, label_units, store_claims
from student_trainer.job import TrainJob
from student_trainer.label_units import Unit, UnitDone
from student_trainer.store import SoftLabelStore, StoreIdentity
from student_trainer.store_claims import Claims
from teacher_server.fake import FakeTeacher

CLASSES = ["cat", "dog"]
NUM_GOOD, NUM_BAD, NUM_VIEWS = 8, 4, 2


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainJob:
    """12 images in shards of 3, a third of them none; the actors, one after the other, in this process instead of in Ray's."""
    random = np.random.default_rng(0)
    for number in range(NUM_GOOD + NUM_BAD):
        path = tmp_path / "photos" / CLASSES[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        if number < NUM_GOOD:
            Image.fromarray(random.integers(0, 255, (12, 12, 3)).astype(np.uint8)).save(path)
        else:
            path.write_bytes(b"no image")

    def run_here(job: TrainJob, settings: RaySettings, units: list[Unit], over: Mapping[str, bytes]) -> Iterator[tuple[Unit, UnitDone]]:
        made = (label.LabelUnits(job.model_dump(mode="json"), None, over) for _ in range(settings.num_workers))  # type: ignore[arg-type]
        actors: list[Any] = list(made)
        for number, (view, shard) in enumerate(units):
            told = actors[number % len(actors)]({"view": np.array([view]), "shard": np.array([shard])})
            yield (view, shard), UnitDone(**{name: told[name][0] for name in label.COUNTS})
        for actor in actors:  # Ray ends the whole process instead
            actor._runner.run(actor._labeller._path.close())
            actor._labeller._claims.close()
            actor._runner.close()

    monkeypatch.setattr(label, "_run_units", run_here)
    monkeypatch.setattr(label, "ray_session", lambda settings: contextlib.nullcontext())
    monkeypatch.setattr(label, "open_teacher", lambda address: FakeTeacher(len(CLASSES)))
    images = {"path": str(tmp_path / "photos"), "records_per_shard": 3}
    student = {"name": "one", "network": {"depth": 10, "width_multiplier": 0.125, "stem": "cifar"}}
    made = TrainJob.model_validate(
        {
            "objective": "distill",
            "data": {"unlabelled": images, "labelled": images, "test": images, "image_size": 8, "class_names": CLASSES},
            "train": {"students": [student], "global_batch": 5, "num_views": NUM_VIEWS},
            "epochs": 1, "seed": 3, "class_names": CLASSES, "rejected_path": str(tmp_path / "rejected.jsonl"),
            "teacher": {"model": "fake", "repository": "nowhere"}, "store_folder": str(tmp_path / "store"),
        }
    )  # fmt: skip
    identity = StoreIdentity(fingerprint="f" * 64, num_classes=2, recipe=made.recipe, seed=3, images=made.open_images().digest())
    return made.replace(store_identity=identity)


def with_limit(job: TrainJob, share: float) -> TrainJob:
    return job.replace(data=job.data.replace(max_rejected_share=share))


def test_a_few_images_of_which_too_many_are_bad_are_no_success(job: TrainJob, tmp_path: Path) -> None:
    """Each of two actors sees some of them; none sees the hundred after which it would stop by itself."""
    with pytest.raises(TooManyRejected, match=r"of \d+ images \(33\.33%\) cannot be used, over the limit of 30\.00%"):
        label.label_images(with_limit(job, 0.3), RaySettings(num_workers=2))
    assert job.store_identity is not None
    assert SoftLabelStore(tmp_path / "store", job.store_identity).stats().num_labels == NUM_GOOD * NUM_VIEWS  # what is good is kept


def test_within_the_limit_it_is_one_and_what_is_left_over_is_judged_with_the_rest(job: TrainJob) -> None:
    settings = RaySettings(num_workers=1)
    for asked in (NUM_GOOD * NUM_VIEWS, 0):
        told = label.label_images(with_limit(job, 0.4), settings)
        assert told["totals"]["asked"] == asked


def test_memory_and_threads_are_the_run_files(job: TrainJob) -> None:
    data, train = job.data.replace(window_shards=1, num_threads=3), job.train.replace(mixing_cache_mib=7)
    told = job.replace(data=data, train=train).model_dump(mode="json")
    actor: Any = label.LabelUnits(told, None, {})  # type: ignore[arg-type]
    settings = actor._labeller._loader.settings
    assert (settings.window_shards, settings.num_threads, settings.mixing_cache_bytes) == (1, 3, 7 * 2**20)
    actor._runner.run(actor._labeller._path.close())
    actor._runner.close()


def test_what_another_machine_was_at_when_it_died_is_labelled(job: TrainJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert job.store_identity is not None
    store = SoftLabelStore(tmp_path / "store", job.store_identity)
    with monkeypatch.context() as patch:
        patch.setattr(store_claims, "_machine", lambda: "elsewhere")
        assert Claims(store.files, 600).take(1, 0)
    ticks = itertools.count(step=10)  # so that each look is 10 s after the one before
    monkeypatch.setattr(store_claims, "time", SimpleNamespace(monotonic=lambda: next(ticks)))
    monkeypatch.setattr(label_units, "LOOK_AGAIN_S", 0.0)
    told = label.label_images(with_limit(job, 0.4), RaySettings(num_workers=2))
    assert told["store"]["num_labels"] == NUM_GOOD * NUM_VIEWS
    assert store.files.names("claims") == {}
