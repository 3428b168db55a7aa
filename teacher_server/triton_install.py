"""Installs the real Triton server, without Docker, into a folder of its own.

Flow: the `nvidia-pytriton` wheel (it carries Triton 2.51.0) + an environment with numpy 1.26 for its python stub + our `onnxruntime`
backend -> a home folder.
It is kept apart because that wheel pins numpy < 2. Unit of data: one home folder, see triton_home.py.
A second call does nothing; a call that was cut short leaves no `installed.json`, so that the next one starts over.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

from distill.errors import ServerStartError
from teacher_server.triton_home import STAMP, TritonHome, find_triton, libpython_folder, read_stamp, triton_supported

SERVER_WHEEL = "nvidia-pytriton==0.7.0"

logger = logging.getLogger(__name__)


def install_triton(home: Path) -> TritonHome:
    """Make `home` hold a working Triton server; at once when it already does.

    Raises:
        ServerStartError: Triton cannot run on this machine, or a package could not be installed.
    """
    home = home.absolute()
    reason = triton_supported()
    if reason:
        raise ServerStartError(f"Triton cannot be installed: {reason}; use server.backend=embedded")
    home.mkdir(parents=True, exist_ok=True)
    with _only_one(home):
        found = find_triton(home)
        if found and (read_stamp(home) or {}).get("recipe") == _recipe():
            return found
        return _install(home)


def _install(home: Path) -> TritonHome:
    (home / STAMP).unlink(missing_ok=True)
    for leftover in (home / "pytriton", home / "pytriton.partial", home / "python"):
        shutil.rmtree(leftover, ignore_errors=True)
    logger.info("installing the Triton server into %s (about 330 MB)", home)
    # The environment is made where it stays: its scripts hold absolute paths. The server is built beside its place and renamed.
    _run([sys.executable, "-m", "venv", str(home / "python")])
    python = home / "python" / "bin" / "python"
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "--no-input", "install", "--quiet", "--no-deps"]
    with resources.as_file(_requirements()) as requirements:
        _run([*pip, "-r", str(requirements)])
    # pip and not unzip: the wheel's programs need their run bits.
    _run([*pip, "--target", str(home / "pytriton.partial"), SERVER_WHEEL])
    _add_backends(home / "pytriton.partial" / "pytriton" / "tritonserver")
    (home / "pytriton.partial").rename(home / "pytriton")
    libpython = libpython_folder()
    assert libpython is not None, "triton_supported() has looked"
    _write_stamp(home, {"path": str(home), "libpython": str(libpython), "recipe": _recipe()})
    found = find_triton(home)
    if found is None:
        raise ServerStartError(f"{SERVER_WHEEL} holds no server at {home / 'pytriton'}; delete {home} and install again")
    return found


def _add_backends(server_dir: Path) -> None:
    """The stub of this Python version beside the python backend (no model loads without it), and our onnxruntime backend."""
    minor = f"{sys.version_info[0]}.{sys.version_info[1]}"
    stub = server_dir / "python_backend_stubs" / minor / "triton_python_backend_stub"
    if not stub.is_file():
        raise ServerStartError(f"{SERVER_WHEEL} has no stub for Python {minor}; use Python 3.11 or 3.12")
    shutil.copy2(stub, server_dir / "backends" / "python" / stub.name)
    target = server_dir / "backends" / "onnxruntime" / "model.py"
    target.parent.mkdir(exist_ok=True)
    target.write_bytes(_backend_source().read_bytes())


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise ServerStartError(f"{command[0]} cannot be run: {error}") from error
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise ServerStartError(f"installing Triton failed at `{' '.join(command[1:])}`: {lines[-1] if lines else done.returncode}")


def _recipe() -> str:
    """Changes when anything that is installed changes, the interpreter included."""
    parts = [SERVER_WHEEL, sys.version, sys.base_prefix, _requirements().read_text(encoding="utf-8"), _backend_source().read_text("utf-8")]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _requirements() -> Traversable:
    return resources.files("teacher_server") / "triton_requirements.txt"


def _backend_source() -> Traversable:
    return resources.files("teacher_server") / "triton_backends" / "onnxruntime" / "model.py"


def _write_stamp(home: Path, stamp: dict[str, str]) -> None:
    partial = home / f"{STAMP}.partial"
    partial.write_text(json.dumps(stamp, indent=2), encoding="utf-8")
    partial.replace(home / STAMP)


@contextmanager
def _only_one(home: Path) -> Iterator[None]:
    """Two commands started together install once: the second waits and finds the work done."""
    import fcntl  # Linux only, as is everything that installs here

    descriptor = os.open(home / ".lock", os.O_CREAT | os.O_RDWR, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
