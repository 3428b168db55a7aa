"""The line that brings an optional package can be followed: from the checkout, since the project is on no package index."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

import pytest

from distill.cluster.jobs import follow_job
from distill.errors import ConfigError, ServerStartError
from distill.models.timm_networks import import_timm_library

ROOT = Path(__file__).parents[3]


def test_networks_of_timm_say_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConfigError, match=re.escape("pip install -e '.[timm]' in the checkout")):
        import_timm_library()


def test_a_cluster_says_how_to_install_the_client_of_its_job_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray.job_submission", None)
    with pytest.raises(ServerStartError, match=re.escape("pip install -e '.[cluster]' in the checkout")):
        follow_job("http://127.0.0.1:1", ["true"], print, print, 1.0)


def test_no_page_installs_the_project_by_its_name() -> None:
    name = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["name"]
    assert [page.name for page in (ROOT / "docs").glob("*.md") if f"{name}[" in page.read_text()] == []
