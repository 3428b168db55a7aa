"""kill -9 in the middle of training, of the driver and of the worker: no label and no step is lost or doubled, nothing stays behind."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:  # the module of the fixtures, which importlib mode does not put on the path
    from tests.integration.conftest import Kept, Line

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


ALL_ONCE = {(0, shard, row): 1 for shard in range(2) for row in range(NUM_IMAGES // 2)}


def worker_of(line: Line) -> int | None:
    return next((pid for pid, command in line.processes().items() if "RayTrainWorker" in command), None)


def still_at_work(line: Line) -> list[str]:
    """What could still train, label or answer. Two agents of Ray look for their dead cluster's head for a minute (a limit of Ray's own)."""
    return [command for command in line.processes().values() if command not in ("ray::DashboardAgent", "ray::RuntimeEnvAgent")]


def checkpoints(line: Line) -> list[Path]:
    return list(line.folder.glob("train/ray/checkpoint_*/students/manifest.json"))


def test_undisturbed(undisturbed: Line, kept_by: Callable[[Line], Kept]) -> None:
    """The oracle of the other tests: every label once, as many epochs of all images as asked for."""
    kept = kept_by(undisturbed)
    assert kept.labels == ALL_ONCE
    assert (kept.totals["images"], kept.totals["asked"]) == (EPOCHS * NUM_IMAGES, NUM_IMAGES)
    assert undisturbed.processes() == {}


def test_kill_9_of_the_driver_loses_and_doubles_no_label(
    prepared: Line, tmp_path: Path, wait_until: Callable[..., Any], kept_by: Callable[[Line], Kept]
) -> None:
    line = prepared.copy(tmp_path / "run")
    process = line.start("train")
    wait_until(lambda: len(kept_by(line).labels) >= 400 and checkpoints(line), process)
    process.kill()
    wait_until(lambda: not still_at_work(line), timeout_s=30)
    committed = kept_by(line).labels
    assert 400 <= len(committed) < NUM_IMAGES
    assert set(committed.values()) == {1}
    line.done("train")
    kept = kept_by(line)
    assert kept.labels == ALL_ONCE
    assert kept.totals["images"] == EPOCHS * NUM_IMAGES  # every batch trained on once: the next one was the next of the plan
    epochs = json.loads((line.folder / "train" / "stage.json").read_text())["result"]["epochs"]
    assert [row["epoch"] for row in epochs] == list(range(1, EPOCHS + 1))
    line.wait_for_nothing(timeout_s=90)


def test_kill_9_of_the_worker_changes_no_weight(
    prepared: Line, undisturbed: Line, tmp_path: Path, wait_until: Callable[..., Any], kept_by: Callable[[Line], Kept]
) -> None:
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
    kept = kept_by(line)
    assert kept.totals["images"] == kept.totals["from_store"] == EPOCHS * NUM_IMAGES
    assert (store / "manifest.jsonl").read_bytes() == before
    assert kept.weights == kept_by(undisturbed).weights
    assert line.processes() == {}


@pytest.mark.parametrize(("number", "code", "workers"), [(signal.SIGINT, 130, 1), (signal.SIGTERM, 143, 2)])
def test_a_signal_keeps_the_step_that_the_run_is_at(
    prepared: Line,
    undisturbed: Line,
    tmp_path: Path,
    wait_until: Callable[..., Any],
    kept_by: Callable[[Line], Kept],
    number: signal.Signals,
    code: int,
    workers: int,
) -> None:
    """No checkpoint is due in the first epoch but the signal's own. Ctrl-C reaches the whole process group, as from a terminal. One worker
    goes on, however many there were."""
    (store,) = undisturbed.folder.glob("store/*")
    line = prepared.copy(tmp_path / "run", f"store.path={store.parent}", "train.checkpoint_every_steps=100000")
    journal = line.folder / "train" / "metrics.jsonl"
    process = line.start("train", f"ray.num_workers={workers}")
    wait_until(lambda: journal.exists() and '"kind": "step"' in journal.read_text(), process)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    out, err = process.communicate(timeout=240)
    assert process.returncode == code, f"{out[-3000:]}\n{err[-3000:]}"
    assert "stopping after this step with a checkpoint" in out
    assert err.strip().splitlines() == ["distill: stopped; what is finished is kept, the same command goes on from there"]
    assert line.processes() == {}
    manifests = [json.loads(path.read_text()) for path in checkpoints(line)]
    last = max(manifests, key=lambda manifest: (manifest["epoch"], manifest["step"]))
    assert last["totals"]["images"] == (last["epoch"] * NUM_IMAGES / 100 + last["step"]) * 100
    assert 0 < last["totals"]["images"] < EPOCHS * NUM_IMAGES
    line.done("train")
    kept = kept_by(line)
    assert kept.totals["images"] == EPOCHS * NUM_IMAGES
    if workers == 1:  # two add up the same numbers in another order
        assert kept.weights == kept_by(undisturbed).weights


def test_a_run_that_ray_finished_but_nobody_wrote_down_is_taken_up(
    undisturbed: Line, tmp_path: Path, kept_by: Callable[[Line], Kept]
) -> None:
    """The driver died between Ray's last step and stage.json: the same command has nothing left to train."""
    line = undisturbed.copy(tmp_path / "run")
    record = line.folder / "train" / "stage.json"
    record.rename(record.with_name("wanted.json"))
    line.done("train")
    assert kept_by(line).weights == kept_by(undisturbed).weights
    assert kept_by(line).totals["images"] == EPOCHS * NUM_IMAGES
