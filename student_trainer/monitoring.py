"""Who watches a stage that trains students, beside the terminal and the journal."""

from __future__ import annotations

from pathlib import Path

from distill.cluster.watch import RowSink
from distill.monitor_settings import MonitorSettings
from distill.progress import console
from student_trainer.run_metrics import MetricsServer, RunMetrics
from student_trainer.tensorboard_log import TensorBoardLog


def open_sinks(settings: MonitorSettings, folder: Path, title: str) -> list[RowSink]:
    """Whom `settings` ask for; the worker group's watch closes them.

    Args:
        folder: of the stage; its parent is the run's.
        title: what the stage does, as the terminal says it.

    Raises:
        ServerStartError: the Prometheus port is taken.
    """
    sinks: list[RowSink] = []
    if settings.prometheus_port is not None:
        server = MetricsServer(RunMetrics(folder.absolute().parent.name, title), settings.prometheus_port)
        console.print(f"  metrics for Prometheus: {server.url}")
        sinks.append(server)
    if settings.tensorboard:
        sinks.append(TensorBoardLog(folder / "tensorboard"))
    return sinks
