"""A guarded command never outlives the program that started it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from teacher_server import process_guard

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the guard uses Linux process groups and /dev/shm")

GUARD = [sys.executable, "-I", "-S", process_guard.__file__, "5"]
# A program like Triton with its stub: a child of its own that ignores SIGTERM, and both process ids on the first line of a file.
CHILD = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); signal.pause()"
PARENT_AND_CHILD = f"""
import os, signal, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {CHILD!r}], stdout=subprocess.PIPE)
child.stdout.readline()
with open(sys.argv[1], "w") as pids:
    print(os.getpid(), child.pid, file=pids)
signal.pause()
"""


@pytest.fixture
def fifo(tmp_path: Path) -> Path:
    path = tmp_path / "pids"
    os.mkfifo(path)
    return path


def start(fifo: Path, prefix: str = "distill_test_none_") -> tuple[subprocess.Popen[bytes], list[int]]:
    command = [*GUARD, prefix, sys.executable, "-c", PARENT_AND_CHILD, str(fifo)]
    guard = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    pids = [int(word) for word in fifo.read_text().split()]  # waits until both run
    assert guard.stdout is not None
    assert int(guard.stdout.readline()) == pids[0]
    return guard, pids


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def closed(guard: subprocess.Popen[bytes]) -> None:
    for stream in (guard.stdin, guard.stdout):
        assert stream is not None
        stream.close()


def test_closing_the_pipe_ends_the_command_and_its_children(fifo: Path) -> None:
    prefix = f"distill_test_{uuid.uuid4().hex}_"
    leftover = Path("/dev/shm") / f"{prefix}region"
    leftover.write_bytes(b"left by a killed server")
    guard, pids = start(fifo, prefix)
    closed(guard)
    assert guard.wait(20) == -signal.SIGTERM & 0xFF
    assert not any(map(alive, pids))
    assert not leftover.exists()


def test_a_killed_owner_takes_the_command_along(fifo: Path) -> None:
    """kill -9 of the program that holds the pipe."""
    owner_code = (
        "import subprocess, sys; p = subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE, stdout=subprocess.PIPE); p.stdout.read()"
    )
    command = [*GUARD, "distill_test_none_", sys.executable, "-c", PARENT_AND_CHILD, str(fifo)]
    owner = subprocess.Popen([sys.executable, "-c", owner_code, *command])
    pids = [int(word) for word in fifo.read_text().split()]
    handles = [os.pidfd_open(pid) for pid in pids]
    owner.kill()
    owner.wait()
    for handle in handles:
        assert ended(handle, timeout_s=20)
        os.close(handle)


def test_a_killed_guard_takes_the_command_along(fifo: Path) -> None:
    guard, pids = start(fifo)
    handle = os.pidfd_open(pids[0])
    guard.kill()
    guard.wait()
    assert ended(handle, timeout_s=20)
    os.close(handle)
    closed(guard)
    os.kill(pids[1], signal.SIGKILL)  # this one is nobody's business: Triton's own stubs watch their parent


def test_the_exit_status_is_the_commands() -> None:
    guard = subprocess.Popen(
        [*GUARD, "distill_test_none_", sys.executable, "-c", "raise SystemExit(7)"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert guard.wait(20) == 7
    closed(guard)


def ended(handle: int, timeout_s: float) -> bool:
    """Wait for the end of a process that is not our child."""
    import select

    return bool(select.select([handle], [], [], timeout_s)[0])
