"""Signals and the wish to stop, with real signals in real processes; and checkpoints that are written while the loop goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from distill.checkpoint import Write
from distill.cluster.stopping import StopAgreement, run_stoppable
from distill.cluster.worker import LocalWorker, settling

CPU = torch.device("cpu")

DRIVER = """
import sys, threading, time
from distill.cluster.stopping import run_stoppable
from distill.errors import Terminated

asked = threading.Event()

def work():
    print("begun", flush=True)
    asked.wait()
    if sys.argv[1] == "stubborn":
        time.sleep(600)
    print("kept", flush=True)

def ask():
    print("asked", flush=True)
    asked.set()
    return sys.argv[1] != "not begun"

try:
    run_stoppable(work, ask)
except Terminated:
    sys.exit(143)
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.fixture
def start() -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """A driver whose work has begun."""
    started: list[subprocess.Popen[str]] = []

    def begin(kind: str) -> subprocess.Popen[str]:
        process = subprocess.Popen([sys.executable, "-c", DRIVER, kind], stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        return process

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def rest_of(process: subprocess.Popen[str]) -> tuple[str, int]:
    out, _ = process.communicate(timeout=60)
    return out, process.returncode


class TestSignals:
    @pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
    def test_the_first_asks_and_the_work_ends_in_order(
        self, start: Callable[[str], subprocess.Popen[str]], number: signal.Signals, code: int
    ) -> None:
        process = start("obedient")
        process.send_signal(number)
        assert rest_of(process) == ("asked\nkept\n", code)

    def test_the_second_ends_at_once(self, start: Callable[[str], subprocess.Popen[str]]) -> None:
        process = start("stubborn")
        process.send_signal(signal.SIGINT)
        assert process.stdout is not None
        assert process.stdout.readline() == "asked\n"
        process.send_signal(signal.SIGTERM)
        assert rest_of(process) == ("", 143)

    def test_where_nothing_has_begun_it_ends_at_once(self, start: Callable[[str], subprocess.Popen[str]]) -> None:
        process = start("not begun")
        process.send_signal(signal.SIGINT)
        out, code = rest_of(process)
        assert out.startswith("asked\n")
        assert code == 130

    def test_handlers_are_put_back_and_errors_come_out(self) -> None:
        before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        assert run_stoppable(lambda: threading.current_thread() is threading.main_thread(), lambda: True) is False
        with pytest.raises(ZeroDivisionError):
            run_stoppable(lambda: 1 // 0, lambda: True)
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before

    def test_a_failure_after_the_wish_is_what_comes_out(self) -> None:
        """The checkpoint could not be written: that is what the user must hear."""
        asked = threading.Event()

        def work() -> None:
            os.kill(os.getpid(), signal.SIGINT)
            asked.wait()
            raise OSError("no space left")

        def ask() -> bool:
            asked.set()
            return True

        with pytest.raises(OSError, match="no space left"):
            run_stoppable(work, ask)


def test_alone_it_is_asked_before_every_step() -> None:
    answers = iter([False, True])
    agreement = StopAgreement(lambda: next(answers), 0, 1, CPU)
    assert [agreement(), agreement()] == [False, True]


def in_memory(written: list[str], name: str, gate: threading.Event) -> Callable[[], Write]:
    def write(folder: Path) -> None:
        gate.wait()
        (folder / "name").write_text(name)
        written.append(name)

    return lambda: write


class TestCheckpointsInTheBackground:
    def test_the_loop_goes_on_and_the_next_one_waits(self, tmp_path: Path) -> None:
        worker, written, gate = LocalWorker(tmp_path, device=CPU), list[str](), threading.Event()
        worker.checkpoint(in_memory(written, "first", gate))
        assert written == []
        assert not worker.should_stop()
        with worker.resume() as folder:
            assert folder is None  # it is not there before it is whole
        threading.Timer(0.2, gate.set).start()
        worker.checkpoint(in_memory(written, "second", gate))
        assert written[0] == "first"
        worker.settle()
        assert written == ["first", "second"]
        assert (tmp_path / "checkpoint" / "name").read_text() == "second"

    def test_an_error_comes_out_at_the_next_step_once(self, tmp_path: Path) -> None:
        worker = LocalWorker(tmp_path, device=CPU)

        def failing(folder: Path) -> None:
            raise OSError("no space left")

        def steps() -> None:
            for _ in range(1000):
                worker.should_stop()
                time.sleep(0.01)

        worker.checkpoint(lambda: failing)
        with pytest.raises(OSError, match="no space left"):
            steps()
        worker.settle()

    @pytest.mark.parametrize("at", ["checkpoint", "settle"])
    def test_an_error_does_not_get_lost(self, tmp_path: Path, at: str) -> None:
        worker = LocalWorker(tmp_path, device=CPU)

        def failing(folder: Path) -> None:
            raise OSError("no space left")

        worker.checkpoint(lambda: failing)
        with pytest.raises(OSError, match="no space left"):
            worker.settle() if at == "settle" else worker.checkpoint(lambda: failing)

    def test_a_loop_that_fails_still_leaves_its_last_one_whole(self, tmp_path: Path) -> None:
        worker, written, gate = LocalWorker(tmp_path, device=CPU), list[str](), threading.Event()
        threading.Timer(0.2, gate.set).start()

        def loop() -> None:
            with settling(worker):
                worker.checkpoint(in_memory(written, "last", gate))
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            loop()
        assert (tmp_path / "checkpoint" / "name").read_text() == "last"
