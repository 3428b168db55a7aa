"""What a run tells Prometheus: `/metrics` of the process that drives it, on loopback, while students are trained.

Flow: rows of the training loop -> `RunMetrics` keeps the last of each kind -> Prometheus asks now and then. The loop counts for itself and
over restarts, so its totals are handed on as they are. Counters begin anew with each stage (`distill_run_info` names it), which Prometheus
takes for what it is, a restarted process. Unit of data: one row. docs/monitoring.md lists the names.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from typing import Any
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from distill import __version__
from distill.cluster.worker import Row
from distill.errors import ServerStartError
from student_trainer.totals import of_each_student
from student_trainer.waits import Waits

HOST = "127.0.0.1"


class RunMetrics(Collector):
    """A `RowSink`, and what a Prometheus registry asks.

    Args:
        run, stage: what `distill_run_info` says.
    """

    def __init__(self, run: str, stage: str) -> None:
        self._info = {"run": run, "stage": stage, "version": __version__}
        self._lock = threading.Lock()
        self._last: dict[str, Row] = {}
        """Kind -> the last row of it."""
        self._top1: dict[str, float] = {}
        self._stopped: set[str] = set()

    def show(self, row: Row) -> None:
        """Keep what the row says."""
        with self._lock:
            self._last[row["kind"]] = row
            self._top1 |= row.get("top1", {})
            if row["kind"] == "stopped":
                self._stopped.add(row["student"])
            if row["kind"] == "step":
                self._last.pop("silence", None)  # it answers again

    def close(self, failed: bool) -> None:
        """Nothing to put away; the last values stay to be asked for."""

    def collect(self) -> Iterator[Metric]:
        """The metrics as they are now."""
        with self._lock:
            last, top1, stopped = dict(self._last), dict(self._top1), set(self._stopped)
        yield InfoMetricFamily("distill_run", "The run and the stage that is being trained", value=self._info)
        if (step := last.get("step")) is not None and "totals" in step:
            yield from _of_step(step)
            yield from _of_students(step, top1, stopped)
            yield from _of_teachers(step)
        silent_s = last["silence"]["seconds"] if "silence" in last else 0.0
        yield GaugeMetricFamily("distill_teacher_silent_seconds", "For how long no teacher has given an answer", value=silent_s)
        if (checkpoint := last.get("checkpoint")) is not None:
            text = "When the last checkpoint was written, in seconds since 1970"
            yield GaugeMetricFamily("distill_last_checkpoint_timestamp_seconds", text, value=checkpoint["time"])
            yield GaugeMetricFamily("distill_last_checkpoint_step", "Step that the last checkpoint goes on with", value=checkpoint["step"])


def _of_step(row: Row) -> Iterator[Metric]:
    totals = row["totals"]
    yield CounterMetricFamily("distill_images", "Crops that the students were trained on", value=totals["images"])
    labels = {"teacher": totals["asked"], "store": totals["from_store"]}
    yield _counter("distill_labels", "Soft labels by where they came from", "source", labels.items())
    waits = {name: totals[name] for name in Waits.model_fields}
    yield _counter("distill_waits_seconds", "Time of the training loop by what it went to: training, or waiting", "for", waits.items())
    yield CounterMetricFamily("distill_rejected_images", "Images that could not be used", value=row["rejected"])
    yield GaugeMetricFamily("distill_step", "Steps done", value=row["step"])
    yield GaugeMetricFamily("distill_steps", "Steps in all", value=row["of"])
    yield GaugeMetricFamily("distill_epoch", "Passes over the images that are done", value=row["epoch"])
    yield GaugeMetricFamily("distill_images_per_second", "Rate over the last half minute", value=row["images_per_s"] or 0.0)
    text = "When the run last said how far it is, in seconds since 1970"
    yield GaugeMetricFamily("distill_last_step_timestamp_seconds", text, value=row["time"])


def _of_students(row: Row, top1: dict[str, float], stopped: set[str]) -> Iterator[Metric]:
    yield _gauge("distill_student_loss", "Loss of the last batch, in nats", "student", row["losses"].items())
    text = "Share of crops on which student and teacher have the same largest logit, over about the last 20 steps"
    yield _gauge("distill_student_agreement_ratio", text, "student", row["agreement"].items())
    yield _gauge("distill_student_learning_rate", "Learning rate of the last step", "student", row["learning_rate"].items())
    yield _gauge("distill_student_top1_ratio", "Share of test images that are right, at the last evaluation", "student", top1.items())
    flags = {student: float(student in stopped) for student in (*row["losses"], *stopped)}
    yield _gauge("distill_student_stopped", "1 for a student that is trained no more", "student", flags.items())
    each = of_each_student(row["totals"])
    seconds = {student: counts["seconds"] for student, counts in each.items()}
    yield _counter("distill_student_step_seconds", "Time that the steps of a student took", "student", seconds.items())


def _of_teachers(row: Row) -> Iterator[Metric]:
    members = row["pool"]["members"] if "pool" in row else []
    values: tuple[tuple[str, str, dict[str, float | None]], ...] = (
        ("distill_teacher_up", "1 for a teacher that gets requests", {m["url"]: float(m["standing"] == "in") for m in members}),
        ("distill_teacher_in_flight", "Requests under way", {m["url"]: m["in_flight"] for m in members}),
        ("distill_teacher_in_flight_limit", "Requests that may be under way", {m["url"]: m["limit"] for m in members}),
        ("distill_teacher_latency_seconds", "Latency, a moving mean", {m["url"]: _seconds(m["latency_ms"]) for m in members}),
    )
    for name, text, by_url in values:
        yield _gauge(name, text, "url", by_url.items())
    failures = {m["url"]: m["failures"] for m in members}
    yield _counter("distill_teacher_failures", "Requests that failed and were asked of another", "url", failures.items())


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1000


def _gauge(name: str, text: str, label: str, values: Iterable[tuple[str, Any]]) -> Metric:
    family = GaugeMetricFamily(name, text, labels=[label])
    for key, value in values:
        if value is not None:
            family.add_metric([key], value)
    return family


def _counter(name: str, text: str, label: str, values: Iterable[tuple[str, float]]) -> Metric:
    family = CounterMetricFamily(name, text, labels=[label])
    for key, value in values:
        family.add_metric([key], value)
    return family


class MetricsServer:
    """`/metrics` of one `RunMetrics` on loopback, until `close`; a `RowSink` itself.

    Args:
        port: 0 takes any free one.

    Raises:
        ServerStartError: the port is taken.
    """

    def __init__(self, metrics: RunMetrics, port: int) -> None:
        self.metrics = metrics
        registry = CollectorRegistry()
        registry.register(metrics)
        try:
            self._server: WSGIServer
            self._server, self._thread = start_http_server(port, HOST, registry)
        except OSError as error:
            raise ServerStartError(
                f"monitor.prometheus_port={port} cannot be used: {error}; give another, or 0 for any free one"
            ) from error
        self.port: int = self._server.server_port

    @property
    def url(self) -> str:
        """Where Prometheus looks."""
        return f"http://{HOST}:{self.port}/metrics"

    def show(self, row: Row) -> None:
        """See `RunMetrics`."""
        self.metrics.show(row)

    def close(self, failed: bool) -> None:
        """Stop answering, free the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
