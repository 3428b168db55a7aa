"""kill -9 again and again, of the driver, of the training worker and of Triton, at random moments of one run.

A kill comes at the latest when its share of the steps is done, so that a quick machine gets them all in.

The run must end where the undisturbed one ends: every label once, every batch trained on once, and with one worker the same weights to the
last bit; with two, students as good within the noise of the test images.
Every victim has its turn. `DISTILL_KILLS` says how many kills with one worker (docs/training.md says what was run; with two it is one of
each), `DISTILL_OUTAGE_S` for how long Triton stays away once.
"""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from teacher_server.triton_home import TritonHome
from teacher_server.triton_process import TritonProcess

if TYPE_CHECKING:  # the module of the fixtures, which importlib mode does not put on the path
    from tests.integration.conftest import Kept, Line

pytestmark = pytest.mark.integration

NUM_KILLS = int(os.environ.get("DISTILL_KILLS", "4"))
OUTAGE_S = float(os.environ.get("DISTILL_OUTAGE_S", "5"))
SEED = int(os.environ.get("DISTILL_KILLS_SEED", "0"))
EPOCHS = 4 + NUM_KILLS // 2
NUM_STEPS = 20 * EPOCHS
VICTIMS = ("driver", "worker", "triton")

logger = logging.getLogger(__name__)


@dataclass
class Chaos:
    """Kills at random moments, and what was killed so far. One driver at a time works on `line`."""

    line: Line
    triton: TritonProcess
    wait_until: Callable[..., Any]
    num_kills: int = NUM_KILLS
    random: random.Random = field(default_factory=lambda: random.Random(SEED))
    killed: Counter[str] = field(default_factory=Counter)
    turns: list[str] = field(default_factory=list)
    """Who is killed next, last first."""

    def go(self) -> None:
        """Run `distill train` to its end, with `num_kills` kills on the way or, if it ends before, as many as there was time for."""
        process = self.line.start("train")
        while True:
            if self.killed.total() < self.num_kills and self._work_for(process, self.random.uniform(0.5, 8)):
                process = self._kill(process)
                continue
            out, err = process.communicate(timeout=120 + 60 * EPOCHS)  # all of it anew, and more
            if process.returncode == 0:
                return
            # More workers were killed than Ray starts again, or Triton while the driver started: the same command goes on.
            assert "run it again" in err or "gives no label" in err, f"{out[-3000:]}\n{err[-3000:]}"
            process = self.line.start("train")

    def _work_for(self, process: subprocess.Popen[str], seconds: float) -> bool:
        """Wait until a worker is there and for so long after, but not past this kill's share of the steps.

        Returns:
            Whether the driver still runs.
        """
        with suppress(pytest.fail.Exception):  # it ended: well or not, the caller looks
            self.wait_until(lambda: process.poll() is not None or self.worker() is not None, timeout_s=120)
        deadline = time.monotonic() + seconds
        due = NUM_STEPS * (self.killed.total() + 1) // (self.num_kills + 2)  # rows come late: two shares are left at the last
        while time.monotonic() < deadline and process.poll() is None and self.step() < due:
            time.sleep(0.05)
        return process.poll() is None

    def step(self) -> int:
        """The last step that was told of."""
        journal = self.line.folder / "train" / "metrics.jsonl"
        told = []
        for line in journal.read_text().splitlines() if journal.exists() else []:
            with suppress(ValueError):  # what a kill left of a line
                told.append(json.loads(line))
        return max((row["step"] for row in told if row["kind"] == "step"), default=0)

    def worker(self) -> int | None:
        """Process id of the training worker."""
        return next((pid for pid, command in self.line.processes().items() if "RayTrainWorker" in command), None)

    def _kill(self, process: subprocess.Popen[str]) -> subprocess.Popen[str]:
        """One kill; it counts only if it hit somebody."""
        self.turns = self.turns or self.random.sample(VICTIMS, len(VICTIMS))
        victim = self.turns.pop()
        if victim == "driver":
            process.kill()
            process.communicate()
            self.killed[victim] += process.returncode == -signal.SIGKILL
            return self.line.start("train")
        if victim == "worker":
            pid = self.worker()
            with suppress(ProcessLookupError):
                if pid is not None:
                    os.kill(pid, signal.SIGKILL)
                    self.killed[victim] += 1
            return process
        assert self.triton.server_pid is not None
        os.kill(self.triton.server_pid, signal.SIGKILL)
        self.killed[victim] += 1
        time.sleep(OUTAGE_S if self.killed["triton"] == 1 else self.random.uniform(0, 5))
        self.triton.restart()
        return process


@pytest.fixture(scope="module")
def prepared(new_line: Callable[..., Line], tmp_path_factory: pytest.TempPathFactory) -> Line:
    """A run with its teacher exported, nothing labelled yet; two views, so that teacher and store are both asked in later epochs."""
    options = ("pretrain.epochs=0", "finetune.epochs=1", f"train.epochs={EPOCHS}", "train.num_views=2", "train.checkpoint_every_steps=2")
    line = new_line(tmp_path_factory.mktemp("kills") / "run", *options)
    for verb in ("pretrain", "finetune", "export-teacher"):
        line.done(verb)
    return line


@pytest.fixture(scope="module")
def triton(home: TritonHome, prepared: Line, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonProcess]:
    """The teacher's Triton, which nobody but the test starts again."""
    repository = prepared.folder / "model_repository"
    (model,) = [folder.name for folder in repository.iterdir() if (folder / "config.pbtxt").exists()]
    with TritonProcess(home, repository, model, tmp_path_factory.mktemp("triton")) as process:
        yield process


@pytest.mark.parametrize("num_workers", [1, 2])
def test_many_kills_change_nothing(
    prepared: Line,
    triton: TritonProcess,
    tmp_path: Path,
    wait_until: Callable[..., Any],
    kept_by: Callable[[Line], Kept],
    num_workers: int,
) -> None:
    asked = (f"server.triton.url={triton.url}", "server.backend=triton", f"ray.num_workers={num_workers}")
    undisturbed = prepared.copy(tmp_path / "undisturbed", *asked)
    undisturbed.done("train")
    line = prepared.copy(tmp_path / "disturbed", *asked)
    chaos = Chaos(line, triton, wait_until, NUM_KILLS if num_workers == 1 else len(VICTIMS))
    chaos.go()
    logger.info("killed: %s", dict(chaos.killed))
    assert chaos.step() > NUM_STEPS // 2  # the journal is read rightly
    assert chaos.killed.total() == chaos.num_kills, f"the run ended after {chaos.killed}: make it longer"
    expected, found = kept_by(undisturbed), kept_by(line)
    assert set(expected.labels.values()) == {1}
    assert found.labels == expected.labels
    if num_workers == 1:
        assert found.weights == expected.weights
    before, after = (json.loads((run.folder / "train" / "stage.json").read_text())["result"]["epochs"][-1] for run in (undisturbed, line))
    assert {name: pytest.approx(top1, abs=0.05) for name, top1 in before["top1"].items()} == after["top1"]
    assert found.totals["images"] == expected.totals["images"]
    line.wait_for_nothing(timeout_s=90)


def test_when_patience_ends_what_was_trained_is_kept(
    prepared: Line, triton: TritonProcess, tmp_path: Path, wait_until: Callable[..., Any], kept_by: Callable[[Line], Kept]
) -> None:
    """The only checkpoint of the first epoch is the one that the end of the patience leaves."""
    epochs = 2
    line = prepared.copy(
        tmp_path / "run",
        *(f"server.triton.url={triton.url}", "server.backend=triton", f"train.epochs={epochs}"),
        *("train.teacher_patience_s=3", "train.checkpoint_every_steps=100000"),
    )
    process = line.start("train")
    journal = line.folder / "train" / "metrics.jsonl"
    wait_until(lambda: journal.exists() and '"kind": "step"' in journal.read_text(), process)
    assert triton.server_pid is not None
    os.kill(triton.server_pid, signal.SIGKILL)
    try:
        _, err = process.communicate(timeout=240)
    finally:
        triton.restart()
    assert process.returncode == 1
    assert "limit train.teacher_patience_s=3" in err
    manifests = [json.loads(path.read_text()) for path in line.folder.glob("train/ray/checkpoint_*/students/manifest.json")]
    last = max(manifests, key=lambda manifest: (manifest["epoch"], manifest["step"]))
    assert 0 < last["totals"]["images"] == (last["epoch"] * 20 + last["step"]) * 100
    line.done("train", "train.teacher_patience_s=60")
    kept = kept_by(line)
    assert set(kept.labels.values()) == {1}
    assert kept.totals["images"] == epochs * 2000
