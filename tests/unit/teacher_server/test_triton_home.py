"""Where Triton is looked for, and the reasons why it cannot run."""

from __future__ import annotations

import json
import platform
import sys
import sysconfig
from pathlib import Path

import pytest

from distill.errors import ServerStartError
from teacher_server import triton_home, triton_install
from teacher_server.serve import open_backend
from teacher_server.settings import ServerSettings, TritonSettings
from teacher_server.triton_home import TritonHome, find_triton


@pytest.fixture
def linux(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """A machine on which Triton runs, whatever this one is."""
    (tmp_path / "libpython3.so").touch()
    variables = {"INSTSONAME": "libpython3.so", "LIBDIR": str(tmp_path)}
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setattr(sys, "version_info", (3, 11, 7))
    monkeypatch.setattr(sysconfig, "get_config_var", variables.get)
    assert triton_home.triton_supported() is None
    return monkeypatch


def test_each_reason_is_named(linux: pytest.MonkeyPatch) -> None:
    def reason(owner: object, name: str, value: object) -> str | None:
        with linux.context() as change:
            change.setattr(owner, name, value)
            return triton_home.triton_supported()

    assert "Linux on x86-64" in (reason(sys, "platform", "darwin") or "")
    assert "Linux on x86-64" in (reason(platform, "machine", lambda: "aarch64") or "")
    assert "glibc 2.35" in (reason(platform, "libc_ver", lambda: ("glibc", "2.31")) or "")
    assert "another C library" in (reason(platform, "libc_ver", lambda: ("", "")) or "")
    assert "Python 3.12" in (reason(sys, "version_info", (3, 13, 0)) or "")
    assert "shared library" in (reason(sysconfig, "get_config_var", {"INSTSONAME": "libpython3.a"}.get) or "")


def test_where_triton_is_looked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(triton_home.HOME_VARIABLE, raising=False)
    assert triton_home.triton_home() == tmp_path / ".triton"
    monkeypatch.setenv(triton_home.HOME_VARIABLE, "/opt/triton")
    assert triton_home.triton_home() == Path("/opt/triton")
    assert triton_home.triton_home("elsewhere") == tmp_path / "elsewhere"


def test_only_a_finished_installation_in_its_own_place_counts(tmp_path: Path) -> None:
    home = tmp_path / "home"
    server = TritonHome(home, tmp_path).executable
    server.parent.mkdir(parents=True)
    server.touch()
    assert find_triton(home) is None, "no stamp: cut short"
    (home / triton_home.STAMP).write_text("{half")
    assert find_triton(home) is None
    (home / triton_home.STAMP).write_text(json.dumps({"path": "/before/it/was/moved", "libpython": str(tmp_path)}))
    assert find_triton(home) is None
    (home / triton_home.STAMP).write_text(json.dumps({"path": str(home), "libpython": str(tmp_path)}))
    assert find_triton(home) == TritonHome(home, tmp_path)
    server.unlink()
    assert find_triton(home) is None


def test_the_stub_finds_its_own_python(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", "/usr/bin")
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    variables = TritonHome(tmp_path, Path("/lib/python")).environment()
    assert variables["PATH"] == f"{tmp_path}/python/bin:/usr/bin"
    assert variables["LD_LIBRARY_PATH"] == "/lib/python"
    assert "PYTHONPATH" not in variables


def test_a_failed_installation_is_one_line_and_leaves_no_stamp(linux: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def failing(command: list[str]) -> None:
        raise ServerStartError("installing Triton failed at `pip`: no network")

    linux.setattr(triton_install, "_run", failing)
    with pytest.raises(ServerStartError, match="no network"):
        triton_install.install_triton(tmp_path / "home")
    assert find_triton(tmp_path / "home") is None
    linux.setattr(platform, "machine", lambda: "aarch64")
    with pytest.raises(ServerStartError, match=r"x86-64.*backend=embedded"):
        triton_install.install_triton(tmp_path / "home")


def test_the_pins_and_the_backend_travel_with_the_package() -> None:
    pins = dict(line.split("==") for line in triton_install._requirements().read_text("utf-8").splitlines() if not line.startswith("#"))
    assert pins["numpy"].startswith("1."), "this Triton's stub reads zeros from numpy 2"
    assert "onnxruntime" in pins
    assert "TritonPythonModel" in triton_install._backend_source().read_text("utf-8")


def test_triton_asked_for_and_not_there_is_an_error_with_a_way_out(linux: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings = ServerSettings(backend="triton", triton=TritonSettings(home=str(tmp_path / "nothing")))
    with pytest.raises(ServerStartError, match="distill install-triton"), open_backend(settings, tmp_path, "m", tmp_path):
        pass
