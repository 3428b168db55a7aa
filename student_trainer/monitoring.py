"""Who watches a stage that trains students, beside the terminal and the journal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from distill.cluster.watch import RowSink
from distill.monitor_settings import MonitorSettings
from distill.progress import console
from student_trainer.run_metrics import MetricsServer, RunMetrics
from student_trainer.tensorboard_log import TensorBoardLog


@contextmanager
def open_sinks(settings: MonitorSettings, folder: Path, title: str) -> Iterator[list[RowSink]]:
    """Whom `settings` ask for. The worker group's watch closes them when the work ends; the end of the block does where it never began.

    Args:
        folder: of the stage; its parent is the run's.
        title: what the stage does, as the terminal says it.

    Raises:
        ServerStartError: the Prometheus port is taken.
    """
    with ExitStack() as opened:
        sinks: list[RowSink] = []
        if settings.prometheus_port is not None:
            metrics = RunMetrics(folder.absolute().parent.name, title)
            server = MetricsServer(metrics, settings.prometheus_port, settings.prometheus_host)
            opened.callback(server.close, failed=True)
            console.print(f"  metrics for Prometheus: {server.url}")
            sinks.append(server)
        if settings.tensorboard:
            log = TensorBoardLog(folder / "tensorboard")
            opened.callback(log.close, failed=True)
            sinks.append(log)
        yield sinks
