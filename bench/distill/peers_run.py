"""Starts a peer in its own environment, reads its step lines as they come, and ends it when it has done enough.

Unit of data: one line, "step done, loss".
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import DEVNULL, PIPE, STDOUT, Popen
from typing import Any

import psutil

from bench.distill.cases import Prepared
from bench.distill.cell import Cell, Enough, Meter, steps_of

SCRIPTS = Path(__file__).parent / "peers"
ROOT = Path(__file__).parents[2]

_TIMM_LINE = re.compile(r"Train: \d+ \[\s*(\d+)/.*?Loss:\s*([-+\d.eE]+|nan)")
_LINE = re.compile(r"step (\d+) loss ([-+\d.eEnai]+)")


def measure_peer(prepared: Prepared, peer: str, python: Path, timm_train: Path | None, workers: int) -> Cell:
    """One peer, once, in a fresh process.

    Args:
        python: of the environment with peers/requirements.txt.
        timm_train: train.py of timm's repository; needed for the peers that begin with `timm`.
        workers: processes that decode.

    Raises:
        RuntimeError: it ended before it had done enough; the last lines say why.
    """
    case, said = prepared.case, [""]
    with tempfile.TemporaryDirectory(prefix="peer-", dir=prepared.folder) as folder:
        command = [str(python), *COMMANDS[peer](prepared, timm_train, workers, Path(folder))]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(prepared.threads)}
        with Popen(command, stdin=DEVNULL, stdout=PIPE, stderr=STDOUT, text=True, env=environment, cwd=folder) as process:
            # Its own peak is not in the meter: the children's is known only after their end.
            meter = Meter(case.warmup, steps_of(prepared, peer), case.batch, pids=[process.pid])
            try:
                for line in _lines(process, said):
                    meter.tell(*line)
            except Enough:
                return {**meter.cell(), "peak_mb": None}
            finally:
                _end(process)
    raise RuntimeError(f"{peer} ended after {len(meter.losses)} steps: {' | '.join(said[-15:])}")


def _lines(process: Popen[str], said: list[str]) -> Iterator[tuple[int, float]]:
    assert process.stdout is not None
    for line in process.stdout:
        said.append(line.rstrip())
        if found := _TIMM_LINE.search(line):
            yield int(found[1]) + 1, float(found[2])
        elif found := _LINE.match(line):
            yield int(found[1]), float(found[2])


def _end(process: Popen[str]) -> None:
    """It and its decoding processes."""
    family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.kill()
    for member in family:
        if member.is_running():
            member.kill()
    process.wait()


def _timm(distil: bool) -> Callable[[Prepared, Path | None, int, Path], list[str]]:
    def command(prepared: Prepared, timm_train: Path | None, workers: int, folder: Path) -> list[str]:
        if timm_train is None:
            raise RuntimeError("timm's train.py is not in its wheel: give --timm-train, see bench/distill/README.md")
        case = prepared.case
        size = str(case.image_size)
        options = {
            "--data-dir": [str(prepared.folder / "folders")],
            "--train-split": ["train"],
            "--val-split": ["test"],
            "--model": [case.student],
            "--num-classes": [str(case.num_classes)],
            "--input-size": ["3", size, size],
            "--mean": [str(value) for value in case.mean],
            "--std": [str(value) for value in case.std],
            "--train-interpolation": ["bilinear"],
            "--color-jitter": ["0"],
            "--batch-size": [str(case.batch)],
            "--device": [case.device],
            "--opt": ["sgd"],
            "--lr": [str(case.learning_rate)],
            "--weight-decay": ["1e-4"],
            "--epochs": ["1"],
            "--warmup-epochs": ["0"],
            "--workers": [str(workers)],
            "--log-interval": ["1"],
            "--output": [str(folder)],
            "--channels-last": [],
        }
        if case.device != "cpu":
            options |= {"--amp": [], "--amp-dtype": ["bfloat16"]}
        if distil:
            options |= {
                "--kd-model-name": ["bench_teacher"],
                "--kd-distill-type": ["logit"],
                "--kd-temperature": ["1"],
                "--distill-loss-weight": ["1"],
                "--task-loss-weight": ["0"],
            }
        weights = str(prepared.folder / "teacher.pth")
        head = [str(SCRIPTS / "timm_kd.py"), str(timm_train), str(prepared.threads), case.teacher, weights, str(case.num_classes)]
        return [*head, *(word for name, values in options.items() for word in (name, *values))]

    return command


def _given(script: str) -> Callable[[Prepared, Path | None, int, Path], list[str]]:
    def command(prepared: Prepared, timm_train: Path | None, workers: int, folder: Path) -> list[str]:
        case = prepared.case
        given: dict[str, Any] = {
            "folder": str(prepared.folder / "folders"),
            "teacher": case.teacher,
            "student": case.student,
            "weights": str(prepared.folder / "teacher.pth"),
            "num_classes": case.num_classes,
            "image_size": case.image_size,
            "batch": case.batch,
            "threads": prepared.threads,
            "workers": workers,
            "learning_rate": case.learning_rate,
            "mean": case.mean,
            "std": case.std,
            "channels_last": True,
            "device": case.device,
        }
        return [str(SCRIPTS / script), json.dumps(given)]

    return command


COMMANDS: dict[str, Callable[[Prepared, Path | None, int, Path], list[str]]] = {
    "timm": _timm(distil=True),
    "timm-pure": _timm(distil=False),
    "torchdistill": _given("torchdistill_kd.py"),
    "inline": _given("inline_kd.py"),
}
"""Peer -> what its Python is started with. `timm-pure` is timm without a teacher: a second control, by others."""
