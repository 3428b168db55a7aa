"""A Ray cluster for the time of a `with` block: the one that is given, or one on this machine that leaves nothing behind.

A local cluster listens on loopback only and answers only to a token made for it; its processes are gone when the block ends. Ray replaces
the handler of SIGTERM when it starts and takes it away when it stops; whoever had one before the block has it in the block and after it.
"""

from __future__ import annotations

import logging
import os
import secrets
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import ray
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

from distill.cluster.settings import RaySettings
from distill.errors import ServerStartError, Terminated

OBJECT_STORE_BYTES = 256 * 2**20
"""Local cluster: crops and labels do not go through the object store, so a small one is enough."""
LEAVE_WITHIN_S = 5.0
"""How long processes of a local cluster have to end once they are told to."""
POLL_EVERY_S = 0.25
"""How often Ray Train asks its workers for news. A worker waits for that before it can report its next checkpoint, and so does the end of
every stage; Ray's own 2 s are long beside a step."""


@contextmanager
def ray_session(settings: RaySettings) -> Iterator[None]:
    """Connect to `settings.address`, or start a cluster here and stop it at the end. Inside another session it does nothing.

    Raises:
        ServerStartError: no cluster at that address, or none could be started.
        Terminated: SIGTERM while Ray starts.
    """
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", str(POLL_EVERY_S))
    with tempfile.TemporaryDirectory(prefix="distill-ray-") as private, _own_sigterm():
        try:
            _start(settings, Path(private))
            yield
        finally:  # of a start that was cut short, too
            if settings.address:
                ray.shutdown()
            else:
                _stop_local()


def _start(settings: RaySettings, private: Path) -> None:
    try:
        with _own_sigterm():
            if settings.address:
                ray.init(settings.address, log_to_driver=False, logging_level=logging.ERROR)
            else:
                _start_local(settings, private)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ServerStartError(f"no Ray cluster ({settings.address or 'local'}): {error}") from error
    except SystemExit as end:
        if end.code == signal.SIGTERM:  # what Ray's handler makes of it, and ours is not back yet
            signal.alarm(0)  # that handler has set an alarm which aborts the process after 3 s
            raise Terminated from end
        raise


def _stop_local() -> None:
    """Disconnect, and end what is left of the cluster that was started here: a worker that did not notice the end of its raylet."""
    cluster = _processes_of_ray()
    try:
        with _own_sigterm():
            ray.shutdown()
    finally:
        _end(cluster)


def _processes_of_ray() -> list[psutil.Process]:
    """Ray's programs among our children, and everything that they started."""
    program, found = str(Path(ray.__file__).parent), list[psutil.Process]()
    with suppress(psutil.Error):
        for child in psutil.Process().children():
            with suppress(psutil.Error):
                if any(program in word for word in child.cmdline()):
                    found += [child, *child.children(recursive=True)]
    return found


def _end(processes: list[psutil.Process]) -> None:
    """SIGTERM, and SIGKILL for those that are still there after `LEAVE_WITHIN_S`."""
    deadline = time.monotonic() + LEAVE_WITHIN_S
    try:
        for process in filter(_lives, processes):
            with suppress(psutil.Error):
                process.terminate()
        while any(map(_lives, processes)) and time.monotonic() < deadline:
            time.sleep(0.05)
    finally:
        for process in filter(_lives, processes):
            with suppress(psutil.Error):
                process.kill()


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """The handler of SIGTERM from before the block is there after it. Only the main thread may set one; in others Ray lets it be."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def _start_local(settings: RaySettings, private: Path) -> None:
    token = private / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    # Read by Ray when it starts its processes; this is its documented way to set them.
    os.environ.update(
        {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # makes a single-node cluster listen on 127.0.0.1 only
            "RAY_TRAIN_V2_ENABLED": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",  # training is what this machine is for; Ray would let every other process go first
        }
    )
    # Ray reads its environment when it is imported; this is how it takes notice of a change (its own `_enable_token_auth` does the same).
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()
    # Ray's own processes and one CPU for each worker at least, however few this machine has: workers may share cores.
    cpus = max(os.cpu_count() or 1, int(settings.num_workers * settings.cpus_per_worker) + 1)
    ray.init(
        num_cpus=cpus,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=OBJECT_STORE_BYTES,
        _node_ip_address="127.0.0.1",
    )
