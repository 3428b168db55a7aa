"""The real `distill` command, run as a user runs it, on the shipped images at smoke size; and a look at what it leaves behind.

Unit of data: one `Line`: a run folder with its overrides. Everything that its commands start can be found again by a mark in its
environment, or by the run folder on its command line.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from teacher_server.triton_home import TritonHome, find_triton, triton_home, triton_supported

ROOT = Path(__file__).parents[2]
DISTILL = Path(sys.executable).with_name("distill")
MARK = "DISTILL_TEST_RUN"
LISTENING = "0A"
TIMEOUT_S = 900

SMOKE = (
    "data.unlabelled.path=data/fashion-mnist/train-00000[0-1].tar.gz",
    "data.labelled.path=data/fashion-mnist/train-000000.tar.gz",
    "data.test.path=data/fashion-mnist/test-000000.tar.gz",
    "pretrain.epochs=1",
    "pretrain.network.width_multiplier=0.0625",
    "finetune.epochs=2",
    "finetune.global_batch=25",
    "teacher.num_parity_images=64",
    "train.epochs=2",
    "train.num_views=1",
    "train.global_batch=100",  # divides the 2000 images, so that every epoch sees all of them
    "train.students.0.network.width_multiplier=0.125",
    "train.students.1.network.width_multiplier=0.0625",
    "edge.latency_rounds=1",
    "edge.latency_repeats=5",
    "edge.num_parity_images=64",
    "edge.num_calibration_images=64",
    "edge.peak_memory=false",
    "edge.quantised_training.when=never",
    "edge.sensitive_layers.max_layers=0",
    "ray.threads_per_worker=1",  # on busy cores two threads of so small a network wait for each other longer than they compute
)
"""2000 unlabelled images in 2 shards, 100 labels, 1000 test images; about a minute on two free cores."""


def _wait_until(what: Callable[[], Any], process: subprocess.Popen[str] | None = None, timeout_s: float = 300) -> Any:
    """The first true answer of `what`; fails when `process` ends before, or after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not (answer := what()):
        if process is not None and process.poll() is not None:
            out, err = process.communicate()
            pytest.fail(f"ended with {process.returncode} while it was waited for:\n{out[-3000:]}\n{err[-3000:]}")
        if time.monotonic() > deadline:
            pytest.fail(f"waited {timeout_s:g} s in vain")
        time.sleep(0.05)
    return answer


@dataclass
class Line:
    """One run folder and the overrides that every command on it gets."""

    folder: Path
    overrides: tuple[str, ...]
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)
    started: list[subprocess.Popen[str]] = field(default_factory=list, repr=False)

    def start(self, verb: str, *more: str) -> subprocess.Popen[str]:
        """The command, running."""
        command = [str(DISTILL), *verb.split(), f"run_dir={self.folder}", *self.overrides, *more]
        environment = {**os.environ, MARK: self.mark}
        pipe = subprocess.PIPE
        # A session of its own, so that a signal to its leader reaches nobody else.
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True, start_new_session=True)
        self.started.append(process)
        return process

    def run(self, verb: str, *more: str) -> subprocess.CompletedProcess[str]:
        """The command, run to its end."""
        process = self.start(verb, *more)
        try:
            out, err = process.communicate(timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            pytest.fail(f"distill {verb} did not end within {TIMEOUT_S} s:\n{out[-3000:]}\n{err[-3000:]}")
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def done(self, verb: str, *more: str) -> str:
        """What the command said; it must end with exit code 0."""
        made = self.run(verb, *more)
        assert made.returncode == 0, f"{made.stdout[-3000:]}\n{made.stderr[-3000:]}"
        return made.stdout

    def copy(self, folder: Path, *more: str) -> Line:
        """The same run, as far as it is, in another folder."""
        shutil.copytree(self.folder, folder)
        return Line(folder, (*self.overrides, *more), self.mark, self.started)

    def kill(self) -> None:
        """End everything that still runs."""
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in self.started:
            process.wait()
            for pipe in (process.stdout, process.stderr):
                if pipe is not None:
                    pipe.close()

    def wait_for_nothing(self, timeout_s: float) -> None:
        """Return when nothing runs any more; fails with what still does."""
        deadline = time.monotonic() + timeout_s
        while left := self.processes():
            if time.monotonic() > deadline:
                pytest.fail(f"still there after {timeout_s:g} s: {left}")
            time.sleep(0.1)

    def processes(self) -> dict[int, str]:
        """pid -> command line of everything that this line's commands started and that still runs."""
        found: dict[int, str] = {}
        parents: dict[int, int] = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                environment = (entry / "environ").read_bytes()
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue  # ended while we looked
            if command and (f"{MARK}={self.mark}".encode() in environment or str(self.folder) in command):
                found[int(entry.name)] = command
        for pid, parent in parents.items():  # a process that wrote its title over its environment, below one of ours
            if parent in found and pid not in found:
                found[pid] = f"child of {parent}"
        found.pop(os.getpid(), None)
        return found

    def ports(self) -> set[int]:
        """TCP ports that this line's processes listen on."""
        inodes = set()
        for pid in self.processes():
            try:
                links = [os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()]
            except OSError:
                continue
            inodes |= {link[8:-1] for link in links if link.startswith("socket:[")}
        return _listening(inodes)


@dataclass(frozen=True)
class Kept:
    """What a run holds: how often each label, which weights at the end, what it counted."""

    labels: Counter[tuple[int, int, int]]
    """(view, shard, row) -> how often, over all segments that the manifests name; every file must be what was written."""
    weights: dict[str, str]
    """Student -> sha256 of its final weights; empty before the end."""
    totals: dict[str, float]
    """Of the finished training; empty before."""

    @classmethod
    def by(cls, line: Line) -> Kept:
        """Read from the run's folder, not through the product's own code."""
        record = line.folder / "train" / "stage.json"
        return cls(
            labels=_labels(line.folder),
            weights={
                path.parent.name: hashlib.sha256(path.read_bytes()).hexdigest()
                for path in line.folder.glob("train/students/*/weights.safetensors")
            },
            totals=json.loads(record.read_text())["result"]["totals"] if record.exists() else {},
        )


def _labels(run: Path) -> Counter[tuple[int, int, int]]:
    found: Counter[tuple[int, int, int]] = Counter()
    for manifest in run.glob("store/*/manifest.jsonl"):
        for row in manifest.read_text().splitlines():
            if row:
                segment = json.loads(row)
                path = manifest.parent / segment["file"]
                assert hashlib.sha256(path.read_bytes()).hexdigest() == segment["sha256"]
                found.update((segment["view"], segment["shard"], number) for number in pq.read_table(path)["row"].to_pylist())
    return found


def _listening(inodes: set[str] | None = None) -> set[int]:
    """TCP ports of this machine that somebody listens on; with `inodes`, only those of these sockets."""
    rows = [line.split() for table in ("/proc/net/tcp", "/proc/net/tcp6") for line in Path(table).read_text().splitlines()[1:]]
    return {int(row[1].rpartition(":")[2], 16) for row in rows if row[3] == LISTENING and (inodes is None or row[9] in inodes)}


@pytest.fixture(scope="session")
def listening() -> Callable[[], set[int]]:
    return _listening


@pytest.fixture(scope="session")
def kept_by() -> Callable[[Line], Kept]:
    return Kept.by


@pytest.fixture(scope="session")
def wait_until() -> Callable[..., Any]:
    return _wait_until


@pytest.fixture(scope="session")
def triton_installed() -> TritonHome | None:
    """The real Triton, installed if it is missing; None only where it cannot run at all."""
    if triton_supported():
        return None
    folder = triton_home(None if "DISTILL_TRITON_HOME" in os.environ else str(ROOT / ".triton"))
    if find_triton(folder) is None:
        subprocess.run([str(DISTILL), "install-triton"], cwd=ROOT, check=True, timeout=900)
    found = find_triton(folder)
    assert found is not None
    return found


@pytest.fixture(scope="session")
def home(triton_installed: TritonHome | None) -> TritonHome:
    """The real Triton, for tests that are about it: skipped only where it cannot run at all."""
    if triton_installed is None:
        pytest.skip(str(triton_supported()))
    return triton_installed


@pytest.fixture(scope="session")
def backend(triton_installed: TritonHome | None) -> str:
    """The override for the teacher's back end: the real Triton wherever it can run, and never silently anything else."""
    return "server.backend=triton" if triton_installed else "server.backend=embedded"


@pytest.fixture(scope="module")
def new_line(backend: str) -> Iterator[Callable[..., Line]]:
    """Makes a line of smoke size in a folder. Whatever its commands, and those of its copies, leave running ends with the module."""
    made: list[Line] = []

    def make(folder: Path, *more: str) -> Line:
        made.append(Line(folder, (*SMOKE, backend, *more)))
        return made[-1]

    yield make
    for line in made:
        line.kill()
