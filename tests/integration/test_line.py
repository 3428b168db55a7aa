"""The whole line through the real command: real Triton where it can run, real Ray, the shipped images at smoke size."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tarfile
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from student_trainer.store_claims import Claims
from student_trainer.store_files import open_files

if TYPE_CHECKING:  # the module of the fixtures, which importlib mode does not put on the path
    from tests.integration.conftest import Line

pytestmark = pytest.mark.integration

STUDENTS = ("resnet10-quarter", "resnet10-eighth")
NUM_IMAGES = 2000
SHARD = Path(__file__).parents[2] / "data" / "fashion-mnist" / "train-000000.tar.gz"


@pytest.fixture(scope="module")
def finished(new_line: Callable[..., Line], tmp_path_factory: pytest.TempPathFactory) -> tuple[Line, str]:
    """A quickstart that ran to its end, and what it said."""
    line = new_line(tmp_path_factory.mktemp("line") / "run")
    return line, line.done("quickstart")


def stage_result(line: Line, stage: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((line.folder / stage / "stage.json").read_text())["result"]
    return result


def segments(line: Line) -> list[str]:
    (manifest,) = line.folder.glob("store/*/manifest.jsonl")
    return [row for row in manifest.read_text().splitlines() if row]


def test_images_to_edge_students_and_a_report(finished: tuple[Line, str], backend: str) -> None:
    line, said = finished
    report = line.folder / "report" / "report.html"
    assert str(report) in said
    assert "curl --data-binary" in said
    assert ("teacher served by triton" in said) == (backend == "server.backend=triton")
    numbers = json.loads(report.with_suffix(".json").read_text())
    for student in STUDENTS:
        assert (line.folder / "export-student" / student / f"{student}.fp32.onnx").stat().st_size > 10_000
        entry = numbers["stages"]["evaluate"]["students"][student]
        assert f"{entry['scores']['top1']:.1%}" in report.read_text()
        assert entry["scores"]["num_images"] == 1000
    assert len(numbers["stages"]["train"]["epochs"]) == 2
    assert line.processes() == {}


def test_the_second_epoch_reads_what_the_first_asked_for(finished: tuple[Line, str]) -> None:
    line, _ = finished
    result = stage_result(line, "train")
    totals = result["totals"]
    assert (totals["images"], totals["asked"], totals["from_store"]) == (2 * NUM_IMAGES, NUM_IMAGES, NUM_IMAGES)
    assert result["store"]["num_labels"] == NUM_IMAGES


def test_a_second_quickstart_reuses_everything(finished: tuple[Line, str]) -> None:
    line, _ = finished
    stages = {path: path.stat().st_mtime_ns for path in line.folder.glob("*/stage.json")}
    assert len(stages) == 7
    said = line.done("quickstart")
    assert said.count("reused") == 6
    assert "serve" not in said
    assert {path: path.stat().st_mtime_ns for path in line.folder.glob("*/stage.json")} == stages


def test_labelling_ahead_asks_for_nothing_that_is_there(finished: tuple[Line, str]) -> None:
    line, _ = finished
    before = segments(line)
    assert f"store: {NUM_IMAGES} labels" in line.done("label")
    assert segments(line) == before
    assert line.processes() == {}


def test_two_workers_pretrain_and_fine_tune_as_one_does(new_line: Callable[..., Line], tmp_path: Path) -> None:
    """On Ray: batches, negatives and batch norm are those of both."""
    line = new_line(tmp_path / "run", "ray.num_workers=2", "pretrain.precision=fp32", "finetune.precision=fp32")
    alone = new_line(tmp_path / "alone", "pretrain.precision=fp32", "finetune.precision=fp32")
    for stage in ("pretrain", "finetune"):
        line.done(stage)
        alone.done(stage)
        assert stage_result(line, stage)["steps"] == stage_result(alone, stage)["steps"] > 0
    assert stage_result(line, "pretrain")["loss"] == pytest.approx(stage_result(alone, "pretrain")["loss"], rel=0.01)
    one, two = (stage_result(run, "finetune")["scores"]["nll"] for run in (alone, line))
    assert two == pytest.approx(one, rel=0.1), "rounding of pretraining has gone through eight more steps"


def test_stored_labels_against_the_teacher(finished: tuple[Line, str], tmp_path: Path) -> None:
    line, _ = finished
    ours = ("--config", "recipes/quickstart.yaml", "--json")
    planned = json.loads(line.done("store plan", *ours, "--sample", "64"))
    assert (planned["num_images"], planned["num_sampled"]) == (NUM_IMAGES, 64)
    (store,) = line.folder.glob("store/*")
    found = json.loads(line.done("store verify", *ours, "--against-teacher", "40", str(store)))
    assert (found["where"], found["num_checked"], found["num_beyond"]) == (str(store), 40, 0)
    other = tmp_path / "other"
    shutil.copytree(store, other)
    identity = json.loads((other / "store.json").read_text())
    (other / "store.json").write_text(json.dumps({**identity, "seed": 7}))
    refused = line.run("store verify", *ours, "--against-teacher", "40", str(other))
    assert refused.returncode != 0
    assert "belongs to another seed" in refused.stderr
    assert line.run("store verify", *ours, "--against-teacher", "40", "--repair").returncode == 2


def claimants(store: Path) -> set[int]:
    """Processes that hold a claim just now."""
    found = set()
    for path in store.glob("claims/*/*.json"):
        with suppress(OSError, ValueError, KeyError):  # given back, or being written
            found.add(json.loads(path.read_text())["process"])
    return found


def test_two_labelling_jobs_at_once_of_which_one_is_killed(
    finished: tuple[Line, str], tmp_path: Path, wait_until: Callable[..., Any], kept_by: Callable[[Line], Any]
) -> None:
    """Two whole commands, each with its own Ray and its own teacher, on one empty store: every label once."""
    views = 16
    one, two = (finished[0].copy(tmp_path / name, f"train.num_views={views}", f"store.path={tmp_path / 'store'}") for name in "ab")
    two.mark = uuid.uuid4().hex  # its processes are told from the other's
    (store,) = (tmp_path / "store" / made.name for made in finished[0].folder.glob("store/*"))
    with Claims(open_files(str(store))) as all_units:  # neither is done before the other begins, however fast the machine
        for view in range(views):
            assert all(all_units.take(view, shard) for shard in range(2))
        processes = [line.start("label") for line in (one, two)]
        try:
            at_work: set[str] = set()  # the actors come, find all units taken, and go; others follow while the job waits

            def both_at_work() -> bool:
                at_work.update(line.mark for line in (one, two) if any("LabelUnits" in command for command in line.processes().values()))
                return len(at_work) == 2

            wait_until(both_at_work, processes[0])
            all_units.close()
            wait_until(lambda: claimants(store) & two.processes().keys(), processes[1])
        finally:
            while pids := two.processes():  # some are born while others die
                for pid in pids:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                time.sleep(0.1)
            processes[1].communicate(timeout=60)
    out, err = processes[0].communicate(timeout=600)
    assert processes[0].returncode == 0, err[-3000:]
    assert f"store: {views * NUM_IMAGES} labels" in out
    shutil.rmtree(one.folder / "store")
    (tmp_path / "store").rename(one.folder / "store")
    labels = kept_by(one).labels
    assert len(labels) == views * NUM_IMAGES
    assert set(labels.values()) == {1}


def test_a_sweep_to_its_page(finished: tuple[Line, str], tmp_path: Path) -> None:
    line = finished[0].copy(tmp_path / "run")
    grid = "sweep={grid: {network.width_multiplier: [0.0625, 0.125], optimizer.learning_rate: [0.1, 0.01]}, epochs: 2}"
    said = line.done("sweep", grid, "train.students=[{name: s, network: {depth: 10, stem: cifar}}]", "train.held_out_images=100")
    page = line.folder / "report" / "sweep.html"
    assert str(page) in said
    rows = stage_result(line, "sweep")["ranking"]
    assert sorted(row["student"] for row in rows) == ["s.1", "s.2", "s.3", "s.4"]
    ended = [row["ended"] for row in rows]
    assert None in ended
    assert any(why and why.startswith("halving") for why in ended)
    for row in rows:
        assert row["latency_ms"] > 0
        assert row["size_bytes"] > 10_000
        assert (row["top1"] is None) == (row["ended"] is not None)
    text = page.read_text()
    assert all(row["student"] in text for row in rows)
    assert "top-1 on the test images" in text
    assert stage_result(line, "sweep")["totals"]["asked"] <= 100, "of the held-out crops; all others are in the store"


def test_ctrl_c_in_the_middle_of_training_leaves_nothing(
    finished: tuple[Line, str], tmp_path: Path, wait_until: Callable[..., Any], listening: Callable[[], set[int]]
) -> None:
    line = finished[0].copy(tmp_path / "run", "train.epochs=1000")
    process = line.start("quickstart")
    journal = line.folder / "train" / "metrics.jsonl"
    started = time.time()
    wait_until(lambda: journal.exists() and journal.stat().st_mtime > started and journal.stat().st_size, process)
    ports, processes = line.ports(), line.processes()
    assert len(ports) > 3
    assert any("RayTrainWorker" in command for command in processes.values())
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err[-3000:]
    assert err.strip().splitlines() == ["distill: stopped; what is finished is kept, the same command goes on from there"]
    line.wait_for_nothing(timeout_s=15)
    assert not ports & listening()


def test_a_path_that_does_not_exist_is_one_line(new_line: Callable[..., Line], tmp_path: Path) -> None:
    made = new_line(tmp_path / "run").run("quickstart", "data.unlabelled.path=nowhere/at-all")
    assert made.returncode == 2
    assert made.stderr == "distill: nowhere/at-all does not exist; check the path\n"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A flat folder of 60 images, one of them cut off in the middle."""
    folder = tmp_path / "photos"
    with tarfile.open(SHARD) as tar:
        members = [member for member in tar.getmembers() if member.name.endswith(".png")][:60]
        tar.extractall(folder, members, filter="data")
    bad = sorted(folder.iterdir())[7]
    bad.write_bytes(bad.read_bytes()[:100])
    bad.rename(folder / "bad.png")
    return folder


def test_a_bad_image_is_listed_and_the_run_goes_on(new_line: Callable[..., Line], tmp_path: Path, photos: Path) -> None:
    line = new_line(tmp_path / "run", f"data.unlabelled.path={photos}", "pretrain.global_batch=20", "data.max_rejected_share=0.05")
    line.done("pretrain")
    rejected = [json.loads(row) for row in (line.folder / "rejected.jsonl").read_text().splitlines()]
    assert [row["image_id"] for row in rejected] == ["bad.png"]
    assert rejected[0]["reason"]
    assert (line.folder / "pretrain" / "stage.json").exists()


def test_too_many_bad_images_stop_the_run_with_the_list(new_line: Callable[..., Line], tmp_path: Path, photos: Path) -> None:
    line = new_line(tmp_path / "run", f"data.unlabelled.path={photos}", "pretrain.global_batch=20")
    made = line.run("pretrain")
    assert made.returncode == 2
    (said,) = made.stderr.splitlines()
    assert "over the limit of 1.00%" in said
    assert str(line.folder / "rejected.jsonl") in said
    assert not (line.folder / "pretrain" / "stage.json").exists()
