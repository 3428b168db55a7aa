"""What a run tells Prometheus: `/metrics` of the process that drives it, while students are trained.

Flow: rows of the training loop -> `RunMetrics` keeps the last of each kind and counts -> Prometheus asks now and then. The loop's totals
go back where it goes on from a checkpoint, and Prometheus would take that for a counter which began anew and has come so far since. So
counters are of what was done while this process looked: each rise of a total is added, and a fall adds nothing. They begin at 0 in each
process and stage (`distill_run_info` names it). Unit of data: one row. docs/monitoring.md lists the names.
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

LOOPBACK = "127.0.0.1"
SEEN, REJECTED, STORE_ERRORS, FAILURES_OF = "seen", "rejected", "store_errors", "failures of "
"""Names of counters beside those of `student_trainer.totals`; the first three are keys of the row as well."""


class Rises:
    """Counters that never fall, of totals that may."""

    def __init__(self) -> None:
        self._last: dict[str, float] = {}
        self.counted: dict[str, float] = {}
        """Name -> the sum of its rises."""

    def take(self, totals: dict[str, float], first: float | None = None) -> None:
        """The totals as they are now.

        Args:
            first: what a name that was not there yet is counted from; None for what it is now, so that nothing from before is counted.
        """
        for name, now in totals.items():
            before = self._last.get(name, now if first is None else first)
            self.counted[name] = self.counted.get(name, 0.0) + max(0.0, now - before)
            self._last[name] = now


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
        self._stopped: dict[str, str] = {}
        """Student -> why it is trained no more."""
        self._rises = Rises()

    def show(self, row: Row) -> None:
        """Keep what the row says."""
        with self._lock:
            self._last[row["kind"]] = row
            self._top1 |= row.get("top1", {})
            if row["kind"] == "stopped":
                self._stopped[row["student"]] = row["why"]
            if row["kind"] == "step":
                self._last.pop("silence", None)  # it answers again
                self._count(row)

    def close(self, failed: bool) -> None:
        """Nothing to put away; the last values stay to be asked for."""

    def collect(self) -> Iterator[Metric]:
        """The metrics as they are now."""
        with self._lock:
            last, top1, stopped = dict(self._last), dict(self._top1), dict(self._stopped)
            counted = dict(self._rises.counted)
        yield InfoMetricFamily("distill_run", "The run and the stage that is being trained", value=self._info)
        if (step := last.get("step")) is not None and "totals" in step:
            yield from _of_step(step, counted)
            yield from _of_students(step, counted, top1, stopped)
            yield from _of_teachers(step, counted)
        silent_s = last["silence"]["seconds"] if "silence" in last else 0.0
        yield GaugeMetricFamily("distill_teacher_silent_seconds", "For how long no teacher has given an answer", value=silent_s)
        if (checkpoint := last.get("checkpoint")) is not None:
            text = "When the last checkpoint was written, in seconds since 1970"
            yield GaugeMetricFamily("distill_last_checkpoint_timestamp_seconds", text, value=checkpoint["time"])
            yield GaugeMetricFamily("distill_last_checkpoint_step", "Step that the last checkpoint goes on with", value=checkpoint["step"])

    def _count(self, row: Row) -> None:
        self._rises.take(row.get("totals", {}))
        # These the workers count from their start, which is not before this process looks.
        self._rises.take({name: row[name] for name in (SEEN, REJECTED, STORE_ERRORS) if name in row}, first=0.0)
        self._rises.take({FAILURES_OF + m["url"]: m["failures"] for m in _members(row)}, first=0.0)


def _of_step(row: Row, totals: dict[str, float]) -> Iterator[Metric]:
    yield CounterMetricFamily("distill_images", "Crops that the students were trained on", value=totals["images"])
    labels = {"teacher": totals["asked"], "store": totals["from_store"]}
    yield _counter("distill_labels", "Soft labels by where they came from", "source", labels.items())
    waits = {name: totals[name] for name in Waits.model_fields}
    yield _counter("distill_waits_seconds", "Time of the training loop by what it went to: training, or waiting", "for", waits.items())
    yield CounterMetricFamily("distill_rejected_images", "Images that could not be used", value=totals.get(REJECTED, 0.0))
    if SEEN in totals:
        yield CounterMetricFamily(
            "distill_seen_images", "Images tried, each once, those that could not be used among them", value=totals[SEEN]
        )
    if "rejected_limit" in row:
        text = "Largest share of the images tried that may be unusable; the run stops above it"
        yield GaugeMetricFamily("distill_rejected_limit_ratio", text, value=row["rejected_limit"])
    if STORE_ERRORS in totals:
        text = "Files of the label store found damaged or gone; their labels are asked for again"
        yield CounterMetricFamily("distill_store_errors", text, value=totals[STORE_ERRORS])
    yield GaugeMetricFamily("distill_step", "Steps done", value=row["step"])
    yield GaugeMetricFamily("distill_steps", "Steps in all", value=row["of"])
    yield GaugeMetricFamily("distill_epoch", "Passes over the images that are done", value=row["epoch"])
    yield GaugeMetricFamily("distill_images_per_second", "Rate over the last half minute", value=row["images_per_s"] or 0.0)
    text = "When the run last said how far it is, in seconds since 1970"
    yield GaugeMetricFamily("distill_last_step_timestamp_seconds", text, value=row["time"])


def _of_students(row: Row, totals: dict[str, float], top1: dict[str, float], stopped: dict[str, str]) -> Iterator[Metric]:
    yield _gauge("distill_student_loss", "Loss of the last batch, in nats", "student", row["losses"].items())
    text = "Share of crops on which student and teacher have the same largest logit, over about the last 20 steps"
    yield _gauge("distill_student_agreement_ratio", text, "student", row["agreement"].items())
    yield _gauge("distill_student_learning_rate", "Learning rate of the last step", "student", row["learning_rate"].items())
    yield _gauge("distill_student_top1_ratio", "Share of test images that are right, at the last evaluation", "student", top1.items())
    flags = {student: float(student in stopped) for student in (*row["losses"], *stopped)}
    yield _gauge("distill_student_stopped", "1 for a student that is trained no more", "student", flags.items())
    diverged = {student: float(stopped.get(student) == "diverged") for student in flags}
    yield _gauge(
        "distill_student_diverged", "1 for a student that was stopped because its numbers were not finite", "student", diverged.items()
    )
    each = of_each_student(totals)
    seconds = {student: counts["seconds"] for student, counts in each.items()}
    yield _counter("distill_student_step_seconds", "Time that the steps of a student took", "student", seconds.items())


def _members(row: Row) -> list[dict[str, Any]]:
    """The teachers, where there are several."""
    members: list[dict[str, Any]] = row["pool"]["members"] if "pool" in row else []
    return members


def _of_teachers(row: Row, totals: dict[str, float]) -> Iterator[Metric]:
    members = _members(row)
    values: tuple[tuple[str, str, dict[str, float | None]], ...] = (
        ("distill_teacher_up", "1 for a teacher that gets requests", {m["url"]: float(m["standing"] == "in") for m in members}),
        ("distill_teacher_in_flight", "Requests under way", {m["url"]: m["in_flight"] for m in members}),
        ("distill_teacher_in_flight_limit", "Requests that may be under way", {m["url"]: m["limit"] for m in members}),
        ("distill_teacher_latency_seconds", "Latency, a moving mean", {m["url"]: _seconds(m["latency_ms"]) for m in members}),
    )
    for name, text, by_url in values:
        yield _gauge(name, text, "url", by_url.items())
    failures = {m["url"]: totals[FAILURES_OF + m["url"]] for m in members}
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
    """`/metrics` of one `RunMetrics`, until `close`; a `RowSink` itself.

    Args:
        port: 0 takes any free one.
        host: the address it listens on. Nobody is asked for a key: beyond loopback, who reaches the port reads names of runs and students.

    Raises:
        ServerStartError: the port is taken, or the address is not one of this machine.
    """

    def __init__(self, metrics: RunMetrics, port: int, host: str = LOOPBACK) -> None:
        self.metrics = metrics
        self._host = host
        registry = CollectorRegistry()
        registry.register(metrics)
        try:
            self._server: WSGIServer
            self._server, self._thread = start_http_server(port, host, registry)
        except OSError as error:
            raise ServerStartError(
                f"monitor.prometheus_port={port} cannot be used on {host}: {error}; give another, or 0 for any free one"
            ) from error
        self.port: int = self._server.server_port

    @property
    def url(self) -> str:
        """Where Prometheus looks."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"http://{host}:{self.port}/metrics"

    def show(self, row: Row) -> None:
        """See `RunMetrics`."""
        self.metrics.show(row)

    def close(self, failed: bool) -> None:
        """Stop answering, free the port."""
        if not self._thread.is_alive():
            return
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
