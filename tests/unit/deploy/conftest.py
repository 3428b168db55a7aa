"""What the tests of deploy/ share: where the files are, what our processes really expose, and the names in a PromQL expression."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry, generate_latest

from student_trainer.run_metrics import RunMetrics

ROOT = Path(__file__).parents[3]
SAMPLES = Path(__file__).parent / "samples"

MEMBER = {"url": "a:8001", "standing": "in", "for_s": 9.0, "in_flight": 3, "limit": 8, "latency_ms": 41.0, "failures": 1}
TOTALS = {
    "images": 400.0, "asked": 300.0, "from_store": 100.0, "seconds": 9.0, "decode": 0.2, "store": 0.1, "teacher": 2.5, "student": 6.2,
    "images of small": 400.0, "seconds of small": 3.5, "images of big": 400.0, "seconds of big": 2.0,
}  # fmt: skip
"""Of one second; docs/monitoring.md says what each is."""


def rows(second: int, now: float) -> list[dict[str, Any]]:
    """What a stage says in its second number `second`, with several teachers, an evaluation, a checkpoint and two students stopped."""
    step = {
        "kind": "step", "time": now, "step": 10 * second, "of": 1000, "epoch": 1, "images": 40, "images_per_s": 400.0,
        "losses": {"small": 0.5, "big": 0.7}, "agreement": {"small": 0.75}, "learning_rate": {"small": 0.1},
        "totals": {name: value * second for name, value in TOTALS.items()},
        "seen": 200 * second, "rejected": second, "rejected_limit": 0.01, "store_errors": second, "pool": {"members": [MEMBER]},
    }  # fmt: skip
    return [
        step,
        {"kind": "epoch", "time": now, "step": 10, "epoch": 1, "top1": {"small": 0.8}},
        {"kind": "checkpoint", "time": now, "step": 10, "epoch": 1},
        {"kind": "stopped", "time": now, "student": "big", "why": "diverged", "detail": "the loss is not finite", "step": 9},
        {"kind": "stopped", "time": now, "student": "third", "why": "halving", "detail": "the third of three", "step": 9},
    ]


def run_text(metrics: RunMetrics) -> str:
    """What Prometheus gets from a run."""
    registry = CollectorRegistry()
    registry.register(metrics)
    return generate_latest(registry).decode()


def names_in(text: str) -> set[str]:
    """Names of the series in Prometheus' text format."""
    return set(re.findall(r"^[a-zA-Z_:][\w:]*", text, re.MULTILINE))


def names_of(expression: str) -> set[str]:
    """The series that a PromQL expression asks for."""
    bare = re.sub(r'"[^"]*"|\{[^}]*\}|\[[^]]*\]|\$\w+|\b\d[\w.]*(?:e-?\d+)?', " ", expression)
    bare = re.sub(r"\b(by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)", " ", bare)
    words = re.findall(r"[a-zA-Z_:][\w:]*(?!\w|\s*\()", bare)
    return set(words) - {"by", "without", "and", "or", "unless", "offset", "group_left", "bool"}


def dashboard() -> dict[str, Any]:
    """The one dashboard."""
    board: dict[str, Any] = json.loads((ROOT / "deploy/grafana/dashboards/distill.json").read_text())
    return board


def expressions() -> list[tuple[str, str]]:
    """(title of the panel, PromQL) of everything that the dashboard asks."""
    return [(panel["title"], target["expr"]) for panel in dashboard()["panels"] for target in panel.get("targets", [])]


def rules() -> list[dict[str, Any]]:
    """All rules, recorded and alerting."""
    groups = yaml.safe_load((ROOT / "deploy/prometheus/alerts.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


@pytest.fixture(scope="session")
def deploy() -> SimpleNamespace:
    """All of the above; test modules cannot import from here."""
    functions = (rows, run_text, names_in, names_of, dashboard, expressions, rules)
    return SimpleNamespace(root=ROOT, samples=SAMPLES, **{function.__name__: function for function in functions})


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each question of the dashboard, where a test takes one."""
    if "expression" in metafunc.fixturenames:
        metafunc.parametrize(("title", "expression"), expressions())


@pytest.fixture(scope="session")
def tool() -> Callable[[str], str]:
    """Path of a program of Prometheus (Debian: package `prometheus`); the test is skipped where it is not there."""

    def find(name: str) -> str:
        path = shutil.which(name)
        if path is None:
            pytest.skip(f"{name} is not installed (Debian: apt-get install --no-install-recommends prometheus)")
        return path

    return find


@pytest.fixture(params=["cpu", "gpu", "everything", "serving only", "a claim with models"])
def objects(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """All objects of the chart, with each of the combinations of values."""
    from tests.unit.deploy.chart import rendered

    return rendered(request.param)


@pytest.fixture
def everything() -> list[dict[str, Any]]:
    """All objects of the chart with all that can be turned on."""
    from tests.unit.deploy.chart import rendered

    return rendered("everything")
