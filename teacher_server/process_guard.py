"""Runs one command that must not outlive us, however we end. A program of its own, of the standard library only: TritonProcess starts it.

    python process_guard.py <grace seconds> <shared-memory prefix> <command> ...

Flow: we hold the write end of this program's standard input. When it closes (we stopped the command, or died in whatever way) or this
program's parent changes, the command gets SIGTERM; after the grace period its whole process group gets SIGKILL; its shared memory files go.
Unit of data: one command. The first line on standard output is the command's process id; the exit status is the command's.

Why not only PR_SET_PDEATHSIG on the command: that signal follows the *thread* which started it (a thread of a pool may end long before we
do), gives no time to finish, and reaches Triton but not the stub processes that Triton started. Here it is the second line of defence, for
the guard's own death; the guard has one thread.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_POLL_S = 0.25


def main() -> int:
    """Run the command of the command line to its end, or to ours."""
    grace_s, prefix, command = float(sys.argv[1]), sys.argv[2], sys.argv[3:]
    parent = os.getppid()
    told_to_stop: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: told_to_stop.append(number))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the program that started us; it stops us in its own order
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)  # orphans of the command come to us, also where process 1 of a container reaps nobody

    def die_with_guard() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    # The command leads a group of its own, so that killing the group spares the guard.
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sys.stderr, start_new_session=True, preexec_fn=die_with_guard)
    os.write(1, f"{child.pid}\n".encode())
    while child.poll() is None and not told_to_stop and os.getppid() == parent and not _closed(0):
        pass
    _end(child, grace_s)
    for leftover in Path("/dev/shm").glob(f"{prefix}*"):
        leftover.unlink(missing_ok=True)
    return child.returncode


def _closed(descriptor: int) -> bool:
    """Wait a moment; True when the other end of the pipe is gone."""
    readable, _, _ = select.select([descriptor], [], [], _POLL_S)
    return bool(readable) and os.read(descriptor, 1) == b""


def _end(child: subprocess.Popen[bytes], grace_s: float) -> None:
    """SIGTERM, time to finish, then SIGKILL to whatever is left of the group (a killed Triton leaves its stub behind)."""
    if child.poll() is None:
        child.terminate()
        with suppress(subprocess.TimeoutExpired):
            child.wait(grace_s)
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    # The killed children of the command are ours now, and stay zombies until we ask for them.
    deadline = time.monotonic() + 5
    with suppress(ChildProcessError):
        while time.monotonic() < deadline:
            if os.waitpid(-child.pid, os.WNOHANG) == (0, 0):
                time.sleep(0.02)


if __name__ == "__main__":
    sys.exit(main() & 0xFF)
