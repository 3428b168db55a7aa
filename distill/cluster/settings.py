"""Settings of the worker groups that all stages share."""

from __future__ import annotations

import os

from pydantic import Field

from distill.config import Section


class RaySettings(Section):
    """The Ray cluster that labels and trains: every stage runs in worker groups of these settings."""

    address: str | None = None
    """Address of a running cluster. Without it one is started on this machine, bound to loopback, with a token of its own."""
    num_workers: int = Field(default=1, ge=1)
    """Training workers (data-parallel)."""
    use_gpu: bool = False
    """One GPU for each training worker."""
    cpus_per_worker: float = Field(default=1, gt=0)
    """CPUs that Ray sets aside for each worker."""
    threads_per_worker: int = Field(default=0, ge=0)
    """Threads that torch uses in each worker on a CPU; 0 shares this machine's cores among the workers."""
    max_failures: int = Field(default=3, ge=-1)
    """Times that a dead worker is replaced and training resumes from the last checkpoint; -1 for always."""

    @property
    def threads(self) -> int:
        """Threads that torch uses in each worker on a CPU. (Ray itself would leave it one.)"""
        return self.threads_per_worker or max(1, (os.cpu_count() or 1) // self.num_workers)
