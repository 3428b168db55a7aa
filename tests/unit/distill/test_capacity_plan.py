"""`distill plan`: measured with a real (tiny) teacher and students, on paper from given rates, and beside what a run did."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from distill.cli.main import run_command
from distill.cli.plan_measure import cpu_seconds, measure
from distill.cli.plan_report import CapacityPlan, compared, read_plan
from distill.cli.run import Run
from distill.cli.run_file import RunFile
from distill.cluster.settings import RaySettings
from student_trainer.capacity import Prediction
from student_trainer.job import TrainJob
from student_trainer.store import StoreIdentity
from teacher_server.address import TeacherAddress

NETWORK = {"name": "resnet", "depth": 10, "width_multiplier": 0.125, "stem": "cifar"}
RATES = ("--teacher-rate", "400", "--decode-rate", "250", "--student-rate", "1000")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 images of noise in two class folders."""
    folder = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder / name).mkdir()
        for number in range(30):
            Image.fromarray(random.integers(0, 256, (12, 12, 3), np.uint8)).save(folder / name / f"{number}.png")
    return folder


@pytest.fixture
def run_file(photos: Path, tmp_path: Path) -> Path:
    images = {"path": str(photos)}
    tree = {
        "run_dir": str(tmp_path / "run"),
        "data": {"unlabelled": images, "labelled": images, "test": images, "image_size": 8},
        "train": {"students": [{"name": "small", "network": NETWORK}], "epochs": 4, "num_views": 2, "global_batch": 10, "control": False},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def planned(run_file: Path, *more: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert run_command(["plan", "--config", str(run_file), *more, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_on_paper_no_teacher_is_needed(run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = planned(run_file, *RATES, "--images", "1000000000", "--price-per-hour", "3", "--workers", "8", capsys=capsys)
    assert made["needs"]["student_workers"] == 8
    assert made["needs"]["teachers"] >= 20
    assert made["measured"] is None
    assert made["prediction"] is None
    live = made["ways"][0]
    assert live["cost"] == pytest.approx(3 * live["device_hours"])
    assert any(row["most"] and row["value"] > row["most"] for row in made["growth"])
    assert any("given, not measured" in line for line in made["assumptions"])
    assert read_plan(tmp_path / "run" / "plan.json").model_dump(mode="json") == made


def test_the_tables_say_the_same(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["plan", "--config", str(run_file), *RATES]) == 0
    said = capsys.readouterr().out
    for words in ("so that nobody waits", "labels made ahead", "inline, all students", "assumptions", "crops to the teachers", "plan.json"):
        assert words in said


def test_fewer_images_than_a_batch(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Refused, but for labelled images alone: a run makes one batch of them."""
    assert run_command(["plan", "--config", str(run_file), *RATES, "--images", "9"]) == 2
    assert "9 images are less than one batch (train.global_batch 10)" in capsys.readouterr().err
    labelled = planned(run_file, *RATES, "train.images=labelled", "train.global_batch=100", capsys=capsys)
    assert (labelled["work"]["images"], labelled["work"]["global_batch"]) == (60, 60)
    for images, batch in ((50, 50), (1000, 100)):
        more = planned(run_file, *RATES, "train.images=labelled", "train.global_batch=100", "--images", str(images), capsys=capsys)
        assert (more["work"]["images"], more["work"]["global_batch"]) == (images, batch)


def test_without_rates_and_teacher_it_says_what_comes_first(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["plan", "--config", str(run_file)]) == 2
    assert "export-teacher" in capsys.readouterr().err
    assert run_command(["plan", "--config", str(run_file), "--check"]) == 2
    assert "`distill plan` before the run" in capsys.readouterr().err


def test_what_is_measured_is_measured(photos: Path, tmp_path: Path, tiny_teacher: Any, one_thread: None) -> None:
    images = {"path": str(photos)}
    classes = tuple(f"class {k}" for k in range(10))
    job = TrainJob.model_validate(
        {
            "objective": "distill",
            "data": {"unlabelled": images, "labelled": images, "test": images, "image_size": 8},
            "train": {
                "students": [{"name": name, "network": NETWORK} for name in ("one", "two")],
                "global_batch": 10,
                "num_views": 2,
                "precision": "fp32",
            },
            "epochs": 4,
            "seed": 0,
            "class_names": classes,
            "rejected_path": str(tmp_path / "rejected.jsonl"),
            "teacher": TeacherAddress(model="tiny", repository=str(tiny_teacher.repository), num_threads=1),
        }
    )
    identity = StoreIdentity(
        fingerprint=tiny_teacher.info.fingerprint, num_classes=10, recipe=job.recipe, seed=0, images=job.open_images().digest()
    )
    job = job.replace(store_folder=str(tmp_path / "store"), store_identity=identity)
    run: Any = SimpleNamespace(
        distill_job=lambda *arguments: job, teacher=None, file=SimpleNamespace(train=job.train, ray=RaySettings(threads_per_worker=1))
    )
    assert job.teacher is not None
    found = measure(run, job.teacher, 0.3)
    rates = found.rates
    assert set(rates.students) == {"one", "two"}
    assert rates.all_students < min(rates.students.values())
    assert (rates.crop_bytes, rates.answer_bytes) == (8 * 8 * 3, 40)
    assert 5 < rates.label_bytes < 200
    assert rates.encoded_bytes == pytest.approx(np.mean([path.stat().st_size for path in photos.rglob("*.png")]), rel=0.1)
    assert [row.batch for row in found.teacher] == [1, 8, 10, 10]
    for core_s in (rates.teacher_core_s, rates.decode_core_s, rates.student_core_s, rates.keep_core_s, rates.read_core_s):
        assert core_s is not None
        assert core_s >= 0
    assert rates.student_core_s is not None
    assert rates.student_core_s * rates.all_students <= found.cores * 1.2, "no more cores than there are"
    assert not (tmp_path / "store").exists(), "the run's own store is not touched"
    assert not (tmp_path / "rejected.jsonl").exists()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="children are counted by /proc")
def test_core_seconds_of_children_count() -> None:
    spin = "import time\nwhile time.process_time() < 0.5: pass\nprint('spun', flush=True)\ninput()"
    before = cpu_seconds()
    child = subprocess.Popen([sys.executable, "-c", spin], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "spun\n"
    assert cpu_seconds() - before >= 0.45
    child.communicate("\n")


PREDICTION = Prediction(
    seconds=100, images=1000, images_per_s=10, asked=600, from_store=400, label_bytes=50, asking_rate=9, reading_rate=12,
    evaluation_s=5, waits={"decode": 0.1, "teacher": 0.3, "store": 0.0, "student": 0.6}, limited_by="cores",
)  # fmt: skip
RESULT = {
    "totals": {
        "seconds": 50.0, "images": 1000, "asked": 600, "from_store": 400, "decode": 4.0, "teacher": 8.0, "store": 0.0, "student": 28.0
    },
    "store": {"num_labels": 600, "size_bytes": 24_000, "num_segments": 2},
}  # fmt: skip


def test_a_plan_beside_what_the_run_did(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = CapacityPlan.model_validate(planned(run_file, *RATES, capsys=capsys))
    rows = {row.what: row for row in compared(made.replace(prediction=PREDICTION), RESULT)}
    assert rows["seconds"].ratio == 2
    assert rows["images/s"].ratio == 0.5
    assert rows["labels asked for"].ratio == 1
    assert rows["bytes a label"].ratio == pytest.approx(1.25)
    assert rows["seconds outside the stream (evaluations)"].actual == 10
    assert rows["share of the stream's time: teacher"].actual == pytest.approx(0.2)
    assert rows["share of the stream's time: store"].ratio is None


def test_the_command_compares_a_finished_run(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Through the command: the stages are records, as a finished run leaves them."""
    run = Run(RunFile.model_validate(yaml.safe_load(run_file.read_text())))
    for stage, result in ((run.finetune, {}), (run.first_teacher, {"fingerprint": "f" * 64}), (run.train, RESULT)):
        stage.begin()
        stage.finish(result)
    made = CapacityPlan.model_validate(planned(run_file, *RATES, capsys=capsys))
    check = ["plan", "--config", str(run_file), "--check"]
    assert run_command(check) == 2
    assert "predicts no run" in capsys.readouterr().err
    (run.folder / "plan.json").write_text(made.replace(prediction=PREDICTION).model_dump_json())
    assert run_command(check) == 0
    assert "predicted / done" in capsys.readouterr().out
    assert run_command([*check, "--json"]) == 0
    rows = {row["what"]: row["ratio"] for row in json.loads(capsys.readouterr().out)}
    assert rows["seconds"] == 2
