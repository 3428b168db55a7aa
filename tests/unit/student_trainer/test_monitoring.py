"""A real training loop, watched: what its rows hold, what Prometheus and TensorBoard get from them while it runs.

Unit of data: one run of 20 images, two students, a fake teacher.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from distill.cluster.settings import RaySettings
from distill.cluster.worker import LocalWorker, Row
from distill.errors import ServerStartError
from distill.monitor_settings import MonitorSettings
from student_trainer import lessons
from student_trainer.agreement import RunningAgreement
from student_trainer.history import read_history
from student_trainer.job import TrainJob
from student_trainer.loss import Lesson
from student_trainer.monitoring import open_sinks
from student_trainer.run_metrics import MetricsServer, RunMetrics
from student_trainer.store import StoreIdentity
from student_trainer.totals import Totals, of_each_student
from student_trainer.train import train_students
from student_trainer.waits import Waits
from student_trainer.worker import train_worker
from teacher_server.fake import FakeTeacher
from teacher_server.pool_member import MemberState, PoolState

NUM_STEPS = 8
CLASSES = ("cat", "dog")


class PooledFake(FakeTeacher):
    """A teacher that says that it is two."""

    def state(self) -> PoolState:
        """See `HasPoolState`."""
        member = {"in_flight": 1, "images_in_flight": 5, "limit": 4, "requests": 1, "images": 5, "failures": 0, "for_s": 2.0}
        members = (MemberState(url="a:1", standing="in", **member), MemberState(url="b:1", standing="away", **member))
        return PoolState(fingerprint=None, waiting=0, members=members)


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> TrainJob:
    """2 epochs of 4 steps; the second reads the labels of the first. One of the 21 images is no image."""
    monkeypatch.setattr("student_trainer.worker.POST_EVERY_S", -1.0)
    monkeypatch.setattr(lessons, "open_teacher", lambda address: PooledFake(len(CLASSES)))
    random = np.random.default_rng(0)
    for number, name in enumerate(CLASSES):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for image in range(10):
            pixels = random.integers(0, 100, (12, 12, 3)) + 150 * number
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "photos" / name / f"{image}.png")
    (tmp_path / "photos" / "cat" / "bad.png").write_bytes(b"no image")
    images = {"path": str(tmp_path / "photos")}
    sets = {"unlabelled": images, "labelled": images, "test": images}
    network = {"depth": 10, "width_multiplier": 0.125, "stem": "cifar"}
    students = [{"name": name, "network": network, "optimizer": {"learning_rate": 0.02}} for name in ("one", "two")]
    made = TrainJob.model_validate(
        {
            "objective": "distill",
            "data": {**sets, "image_size": 8, "class_names": CLASSES, "max_rejected_share": 0.1},
            "train": {"students": students, "global_batch": 5, "num_views": 1, "precision": "fp32", "checkpoint_every_steps": 3},
            "epochs": 2, "seed": 3, "class_names": CLASSES, "rejected_path": str(tmp_path / "rejected.jsonl"),
            "teacher": {"model": "fake", "repository": "nowhere"}, "store_folder": str(tmp_path / "store"),
        }
    )  # fmt: skip
    identity = StoreIdentity(fingerprint="f" * 64, num_classes=2, recipe=made.recipe, seed=3, images=made.open_images().digest())
    return made.replace(store_identity=identity)


def run(job: TrainJob, folder: Path, on_row: Callable[[Row], None] = lambda row: None) -> list[Row]:
    rows: list[Row] = []

    def post(row: Row) -> None:
        rows.append(row)
        on_row(row)

    train_worker(job.model_dump(mode="json"), LocalWorker(folder, post, torch.device("cpu")))
    return rows


def test_every_step_row_says_what_the_documentation_promises(job: TrainJob, tmp_path: Path) -> None:
    rows = run(job, tmp_path / "run")
    steps = [row for row in rows if row["kind"] == "step"]
    documented = (Path(__file__).parents[3] / "docs" / "monitoring.md").read_text(encoding="utf-8")
    assert [(row["step"], row["of"], row["epoch"]) for row in steps] == [(n, NUM_STEPS, (n - 1) // 4) for n in range(1, NUM_STEPS + 1)]
    for row in steps:
        assert [field for field in row if f"| `{field}` |" not in documented] == []
        assert row["losses"].keys() == row["agreement"].keys() == row["learning_rate"].keys() == {"one", "two"}
        assert all(0 <= share <= 1 for share in row["agreement"].values())
        assert all(seconds >= 0 for seconds in row["waits_recent"].values())
    assert steps[0]["images_per_s"] is None
    assert all(row["images_per_s"] > 0 for row in steps[1:])
    last = steps[-1]
    assert last["rejected"] == 1
    assert last["totals"]["asked"] + last["totals"]["from_store"] == last["totals"]["images"]
    assert 19 <= last["totals"]["asked"] < last["totals"]["images"]
    assert [member["url"] for member in last["pool"]["members"]] == ["a:1", "b:1"]
    assert of_each_student(last["totals"])["one"]["images"] == last["totals"]["images"]
    assert 0 < of_each_student(last["totals"])["two"]["seconds"] <= last["totals"]["student"] + 1
    json.dumps(rows, allow_nan=False)


def test_rows_of_evaluations_and_checkpoints_name_their_step(job: TrainJob, tmp_path: Path) -> None:
    rows = run(job, tmp_path / "run")
    assert [row["step"] for row in rows if row["kind"] == "epoch"] == [4, 8]
    assert [row["step"] for row in rows if row["kind"] == "checkpoint"] == [3, 4, 6, 8]
    assert all(row["time"] > 1.7e9 for row in rows)


def test_prometheus_and_tensorboard_watch_a_run(job: TrainJob, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Scraped in the middle of the run, after the step before last."""
    scraped: list[str] = []
    with open_sinks(MonitorSettings(prometheus_port=0), tmp_path / "line" / "train", "distill") as sinks:
        (server,) = [sink for sink in sinks if isinstance(sink, MetricsServer)]
        assert f"metrics for Prometheus: {server.url}" in capsys.readouterr().out

        def on_row(row: Row) -> None:
            for sink in sinks:
                sink.show(row)
            if row["kind"] == "step" and row["step"] == NUM_STEPS - 1:
                scraped.append(httpx.get(server.url, timeout=10).text)

        rows = run(job, tmp_path / "run", on_row)
    families = {family.name: family for family in text_string_to_metric_families(scraped[0])}
    values = {(s.name, *sorted(s.labels.items())): s.value for family in families.values() for s in family.samples}
    first, *_, row = [row for row in rows if row["kind"] == "step" and row["step"] < NUM_STEPS]
    counted = {name: row["totals"][name] - first["totals"][name] for name in ("asked", "images", "student")}
    assert values["distill_step",] == NUM_STEPS - 1
    assert values["distill_labels_total", ("source", "teacher")] == counted["asked"] >= 14
    assert values["distill_images_total",] == counted["images"]
    assert values["distill_student_agreement_ratio", ("student", "two")] == row["agreement"]["two"]
    assert values["distill_waits_seconds_total", ("for", "student")] == pytest.approx(counted["student"])
    assert values["distill_teacher_up", ("url", "b:1")] == 0
    assert values["distill_rejected_images_total",] == 1
    assert families["distill_run_info"].samples[0].labels["stage"] == "distill"
    events = EventAccumulator(str(tmp_path / "line" / "train" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss/two")] == list(range(1, NUM_STEPS + 1))
    assert [event.step for event in events.Scalars("top1/one")] == [4, 8]


def test_nobody_watches_unless_asked(tmp_path: Path) -> None:
    with open_sinks(MonitorSettings(tensorboard=False), tmp_path, "distill") as sinks:
        assert sinks == []


def test_where_the_work_never_begins_nobody_keeps_the_port(job: TrainJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No cluster answers at that address, so no watch ever closes the endpoint."""
    opened: list[MetricsServer] = []

    def note(self: MetricsServer, metrics: RunMetrics, port: int, host: str) -> None:
        begin(self, metrics, port, host)
        opened.append(self)

    begin = MetricsServer.__init__
    monkeypatch.setattr(MetricsServer, "__init__", note)
    with pytest.raises(ServerStartError, match="no Ray cluster"):
        train_students(job, RaySettings(address="no cluster"), tmp_path / "train", "distill", MonitorSettings(prometheus_port=0))
    (server,) = opened
    with pytest.raises(httpx.ConnectError):
        httpx.get(server.url, timeout=10)


def test_the_journal_of_a_run_becomes_its_history(job: TrainJob, tmp_path: Path) -> None:
    rows = run(job, tmp_path / "run")
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    points = read_history(tmp_path / "metrics.jsonl")["points"]
    assert [point["step"] for point in points] == list(range(1, NUM_STEPS + 1))
    assert points[-1]["losses"] == next(row for row in reversed(rows) if row["kind"] == "step")["losses"]


class TestAgreement:
    def lesson(self, teacher: list[int]) -> Lesson:
        return Lesson(torch.zeros(len(teacher), 1, 1, 3), teacher_UK=torch.eye(3)[teacher])

    def test_the_first_batch_is_its_own_mean(self) -> None:
        found = RunningAgreement()
        assert found.value() is None
        found.count(torch.eye(3)[[0, 1, 2, 2]], self.lesson([0, 1, 0, 0]))
        assert found.value() == 0.5

    def test_older_steps_fade(self) -> None:
        found = RunningAgreement()
        found.count(torch.eye(3)[[0, 0]], self.lesson([1, 1]))
        found.count(torch.eye(3)[[0, 0]], self.lesson([0, 0]))
        assert found.value() == pytest.approx(1 / 1.95)
        for _ in range(200):
            found.count(torch.eye(3)[[0, 0]], self.lesson([0, 0]))
        assert found.value() == pytest.approx(1, abs=1e-4)

    def test_labelled_crops_do_not_count(self) -> None:
        """The second crop has a label and no teacher's word."""
        found = RunningAgreement()
        found.count(torch.eye(3)[[0, 1]], self.lesson([0]))
        assert found.value() == 1
        found.count(torch.eye(3)[[0]], Lesson(torch.zeros(1, 1, 1, 3), labels_L=torch.tensor([1])))
        assert found.value() == 1


class TestTotals:
    def of(self, images: float, seconds: float) -> dict[str, Any]:
        return {"images": images, "asked": 0.0, "from_store": 0.0, "seconds": seconds, **Waits(student=seconds).model_dump()}

    def test_students_are_counted_on_top_of_what_was_before(self) -> None:
        totals = Totals({**self.of(100, 10), "images of a": 100.0, "seconds of a": 4.0})
        with totals.step_of("a", 5):
            pass
        with totals.step_of("b", 5):
            pass
        each = of_each_student(totals.of_this_worker())
        assert (each["a"]["images"], each["b"]["images"]) == (105, 5)
        assert 4.0 <= each["a"]["seconds"] < 4.5

    def test_a_step_that_raised_is_not_counted(self) -> None:
        totals = Totals({})
        with pytest.raises(ValueError, match="broke"), totals.step_of("a", 5):
            raise ValueError("broke")
        assert of_each_student(totals.of_this_worker()) == {}

    def test_an_estimate_is_for_equal_workers(self) -> None:
        totals = Totals(self.of(100, 10))
        with totals.step_of("a", 5):
            pass
        found = totals.estimate(4)
        assert found["images of a"] == 20
        assert found["images"] == 100  # what was before was of all of them
        assert found["seconds of a"] == totals.of_this_worker()["seconds of a"]
