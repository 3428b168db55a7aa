"""Where the time of one arm goes: py-spy's samples of every Python thread of a cell, sorted into the phases of a step.

The training loop's own thread: shares of its wall time, which add up to 1. The other threads (decoding, labels): seconds of work for each
second of the loop; they run beside it, on the same cores. A thread that waits for the interpreter lock counts as working.

Unit of data: one sample, a thread's stack.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from bench.distill.cases import Prepared

RATE = 100
"""Samples a second."""

Rule = tuple[str, str, str]
"""End of a file name, function ("" for any), phase. The innermost frame that has a rule decides."""

LOOP: tuple[Rule, ...] = (
    ("torch/_tensor.py", "backward", "backward"),
    ("distill/optimizers.py", "", "optimizer"),
    ("torch/optim/optimizer.py", "", "optimizer"),
    ("distill/models/classifier.py", "forward", "forward"),
    ("student_trainer/loss.py", "", "loss"),
    ("student_trainer/agreement.py", "", "agreement"),
    ("student_trainer/step_rows.py", "", "telling"),
    ("student_trainer/stream.py", "epoch", "waits for a batch"),
    ("distill/loader.py", "epoch", "waits for a batch"),
    ("student_trainer/lessons.py", "", "batch to tensors"),
    ("bench/distill/cell.py", "tell", "the bench itself"),
    ("student_trainer/students.py", "step", "step, other"),
    ("student_trainer/worker.py", "train_worker", "loop, other"),
    ("bench/distill/cell.py", "pure", "loop, other"),
)
BESIDE: tuple[Rule, ...] = (
    ("distill/decoding.py", "", "decode"),
    ("distill/crops.py", "", "crop"),
    ("distill/sources/tar_shards.py", "", "read shards"),
    ("distill/loader.py", "", "collate"),
    ("student_trainer/store.py", "", "label read"),
    ("distill/soft_labels.py", "", "label encode and decode"),
    ("student_trainer/label_path.py", "", "label path"),
    ("teacher_server/triton.py", "", "teacher's client"),
    ("teacher_server/embedded.py", "", "teacher"),
    ("student_trainer/stream.py", "", "stream"),
)
NOT_THE_LOOP = ("open_lessons", "new_students", "_start", "_finish", "__exit__", "evaluate", "checkpoint", "load_answers")
"""Functions of the beginning and the end."""
IDLE = (
    ("threading.py", "wait"),
    ("threading.py", "_wait_for_tstate_lock"),
    ("queue.py", ""),
    ("selectors.py", "select"),
    ("concurrent/futures/thread.py", "_worker"),
    ("concurrent/futures/_base.py", ""),
)
"""Innermost frames of a thread that has nothing to do."""


def profile(prepared: Prepared, arm: str, py_spy: Path) -> dict[str, Any]:
    """Phases of one arm.

    Returns:
        `loop`: phase -> share of the loop's time; `beside`: phase -> seconds of work a second of the loop.

    Raises:
        subprocess.CalledProcessError: the cell or py-spy failed.
    """
    with tempfile.TemporaryDirectory(dir=prepared.folder) as folder:
        raw = Path(folder) / "stacks"
        cell = [sys.executable, "-m", "bench.distill.cell", prepared.to_json(), arm]
        options = ["--rate", str(RATE), "--format", "raw", "--threads", "--idle", "--output", str(raw)]
        subprocess.run([str(py_spy), "record", *options, "--", *cell], check=True, stdout=subprocess.DEVNULL)
        return sort_samples(raw.read_text().splitlines())


def sort_samples(lines: list[str]) -> dict[str, Any]:
    """py-spy's raw lines, `thread;frame (file:line);... COUNT`, outermost frame first, to phases."""
    loop: Counter[str] = Counter()
    beside: Counter[str] = Counter()
    for line in lines:
        stack, _, count = line.rpartition(" ")
        thread, *texts = stack.split(";")
        frames = [_frame(text) for text in texts]
        is_loop = any(_fits(frame, ("student_trainer/worker.py", "train_worker")) for frame in frames) or any(
            _fits(frame, ("bench/distill/cell.py", "pure")) for frame in frames
        )
        if is_loop and any(function in NOT_THE_LOOP for function, _ in frames):
            continue
        if is_loop:
            loop[_phase(frames, LOOP) or "loop, other"] += int(count)
        elif frames and not thread.endswith("MainThread") and not any(_fits(frames[-1], idle) for idle in IDLE):
            phase = _phase(frames, BESIDE)
            if phase:
                beside[phase] += int(count)
    total = max(1, loop.total())
    return {
        "samples": loop.total(),
        "loop": {phase: count / total for phase, count in loop.most_common()},
        "beside": {phase: count / total for phase, count in beside.most_common()},
    }


def _frame(text: str) -> tuple[str, str]:
    """`Class.function (path/file.py:12)` -> function, path/file.py."""
    function, _, place = text.partition(" (")
    return function.rpartition(".")[2], place.rpartition(":")[0] or place.rstrip(")")


def _fits(frame: tuple[str, str], place: tuple[str, str]) -> bool:
    return frame[1].endswith(place[0]) and place[1] in ("", frame[0])


def _phase(frames: list[tuple[str, str]], rules: tuple[Rule, ...]) -> str | None:
    for frame in reversed(frames):
        for file, function, phase in rules:
            if _fits(frame, (file, function)):
                return phase
    return None
