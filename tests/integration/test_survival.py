"""kill -9 in the middle of training, of the driver and of the worker: no label and no step is lost or doubled, nothing stays behind."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq
import pytest

if TYPE_CHECKING:  # the module of the fixtures, which importlib mode does not put on the path
    from tests.integration.conftest import Line

pytestmark = pytest.mark.integration

STUDENTS = ("resnet10-quarter", "resnet10-eighth")
NUM_IMAGES = 2000
EPOCHS = 2


@pytest.fixture(scope="module")
def prepared(new_line: Callable[..., Line], tmp_path_factory: pytest.TempPathFactory) -> Line:
    """A run with its teacher exported, nothing labelled yet."""
    options = ("pretrain.epochs=0", "finetune.epochs=1", f"train.epochs={EPOCHS}", "train.checkpoint_every_steps=2")
    line = new_line(tmp_path_factory.mktemp("survival") / "run", *options)
    for verb in ("pretrain", "finetune", "export-teacher"):
        line.done(verb)
    return line


@pytest.fixture(scope="module")
def undisturbed(prepared: Line, tmp_path_factory: pytest.TempPathFactory) -> Line:
    """The same run, trained without a fault, its store full."""
    line = prepared.copy(tmp_path_factory.mktemp("undisturbed") / "run")
    line.done("train")
    return line


def labels_held(line: Line) -> Counter[tuple[int, int, int]]:
    """How often the store holds each (view, shard, row), over all segments that the manifest names; every file must be what was written."""
    found: Counter[tuple[int, int, int]] = Counter()
    for manifest in line.folder.glob("store/*/manifest.jsonl"):
        for row in manifest.read_text().splitlines():
            if row:
                segment = json.loads(row)
                path = manifest.parent / segment["file"]
                assert hashlib.sha256(path.read_bytes()).hexdigest() == segment["sha256"]
                found.update((segment["view"], segment["shard"], number) for number in pq.read_table(path)["row"].to_pylist())
    return found


ALL_ONCE = {(0, shard, row): 1 for shard in range(2) for row in range(NUM_IMAGES // 2)}


def weights(line: Line) -> dict[str, str]:
    """sha256 of each student's final weights."""
    return {
        name: hashlib.sha256((line.folder / "train" / "students" / name / "weights.safetensors").read_bytes()).hexdigest()
        for name in STUDENTS
    }


def totals(line: Line) -> dict[str, float]:
    found: dict[str, float] = json.loads((line.folder / "train" / "stage.json").read_text())["result"]["totals"]
    return found


def worker_of(line: Line) -> int | None:
    return next((pid for pid, command in line.processes().items() if "RayTrainWorker" in command), None)


def still_at_work(line: Line) -> list[str]:
    """What could still train, label or answer. Two agents of Ray look for their dead cluster's head for a minute (a limit of Ray's own)."""
    return [command for command in line.processes().values() if command not in ("ray::DashboardAgent", "ray::RuntimeEnvAgent")]


def checkpoints(line: Line) -> list[Path]:
    return list(line.folder.glob("train/ray/checkpoint_*/students/manifest.json"))


def test_undisturbed(undisturbed: Line) -> None:
    """The oracle of the other tests: every label once, as many epochs of all images as asked for."""
    assert labels_held(undisturbed) == ALL_ONCE
    counted = totals(undisturbed)
    assert (counted["images"], counted["asked"]) == (EPOCHS * NUM_IMAGES, NUM_IMAGES)
    assert undisturbed.processes() == {}


def test_kill_9_of_the_driver_loses_and_doubles_no_label(prepared: Line, tmp_path: Path, wait_until: Callable[..., Any]) -> None:
    line = prepared.copy(tmp_path / "run")
    process = line.start("train")
    wait_until(lambda: len(labels_held(line)) >= 400 and checkpoints(line), process)
    process.kill()
    wait_until(lambda: not still_at_work(line), timeout_s=30)
    committed = labels_held(line)
    assert 400 <= len(committed) < NUM_IMAGES
    assert set(committed.values()) == {1}
    line.done("train")
    assert labels_held(line) == ALL_ONCE
    counted = totals(line)
    assert counted["images"] == EPOCHS * NUM_IMAGES  # every batch trained on once: the next one was the next of the plan
    epochs = json.loads((line.folder / "train" / "stage.json").read_text())["result"]["epochs"]
    assert [row["epoch"] for row in epochs] == list(range(1, EPOCHS + 1))
    line.wait_for_nothing(timeout_s=90)


def test_kill_9_of_the_worker_changes_no_weight(prepared: Line, undisturbed: Line, tmp_path: Path, wait_until: Callable[..., Any]) -> None:
    (store,) = undisturbed.folder.glob("store/*")
    line = prepared.copy(tmp_path / "run", f"store.path={store.parent}")
    before = (store / "manifest.jsonl").read_bytes()
    process = line.start("train")
    wait_until(lambda: len(checkpoints(line)) >= 2, process)
    victim = worker_of(line)
    assert victim is not None
    os.kill(victim, signal.SIGKILL)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, f"{out[-3000:]}\n{err[-3000:]}"
    assert totals(line)["images"] == totals(line)["from_store"] == EPOCHS * NUM_IMAGES
    assert (store / "manifest.jsonl").read_bytes() == before
    assert weights(line) == weights(undisturbed)
    assert line.processes() == {}


def test_a_run_that_ray_finished_but_nobody_wrote_down_is_taken_up(undisturbed: Line, tmp_path: Path) -> None:
    """The driver died between Ray's last step and stage.json: the same command has nothing left to train."""
    line = undisturbed.copy(tmp_path / "run")
    record = line.folder / "train" / "stage.json"
    record.rename(record.with_name("wanted.json"))
    line.done("train")
    assert weights(line) == weights(undisturbed)
    assert totals(line)["images"] == EPOCHS * NUM_IMAGES
