"""Rules, alerts and the dashboard ask for what is really exposed, and Prometheus' own programs agree."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from student_trainer.run_metrics import RunMetrics
from student_trainer.waits import ADVICE, WORTH_SAYING
from teacher_server.fair_queue import FairQueue
from teacher_server.metrics import GatewayMetrics

ROOT = Path(__file__).parents[3]
PROMETHEUS = ROOT / "deploy/prometheus"
GPU_OF_TRITON = {"nv_gpu_utilization", "nv_gpu_memory_used_bytes", "nv_gpu_memory_total_bytes"}
"""Only with a GPU, so not in the sample; table "GPU Metrics" of docs/user_guide/metrics.md in triton-inference-server/server."""
OF_PROMETHEUS = {"up"}

Tool = Callable[[str], str]


@pytest.fixture(scope="module")
def exposed(deploy: Any) -> set[str]:
    """All that there is to be asked for."""
    metrics = RunMetrics("x", "distill")
    for second in (0, 1):
        for row in deploy.rows(second, 1000.0 + second):
            metrics.show(row)
    gateway = GatewayMetrics()
    gateway.watch_queue(FairQueue(1, 1, 1))
    gateway.requests.labels("/v1/soft-labels", "200").inc()
    gateway.latency.labels("/v1/soft-labels").observe(0.1)
    gateway.images.labels("x", "labelled").inc()
    gateway.refused("queue_full", "x")
    samples = [(deploy.samples / name).read_text() for name in ("triton.txt", "ray.txt")]
    texts = (deploy.run_text(metrics), gateway.text().decode(), *samples)
    recorded = {rule["record"] for rule in deploy.rules() if "record" in rule}
    return set().union(*map(deploy.names_in, texts)) | GPU_OF_TRITON | OF_PROMETHEUS | recorded


def anchors(markdown: str) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", markdown, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_names_in_an_expression_are_found(deploy: Any) -> None:
    found = deploy.names_of('sum by (model) (rate(nv_count{a="b_c"}[5m])) / 1e6 > 0.5 * on (job) x:y:z and d offset 30m unless e == 1')
    assert found == {"nv_count", "x:y:z", "d", "e"}


def test_the_dashboard_asks_for_what_is_exposed(title: str, expression: str, deploy: Any, exposed: set[str]) -> None:
    names = deploy.names_of(expression)
    assert names
    assert names - exposed == set()


def test_rules_and_alerts_ask_for_what_is_exposed(deploy: Any, exposed: set[str]) -> None:
    unknown = {rule.get("alert") or rule["record"]: deploy.names_of(rule["expr"]) - exposed for rule in deploy.rules()}
    assert {name: names for name, names in unknown.items() if names} == {}


def test_every_alert_says_what_is_the_matter_how_bad_it_is_and_where_its_runbook_is(deploy: Any) -> None:
    there = anchors((ROOT / "docs/operations.md").read_text())
    alerts = [rule for rule in deploy.rules() if "alert" in rule]
    assert len(alerts) == len({alert["alert"] for alert in alerts}) > 10
    for alert in alerts:
        assert alert["annotations"]["summary"]
        assert alert["labels"]["severity"] in ("critical", "warning", "info")
        document, _, anchor = alert["annotations"]["runbook"].partition("#")
        assert (document, anchor in there) == ("docs/operations.md", True), alert["alert"]
        assert alert["alert"] in (ROOT / "docs/operations.md").read_text()


def test_every_alert_is_tested_both_ways(deploy: Any) -> None:
    tests = yaml.safe_load((PROMETHEUS / "alerts_test.yml").read_text())["tests"]
    checks = [check for test in tests for check in test.get("alert_rule_test", [])]
    alerts = {rule["alert"] for rule in deploy.rules() if "alert" in rule}
    assert {check["alertname"] for check in checks if check["exp_alerts"]} == alerts
    assert {check["alertname"] for check in checks if not check["exp_alerts"]} == alerts


def test_promtool_finds_nothing_wrong(tool: Tool) -> None:
    promtool = tool("promtool")
    for words in (
        ("check", "rules", "--lint=all", "--lint-fatal", "alerts.yml"),
        ("check", "config", "--syntax-only", "prometheus.yml"),
        ("test", "rules", "alerts_test.yml"),
    ):
        done = subprocess.run([promtool, *words], cwd=PROMETHEUS, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("was", "becomes"),
    [
        ("silent_seconds > 60", "silent_seconds > 6000"),
        ("> 400", "> 200"),
        ('reason!="CANCELED"', 'reason!="x"'),
        ("/ 1e6", "/ 1e3"),
        (' or absent(up{job="gateway"})', ""),
        ("> 0 unless", "> 9 unless"),
    ],
)
def test_a_rule_that_says_something_else_fails_its_test(was: str, becomes: str, tool: Tool, tmp_path: Path) -> None:
    text = (PROMETHEUS / "alerts.yml").read_text()
    assert was in text
    (tmp_path / "alerts.yml").write_text(text.replace(was, becomes))
    (tmp_path / "alerts_test.yml").write_text((PROMETHEUS / "alerts_test.yml").read_text())
    done = subprocess.run([tool("promtool"), "test", "rules", "alerts_test.yml"], cwd=tmp_path, capture_output=True, timeout=60)
    assert done.returncode == 1


def test_every_panel_says_what_it_shows_and_stands_beside_the_others(deploy: Any) -> None:
    panels = deploy.dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        assert panel["type"] == "row" or len(panel["description"]) > 15, panel["title"]
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert at["x"] + at["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells


def test_the_dashboard_answers_what_it_is_there_for(deploy: Any) -> None:
    titles = [panel["title"] for panel in deploy.dashboard()["panels"] if panel["type"] == "row"]
    assert titles[0] == "Is the student waiting, for whom, what to scale"
    assert {"Is the teacher healthy", "Gateway", "Labels", "Students", "Cost so far"} < set(titles)


def test_it_names_what_to_scale_in_the_words_of_the_terminal(deploy: Any) -> None:
    asked = {expression for title, expression in deploy.expressions() if title == "Scale this"}
    assert len(asked) == len(ADVICE)
    for name, advice in ADVICE.items():
        assert any(f'for="{name}"' in e and f'"{advice}"' in e and f">= {WORTH_SAYING}," in e for e in asked), name


def test_every_variable_in_an_expression_is_one_of_the_dashboard_or_of_grafana(deploy: Any) -> None:
    variables = {variable["name"] for variable in deploy.dashboard()["templating"]["list"]}
    used = {name for _, expression in deploy.expressions() for name in re.findall(r"\$(\w+)", expression)}
    assert used - variables == {"__range"}
    assert variables - used == {"datasource"}


def test_grafana_is_told_of_the_prometheus_of_compose_and_of_the_dashboard() -> None:
    provisioning = ROOT / "deploy/grafana/provisioning"
    source = yaml.safe_load((provisioning / "datasources/prometheus.yml").read_text())["datasources"][0]
    assert (source["type"], source["url"]) == ("prometheus", "http://prometheus:9090")
    scrape = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    assert source["jsonData"]["timeInterval"] == scrape["global"]["scrape_interval"]
    provider = yaml.safe_load((provisioning / "dashboards/distill.yml").read_text())["providers"][0]
    assert (provider["type"], provider["options"]["path"]) == ("file", "/var/lib/grafana/dashboards")
