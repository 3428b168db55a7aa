"""Training from the store with 1, 2 and 4 workers of the product's own group on one machine: what they cost where cores are shared.

Unit of data: one training, from its journal of rows.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from bench.distill import networks  # noqa: F401 - a worker imports this module, and with it has the networks
from bench.distill.cases import Prepared
from distill.cluster.group import run_workers
from distill.cluster.settings import RaySettings
from distill.cluster.worker import Worker
from student_trainer.worker import train_worker


def train(config: dict[str, Any], worker: Worker) -> None:
    """What each worker calls: the product's loop."""
    train_worker(config, worker)


def measure_workers(prepared: Prepared, num_workers: int) -> dict[str, Any]:
    """One epoch from the filled store; global batch and images are the same for any number.

    Returns:
        images_per_s of the whole group between the warm-up and the last step that is measured.

    Raises:
        RuntimeError: too few rows for a measurement.
    """
    case, settings = prepared.case, RaySettings(num_workers=num_workers, threads_per_worker=max(1, prepared.threads // num_workers))
    with tempfile.TemporaryDirectory(prefix="workers-", dir=prepared.folder) as name:
        folder = Path(name)
        job = prepared.job(folder, prepared.embedded, prepared.folder / "store-1", prepared.train())
        with run_workers(train, job.model_dump(mode="json"), settings, folder, f"{num_workers} workers"):
            pass
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["kind"] == "step" and case.warmup <= row["step"] <= case.steps]
    if len(steps) < 2:
        raise RuntimeError(f"{len(steps)} rows between steps {case.warmup} and {case.steps}: too few for a measurement")
    first, last = steps[0], steps[-1]
    images = (last["step"] - first["step"]) * case.batch
    seconds = last["totals"]["seconds"] - first["totals"]["seconds"]
    losses = [(row["step"], next(iter(row["losses"].values()))) for row in steps]
    return {"images_per_s": images / seconds, "images": images, "losses": losses}
