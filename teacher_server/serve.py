"""Starts what a run needs to be answered: a teacher (Triton, or ONNX Runtime in this process) and the REST gateway before it; or finds the
teachers that run elsewhere.

Flow: settings + model repository -> `open_backend` -> a running teacher and its address -> `Gateway` -> REST on a port.
Unit of data: one served teacher. Both are context managers: whatever ends the block ends the servers, the gateway first.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import uvicorn

from distill.errors import DistillError, ServerStartError, TeacherUnavailable
from distill.teacher_info import TeacherInfo
from teacher_server.address import TeacherAddress, open_teacher
from teacher_server.backend import TeacherBackend
from teacher_server.settings import ServerSettings
from teacher_server.stalled import ImpatientProtocol
from teacher_server.triton_home import TritonHome, find_triton, triton_home, triton_supported

_START_TIMEOUT_S = 30.0
_STOP_TIMEOUT_S = 10
_PAUSE_BEFORE_FIRST_LABEL_S = 2.0


def _is_no_cancellation(record: logging.LogRecord) -> bool:
    return not (record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError))


# Its warnings are one line for each malformed request: a stranger could fill the disk with that. The client is told what is wrong.
logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
# Who did not finish within _STOP_TIMEOUT_S is counted in one line; a traceback of each would look like a fault.
logging.getLogger("uvicorn.error").addFilter(_is_no_cancellation)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServedTeacher:
    """A teacher that answers now. `connect()` gives a new client for the event loop that first asks it; its user closes it."""

    backend_kind: Literal["triton", "embedded", "pool"]
    address: TeacherAddress
    """For workers in other processes."""
    connect: Callable[[], TeacherBackend]
    reason: str | None = None
    """Why the teacher is embedded although nobody asked for that; to be shown to the user."""
    log_path: Path | None = None
    """Triton's log, if it was started here."""

    @property
    def triton_url(self) -> str | None:
        """host:port of Triton's gRPC endpoint, None for an embedded teacher and for a pool."""
        return self.address.triton_url


@contextmanager
def open_backend(
    settings: ServerSettings, repository: Path, name: str, log_dir: Path, *, fingerprint: str | None = None
) -> Iterator[ServedTeacher]:
    """A running teacher, as `settings.backend` wants it; it ends with the block.

    Args:
        fingerprint: the teacher whose labels workers want; of `pool.urls` those with another one are refused.

    Raises:
        ServerStartError: Triton was asked for and cannot run or did not come up, the one at `triton.url` gives no label, or none of
            `pool.urls` does.
        FingerprintMismatch: all of `pool.urls` are other teachers than the one that is wanted.
        StageMissing: an embedded teacher is wanted and the repository has no such model.
    """
    if settings.pool.urls:
        yield _pool(settings, name, fingerprint)
        return
    if settings.backend != "embedded" and settings.triton.url:
        yield _remote(settings, settings.triton.url, name)
        return
    reason = None
    if settings.backend != "embedded":
        home = find_triton(triton_home(settings.triton.home))
        reason = why_no_triton(settings)
        if reason is None and home is not None:
            with _local(settings, home, repository, name, log_dir) as served:
                yield served
            return
        if settings.backend == "triton":
            raise ServerStartError(f"server.backend is `triton`, but {reason}")
        logger.warning("the teacher runs inside this process: %s", reason)
    with _embedded(settings, repository, name, reason) as served:
        yield served


def why_no_triton(settings: ServerSettings) -> str | None:
    """None where a local Triton can be started; else the reason, with the way out if there is one."""
    unsupported = triton_supported()
    if unsupported:
        return unsupported
    home = triton_home(settings.triton.home)
    return None if find_triton(home) else f"Triton is not installed in {home}; `distill install-triton` does that"


def teacher_elsewhere(settings: ServerSettings, name: str, fingerprint: str | None = None) -> ServedTeacher:
    """The teacher at `triton.url` or `pool.urls`, which may not answer yet: nobody is asked anything here."""
    timeout_s = settings.triton.request_timeout_s
    if settings.pool.urls:
        address = TeacherAddress(model=name, pool=settings.pool, fingerprint=fingerprint, request_timeout_s=timeout_s)
        # The gateway follows when all of them are changed over to another version.
        return ServedTeacher("pool", address, lambda: _for_gateway(address.replace(fingerprint=None), settings))
    address = TeacherAddress(model=name, triton_url=settings.triton.url, request_timeout_s=timeout_s)
    return ServedTeacher("triton", address, lambda: _for_gateway(address, settings))


def _remote(settings: ServerSettings, url: str, name: str) -> ServedTeacher:
    from teacher_server.activation import triton_control  # both bring tritonclient, which an embedded teacher does without
    from teacher_server.triton_process import canary_label

    try:
        with triton_control(url, load_timeout_s=settings.triton.start_timeout_s) as control:
            if control.config(name) is None:  # such as the second teacher of a run, where Triton was started for the first
                control.load(name)
        canary_label(url, name)
    except DistillError as error:
        raise ServerStartError(f"the Triton of server.triton.url gives no label: {error}") from error
    return teacher_elsewhere(settings, name)


def _pool(settings: ServerSettings, name: str, fingerprint: str | None) -> ServedTeacher:
    served = teacher_elsewhere(settings, name, fingerprint)
    try:
        asyncio.run(_first_answer(served.address))
    except TeacherUnavailable as error:
        raise ServerStartError(f"no teacher of server.pool.urls gives a label: {error}") from error
    return served


async def _first_answer(address: TeacherAddress) -> TeacherInfo:
    teacher = open_teacher(address)
    try:
        return await teacher.info()  # a member of a pool is in when a label came out of it
    finally:
        await teacher.close()


@contextmanager
def _local(settings: ServerSettings, home: TritonHome, repository: Path, name: str, log_dir: Path) -> Iterator[ServedTeacher]:
    from teacher_server.triton_process import TritonProcess
    from teacher_server.triton_watch import TritonWatch

    with TritonProcess(home, repository, name, log_dir, start_timeout_s=settings.triton.start_timeout_s) as triton, TritonWatch(triton):
        address = TeacherAddress(model=name, triton_url=triton.url, request_timeout_s=settings.triton.request_timeout_s)
        yield ServedTeacher("triton", address, lambda: _for_gateway(address, settings), log_path=triton.log_path)


def _for_gateway(address: TeacherAddress, settings: ServerSettings) -> TeacherBackend:
    """With as many messages to Triton as images are let through to it: a bound below that keeps its batches of single images small."""
    return open_teacher(address.replace(max_in_flight=settings.max_images_in_flight))


@contextmanager
def _embedded(settings: ServerSettings, repository: Path, name: str, reason: str | None) -> Iterator[ServedTeacher]:
    from teacher_server.embedded import EmbeddedTeacher, Engine
    from teacher_server.model_repository import served_model

    threads, device = settings.embedded_threads, settings.embedded_device
    engine = Engine(served_model(repository, name), device=device, num_threads=threads)
    address = TeacherAddress(model=name, repository=str(repository.absolute()), num_threads=threads, device=device)
    try:
        # Clients of this process share one engine: two sessions would hold the weights twice and fight for the cores.
        yield ServedTeacher("embedded", address, lambda: EmbeddedTeacher(engine, owns_engine=False), reason)
    finally:
        engine.close()


class FirstLabel:
    """Asks a teacher for a label until one comes, in a thread of its own, and says how it goes. It lasts as long as its block.

    For a gateway that was started before its teacher: whoever reads its log sees what is missing, and when it came.
    """

    def __init__(self, address: TeacherAddress, say: Callable[[str], None]) -> None:
        self._address = address
        self._say = say
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._wait, name="first label", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stopped.set()

    def _wait(self) -> None:
        said = ""
        while not self._stopped.is_set():
            try:
                info = self._ask()
            except DistillError as error:
                if str(error) != said:
                    said = str(error)
                    self._say(f"waiting for the teacher: {said}")
                self._stopped.wait(_PAUSE_BEFORE_FIRST_LABEL_S)
                continue
            self._say(f"ready: a label came out of {info.name}, version {info.version}, fingerprint {info.fingerprint[:12]}")
            return

    def _ask(self) -> TeacherInfo:
        from teacher_server.triton_process import canary_label

        if self._address.triton_url is not None:
            return canary_label(self._address.triton_url, self._address.model)
        return asyncio.run(_first_answer(self._address))


class Gateway:
    """The REST gateway on a real port, in a thread with an event loop of its own.

    `with Gateway(served.connect, settings) as gateway:` for a run, `gateway.serve_until_stopped()` inside it for a service.
    """

    def __init__(
        self, connect: Callable[[], TeacherBackend], settings: ServerSettings, parity: Mapping[str, dict[str, Any]] | None = None
    ) -> None:
        """`parity`: fingerprint of a teacher -> what its parity gate measured, for its model card."""
        self._connect = connect
        self._settings = settings
        self._parity = parity
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None
        self.port = settings.port

    @property
    def url(self) -> str:
        """Base URL. The port is known after the start."""
        host = self._settings.host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def start(self) -> None:
        """Listen and answer. Raises ServerStartError when the address is taken, ConfigError when API keys are wanted and there are none."""
        from teacher_server.access import open_to_strangers
        from teacher_server.gateway import create_app  # brings FastAPI; connecting to a teacher does without
        from teacher_server.security import own_hosts

        warning = open_to_strangers(self._settings)
        if warning:
            logger.warning("%s", warning)
        app = create_app(self._connect(), self._settings, self._parity, hosts=own_hosts(self._settings))
        listener = self._listen()
        config = uvicorn.Config(
            app, http=ImpatientProtocol, log_config=None, access_log=False, timeout_graceful_shutdown=_STOP_TIMEOUT_S, lifespan="on"
        )
        server = uvicorn.Server(config)
        self._server = server
        self._thread = threading.Thread(target=server.run, args=([listener],), name="gateway", daemon=True)
        self._thread.start()
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not server.started:
            if not self._thread.is_alive() or time.monotonic() > deadline:
                self.stop()
                raise ServerStartError(f"the gateway did not come up at {self.url}; its log says why")
            time.sleep(0.01)
        logger.info("the gateway answers at %s", self.url)

    def stop(self) -> None:
        """Answer what is being worked on, then end. Calling it twice does no harm."""
        if self._server is not None and self._thread is not None:
            self._server.should_exit = True
            self._thread.join(_STOP_TIMEOUT_S + 5)
        self._server = self._thread = None

    def serve_until_stopped(self) -> None:
        """Return at SIGTERM or Ctrl-C, so that the blocks around it end in order. For the main thread."""
        asked = threading.Event()
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, lambda *_: asked.set()) for number in numbers}
        try:
            while not asked.wait(1.0) and self._thread is not None and self._thread.is_alive():
                continue
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if not asked.is_set():
            raise ServerStartError(f"the gateway at {self.url} ended by itself; its log says why")

    def _listen(self) -> socket.socket:
        family = socket.AF_INET6 if ":" in self._settings.host else socket.AF_INET
        listener = socket.socket(family)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((self._settings.host, self._settings.port))
        except OSError as error:
            listener.close()
            where = f"{self._settings.host}:{self._settings.port}"
            raise ServerStartError(f"the gateway cannot listen at {where}: {error.strerror}; choose another server.port") from error
        self.port = listener.getsockname()[1]
        return listener
