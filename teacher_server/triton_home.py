"""Where the real Triton server lives on this machine, and whether it can run here at all.

Flow: `distill install-triton` (triton_install.py) -> a home folder -> TritonProcess starts the server from it.
Unit of data: one home folder: `pytriton/` (the server), `python/` (environment of its python stub), `installed.json` (written last).
"""

from __future__ import annotations

import json
import os
import platform
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

HOME_VARIABLE = "DISTILL_TRITON_HOME"
STAMP = "installed.json"
_OLDEST_GLIBC = (2, 35)
_NEWEST_PYTHON = (3, 12)


def triton_home(given: str | None = None) -> Path:
    """The home folder: the setting, else $DISTILL_TRITON_HOME, else `.triton` in the current folder. It need not exist."""
    return Path(given or os.environ.get(HOME_VARIABLE) or ".triton").absolute()


def triton_supported() -> str | None:
    """None where the Triton server from the wheel can run; else the reason why not, for a person to read."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"the Triton wheel is for Linux on x86-64; this is {platform.system()} on {platform.machine()}"
    libc, version = platform.libc_ver()
    if libc != "glibc" or _numbers(version) < _OLDEST_GLIBC:
        return f"the Triton wheel needs glibc 2.35 or newer; this system has {libc or 'another C library'} {version}".rstrip()
    if sys.version_info[:2] > _NEWEST_PYTHON:
        return f"Triton's python stub needs numpy 1.26, which ends at Python 3.12; this is {platform.python_version()}"
    if libpython_folder() is None:
        return f"this Python has no shared library {sysconfig.get_config_var('INSTSONAME')}, which Triton's python stub loads"
    return None


def libpython_folder() -> Path | None:
    """The folder of this interpreter's shared library; None for a statically linked one."""
    name = sysconfig.get_config_var("INSTSONAME") or ""
    library_dir = Path(sysconfig.get_config_var("LIBDIR") or "/usr/lib")
    for folder in (library_dir, library_dir / (sysconfig.get_config_var("MULTIARCH") or "")):
        if ".so" in name and (folder / name).is_file():
            return folder
    return None


@dataclass(frozen=True)
class TritonHome:
    """An installed Triton server."""

    path: Path
    libpython: Path

    @property
    def server_dir(self) -> Path:
        """Folder with `bin/`, `backends/` and `caches/`."""
        return self.path / "pytriton" / "pytriton" / "tritonserver"

    @property
    def executable(self) -> Path:
        """The server itself."""
        return self.server_dir / "bin" / "tritonserver"

    def environment(self) -> dict[str, str]:
        """Environment variables for the server: the stub finds its own packages by PATH, and libpython by LD_LIBRARY_PATH."""
        variables = {key: value for key, value in os.environ.items() if key not in {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}}
        variables["PATH"] = os.pathsep.join([str(self.path / "python" / "bin"), variables.get("PATH", "")])
        libraries = [str(self.libpython), *filter(None, [variables.get("LD_LIBRARY_PATH")])]
        variables["LD_LIBRARY_PATH"] = os.pathsep.join(libraries)
        return variables


def find_triton(home: Path) -> TritonHome | None:
    """The server installed in `home`, or None when there is none, or one that was moved or only half installed."""
    stamp = read_stamp(home)
    if stamp is None or stamp.get("path") != str(home):  # a virtual environment holds its absolute path
        return None
    found = TritonHome(home, Path(stamp["libpython"]))
    return found if found.executable.is_file() else None


def read_stamp(home: Path) -> dict[str, str] | None:
    """What `installed.json` says; None without a readable one."""
    try:
        stamp = json.loads((home / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return stamp if isinstance(stamp, dict) else None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())
