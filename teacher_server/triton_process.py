"""A real Triton server on this machine, for as long as a `with` block lasts.

Flow: model repository -> TritonProcess -> `url` for TritonTeacher. Unit of data: one server process serving one model.
It listens on loopback only (Triton's own default is every address). It counts as started when a label came out of it: Triton reports a
model as ready whose worker is dead. It ends with us, also when we are killed: see process_guard.py.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self, TypeVar

from distill.errors import DistillError, RequestRefused, ServerStartError
from distill.teacher_info import TeacherInfo
from teacher_server import process_guard
from teacher_server.triton import TritonTeacher
from teacher_server.triton_home import TritonHome

T = TypeVar("T")

EXIT_TIMEOUT_S = 5
_POLL_S = 0.1
_NUM_LOG_LINES = 12

logger = logging.getLogger(__name__)


class TritonProcess:
    """`with TritonProcess(...) as triton: TritonTeacher(triton.url, name)`. Thread-safe where it matters: stop() and restart()."""

    def __init__(self, home: TritonHome, repository: Path, model: str, log_dir: Path, *, start_timeout_s: float = 120.0) -> None:
        """Starts nothing yet. The log is `<log_dir>/triton.log`, restarts append to it."""
        self.home = home
        self.repository = repository.absolute()
        self.model = model
        self.log_path = log_dir / "triton.log"
        self.start_timeout_s = start_timeout_s
        self.http_port, self.grpc_port, self.metrics_port = _free_ports(3)
        self.server_pid: int | None = None
        self.info: TeacherInfo | None = None
        # Names this server's files in /dev/shm, so that they can be told from those of other servers.
        self._shm_prefix = f"distill_triton_{os.getpid()}_{uuid.uuid4().hex[:8]}_"
        self._guard: subprocess.Popen[bytes] | None = None
        self._log_start = 0
        self._stopping = threading.Event()
        self._lock = threading.RLock()

    @property
    def url(self) -> str:
        """host:port of the gRPC endpoint."""
        return f"127.0.0.1:{self.grpc_port}"

    @property
    def http_url(self) -> str:
        """Base URL of the HTTP endpoint, for people and for curl."""
        return f"http://127.0.0.1:{self.http_port}"

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:  # Ctrl-C while it loads, too: __exit__ is not called for a block that was never entered
            self.stop()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start the server and wait until a label comes out.

        Raises:
            ServerStartError: it ended, or no label came out in time; with the last lines of its log. Nothing is left running.
        """
        self._stopping.clear()
        self._start()

    def _start(self) -> None:
        with self._lock:
            if self._guard is not None:
                return
            self.log_path.parent.mkdir(parents=True, exist_ok=True)
            with self.log_path.open("ab") as log:
                self._log_start = log.tell()
                self._guard = subprocess.Popen(
                    # -I -S: the guard needs nothing but the standard library, and must not depend on our environment
                    [sys.executable, "-I", "-S", process_guard.__file__, str(EXIT_TIMEOUT_S + 3), self._shm_prefix, *self._command()],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    env=self.home.environment(),
                    start_new_session=True,  # Ctrl-C in the terminal reaches only us; we stop it after those who ask it
                )
            self._wait_for_label()

    def alive(self) -> bool:
        """Whether the server process runs. Only an answer proves that it works: see `TeacherBackend.ready`."""
        return self._guard is not None and self._guard.poll() is None

    def ask_canary(self) -> TeacherInfo:
        """What the server serves, after one label came out of it. Raises what asking a teacher raises; WorkerLost means: restart."""
        return canary_label(self.url, self.model)

    def restart(self) -> None:
        """End what is left of the server and start it again on the same ports; clients reconnect by themselves. Not after stop()."""
        with self._lock:
            if not self._stopping.is_set():
                self._end()
                self._start()

    def stop(self) -> None:
        """End the server, its workers and its shared memory; a start in progress gives up. Calling it twice does no harm."""
        self._stopping.set()
        with self._lock:
            self._end()

    def _end(self) -> None:
        guard, self._guard, self.server_pid = self._guard, None, None
        if guard is None:
            return
        assert guard.stdin is not None
        assert guard.stdout is not None
        guard.stdin.close()  # the signal to stop
        try:
            guard.wait(EXIT_TIMEOUT_S + 15)
        except subprocess.TimeoutExpired:
            logger.warning("Triton's guard process %d did not end; it is killed, and Triton with it", guard.pid)
            guard.kill()
            guard.wait()
        finally:
            guard.stdout.close()

    def _command(self) -> list[str]:
        server_dir = self.home.server_dir
        return [
            str(self.home.executable),
            f"--model-repository={self.repository}",
            f"--backend-directory={server_dir / 'backends'}",
            f"--cache-directory={server_dir / 'caches'}",
            "--model-control-mode=explicit",  # allows a reload, the only cure for a dead worker
            f"--load-model={self.model}",
            f"--exit-timeout-secs={EXIT_TIMEOUT_S}",
            "--allow-gpu-metrics=false",
            "--metrics-config=summary_latencies=true",
            f"--backend-config=python,shm-region-prefix-name={self._shm_prefix}",
            f"--backend-config=onnxruntime,shm-region-prefix-name={self._shm_prefix}",
            *(f"--{kind}-address=127.0.0.1" for kind in ("http", "grpc", "metrics")),
            f"--http-port={self.http_port}",
            f"--grpc-port={self.grpc_port}",
            f"--metrics-port={self.metrics_port}",
        ]

    def _wait_for_label(self) -> None:
        assert self._guard is not None
        assert self._guard.stdout is not None
        started = time.monotonic()
        line = self._guard.stdout.readline()
        self.server_pid = int(line) if line.strip() else None
        while time.monotonic() - started < self.start_timeout_s:
            if not self.alive():
                raise self._start_error("ended")
            if self._stopping.is_set():
                raise self._start_error("was stopped while it started")
            try:
                self.info = self.ask_canary()
            except RequestRefused as error:
                raise self._start_error(f"serves something else ({error})") from error
            except DistillError:
                time.sleep(_POLL_S)
                continue
            logger.info("Triton serves %s at %s after %.1f s", self.model, self.url, time.monotonic() - started)
            return
        raise self._start_error(f"gave no label within {self.start_timeout_s:g} s (triton.start_timeout_s)")

    def _start_error(self, what: str) -> ServerStartError:
        self._end()
        lines = _telling_lines(self.log_path, self._log_start)
        return ServerStartError(f"Triton for {self.model!r} {what}; the end of {self.log_path}:\n" + "\n".join(lines))


def canary_label(url: str, model: str) -> TeacherInfo:
    """What a Triton serves, after one label came out of it, from plain code. Raises what asking a teacher raises."""
    return _in_own_loop(_first_label(url, model))


async def _first_label(url: str, model: str) -> TeacherInfo:
    teacher = TritonTeacher(url, model, request_timeout_s=10)
    try:
        await teacher.ask_canary()
        return await teacher.info()
    finally:
        await teacher.close()


def _in_own_loop(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end from plain code, also where this thread already runs an event loop."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(asyncio.run, coroutine).result()


def _telling_lines(log: Path, start: int) -> list[str]:
    """The last lines since byte `start`; only errors, if any: Triton prints its configuration after the reason for a failed load."""
    lines = log.read_bytes()[start:].decode("utf-8", errors="replace").splitlines()
    errors = [line for line in lines if line.startswith("E") or "error" in line.lower()]
    return (errors or lines)[-_NUM_LOG_LINES:]


def _free_ports(count: int) -> list[int]:
    """Ports of loopback that are free now, all different because they are held at the same time."""
    with ExitStack() as held:
        ports = []
        for _ in range(count):
            sock = held.enter_context(socket.socket())
            sock.bind(("127.0.0.1", 0))
            ports.append(sock.getsockname()[1])
        return ports
