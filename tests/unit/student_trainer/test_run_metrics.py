"""Prometheus' own parser reads what a run says of itself over HTTP, under names with units."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from distill.errors import ServerStartError
from student_trainer.run_metrics import MetricsServer, RunMetrics

MEMBER = {"url": "a:8001", "standing": "in", "for_s": 9.0, "in_flight": 3, "limit": 8, "latency_ms": 41.0, "failures": 1}
AWAY = {**MEMBER, "url": "b:8001", "standing": "away", "in_flight": 0, "latency_ms": None, "failures": 7}
STEP = {
    "kind": "step", "time": 1000.0, "step": 40, "of": 100, "epoch": 1, "images": 10, "images_per_s": 250.0,
    "losses": {"small": 0.5, "big": None}, "agreement": {"small": 0.75}, "learning_rate": {"small": 0.1},
    "totals": {
        "images": 400.0, "asked": 300.0, "from_store": 100.0, "seconds": 9.0, "decode": 1.0, "store": 0.5, "teacher": 2.5, "student": 5.0,
        "images of small": 400.0, "seconds of small": 3.5,
    },
    "seen": 200, "rejected": 2, "rejected_limit": 0.01, "store_errors": 1,
}  # fmt: skip
FIRST = {**STEP, "step": 0, "totals": dict.fromkeys(STEP["totals"], 0.0), "seen": 0, "rejected": 0, "store_errors": 0}
"""What this process sees first; what was done before it is not counted."""


@pytest.fixture
def server() -> Iterator[MetricsServer]:
    server = MetricsServer(RunMetrics("runs/x", "distill"), port=0)
    yield server
    server.close(failed=False)


def scrape(server: MetricsServer) -> dict[tuple[str, str], float]:
    """(name, value of the only label or "") -> value."""
    answer = httpx.get(server.url, timeout=10)
    assert answer.status_code == 200
    samples = [sample for family in text_string_to_metric_families(answer.text) for sample in family.samples]
    return {(s.name, next(iter(s.labels.values()), "") if len(s.labels) < 2 else ""): s.value for s in samples}


def test_before_the_first_step_there_is_only_the_run(server: MetricsServer) -> None:
    assert set(scrape(server)) == {("distill_run_info", ""), ("distill_teacher_silent_seconds", "")}


def test_all_that_rows_say_is_there(server: MetricsServer) -> None:
    server.show(FIRST)
    server.show({**STEP, "pool": {"members": [MEMBER, AWAY]}})
    server.show({"kind": "epoch", "time": 1001.0, "step": 40, "epoch": 1, "top1": {"small": 0.8}})
    server.show({"kind": "checkpoint", "time": 1002.0, "step": 40, "epoch": 1})
    found = scrape(server)
    expected: dict[tuple[str, str], Any] = {
        ("distill_images_total", ""): 400,
        ("distill_labels_total", "teacher"): 300,
        ("distill_labels_total", "store"): 100,
        ("distill_waits_seconds_total", "decode"): 1,
        ("distill_waits_seconds_total", "store"): 0.5,
        ("distill_waits_seconds_total", "teacher"): 2.5,
        ("distill_waits_seconds_total", "student"): 5,
        ("distill_seen_images_total", ""): 200,
        ("distill_rejected_images_total", ""): 2,
        ("distill_rejected_limit_ratio", ""): 0.01,
        ("distill_store_errors_total", ""): 1,
        ("distill_step", ""): 40,
        ("distill_steps", ""): 100,
        ("distill_epoch", ""): 1,
        ("distill_images_per_second", ""): 250,
        ("distill_last_step_timestamp_seconds", ""): 1000,
        ("distill_student_loss", "small"): 0.5,
        ("distill_student_agreement_ratio", "small"): 0.75,
        ("distill_student_learning_rate", "small"): 0.1,
        ("distill_student_top1_ratio", "small"): 0.8,
        ("distill_student_stopped", "small"): 0,
        ("distill_student_stopped", "big"): 0,
        ("distill_student_diverged", "small"): 0,
        ("distill_student_diverged", "big"): 0,
        ("distill_student_step_seconds_total", "small"): 3.5,
        ("distill_teacher_up", "a:8001"): 1,
        ("distill_teacher_up", "b:8001"): 0,
        ("distill_teacher_in_flight", "a:8001"): 3,
        ("distill_teacher_in_flight", "b:8001"): 0,
        ("distill_teacher_in_flight_limit", "a:8001"): 8,
        ("distill_teacher_in_flight_limit", "b:8001"): 8,
        ("distill_teacher_latency_seconds", "a:8001"): pytest.approx(0.041),
        ("distill_teacher_failures_total", "a:8001"): 1,
        ("distill_teacher_failures_total", "b:8001"): 7,
        ("distill_last_checkpoint_timestamp_seconds", ""): 1002,
        ("distill_last_checkpoint_step", ""): 40,
        ("distill_teacher_silent_seconds", ""): 0,
        ("distill_run_info", ""): 1,
    }
    assert found == expected


def counters(metrics: RunMetrics) -> dict[str, float]:
    return {s.name: s.value for family in metrics.collect() if family.type == "counter" for s in family.samples if not s.labels}


def test_counters_do_not_fall_where_a_run_goes_on_from_a_checkpoint() -> None:
    """Workers that died at 400 images are replaced and say 320, then 360: 40 more were done, and none are taken back."""
    metrics, seen = RunMetrics("x", "distill"), []
    for images, rejected in ((360.0, 1), (400.0, 3), (320.0, 0), (360.0, 2)):
        metrics.show({**STEP, "totals": {**STEP["totals"], "images": images}, "rejected": rejected})
        seen.append(counters(metrics))
    assert [values["distill_images_total"] for values in seen] == [0, 40, 40, 80]
    assert [values["distill_rejected_images_total"] for values in seen] == [1, 3, 3, 5]


def test_a_process_that_resumes_counts_from_what_it_finds() -> None:
    """Prometheus takes a fall for a new beginning at 0 and adds what stands there: that must be nothing."""
    metrics = RunMetrics("x", "distill")
    metrics.show({**STEP, "seen": 0, "rejected": 0, "store_errors": 0})
    assert set(counters(metrics).values()) == {0}


def test_every_family_has_a_type_and_a_help_text(server: MetricsServer) -> None:
    server.show({**STEP, "pool": {"members": [MEMBER]}})
    families = list(text_string_to_metric_families(httpx.get(server.url, timeout=10).text))
    assert [family.name for family in families if not family.documentation or family.type not in ("counter", "gauge")] == []


def test_silence_lasts_until_the_next_step(server: MetricsServer) -> None:
    server.show(STEP)
    server.show({"kind": "silence", "time": 1001.0, "seconds": 17.0})
    assert scrape(server)["distill_teacher_silent_seconds", ""] == 17
    server.show(STEP)
    assert scrape(server)["distill_teacher_silent_seconds", ""] == 0


def test_a_stopped_student_is_marked_and_one_that_diverged_by_name(server: MetricsServer) -> None:
    server.show(STEP)
    server.show({"kind": "stopped", "time": 1001.0, "student": "big", "why": "diverged", "detail": "no number", "step": 30})
    server.show({"kind": "stopped", "time": 1001.0, "student": "small", "why": "halving", "detail": "third of three", "step": 30})
    found = scrape(server)
    assert (found["distill_student_stopped", "big"], found["distill_student_diverged", "big"]) == (1, 1)
    assert (found["distill_student_stopped", "small"], found["distill_student_diverged", "small"]) == (1, 0)


def test_a_control_without_a_store_says_nothing_of_one(server: MetricsServer) -> None:
    server.show({name: value for name, value in STEP.items() if name != "store_errors"})
    assert "distill_store_errors_total" not in {name for name, _ in scrape(server)}


def test_it_listens_on_loopback_only_and_frees_its_port() -> None:
    server = MetricsServer(RunMetrics("x", "distill"), port=0)
    assert server.url == f"http://127.0.0.1:{server.port}/metrics"
    with pytest.raises(ServerStartError, match=rf"monitor\.prometheus_port={server.port} cannot be used on 127\.0\.0\.1"):
        MetricsServer(RunMetrics("x", "distill"), port=server.port)
    for _ in range(2):  # a second call does nothing
        server.close(failed=True)
    with socket.socket() as free:
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        free.bind(("127.0.0.1", server.port))


def test_an_address_of_all_networks_is_taken_where_it_is_asked_for() -> None:
    server = MetricsServer(RunMetrics("x", "distill"), port=0, host="0.0.0.0")
    try:
        assert server.url == f"http://0.0.0.0:{server.port}/metrics"
        assert httpx.get(f"http://127.0.0.1:{server.port}/metrics", timeout=10).status_code == 200
    finally:
        server.close(failed=False)
