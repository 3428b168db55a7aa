"""Settings of what a run shows of itself beside the terminal. They change nothing of what comes out of it."""

from __future__ import annotations

from pydantic import Field

from distill.config import Section


class MonitorSettings(Section):
    """Who else may watch the students being trained: TensorBoard, Prometheus. See docs/monitoring.md."""

    tensorboard: bool = True
    """Write event files into the folder `tensorboard` of the stage; look at them with `tensorboard --logdir RUN_DIR`."""
    prometheus_port: int | None = Field(default=None, ge=0, le=65535)
    """Port where Prometheus finds `/metrics` while students are trained; 0 takes any free one and prints it. Default: none."""
    prometheus_host: str = Field(default="127.0.0.1", min_length=1)
    """Address of that port. Beyond loopback (0.0.0.0 in a container) whoever reaches it reads the names of runs and students."""
