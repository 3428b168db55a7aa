"""Two workers that fine-tune together end with the weights of one that does it alone, also where a bad image makes their parts unequal."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from distill.checkpoint import load_checkpoint
from distill.cluster.worker import LocalWorker
from distill.data_settings import DataSettings
from distill.models.settings import NetworkSettings
from teacher_trainer.finetune import FinetuneJob, finetune_worker
from teacher_trainer.settings import FinetuneSettings

pytestmark = pytest.mark.usefixtures("one_thread")

FINETUNE = FinetuneSettings.model_validate(
    {
        "epochs": 3,
        "global_batch": 8,
        "precision": "fp32",
        "checkpoint_every_s": 1e-9,
        "optimizer": {"name": "lars", "learning_rate": 0.05, "weight_decay": 1e-4, "warmup_share": 0.0},
    }
)
"""24 images in batches of 8, nine steps."""


@pytest.fixture
def job(tmp_path: Path) -> FinetuneJob:
    random = np.random.default_rng(0)
    for name, colour in (("green", (40, 180, 60)), ("red", (200, 50, 60))):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(12):
            pixels = np.clip(random.normal(colour, 60, (14, 14, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{number:02d}.png")
    bad = tmp_path / "images" / "red" / "05.png"
    bad.write_bytes(bad.read_bytes()[:60])
    sets = {name: {"path": str(tmp_path / "images")} for name in ("unlabelled", "labelled", "test")}
    return FinetuneJob(
        data=DataSettings.model_validate({**sets, "image_size": 12, "crop_ratio": 1.0, "max_rejected_share": 0.5}),
        finetune=FINETUNE,
        network=NetworkSettings(depth=10, width_multiplier=0.125, stem="cifar"),
        seed=3,
        class_names=("green", "red"),
        rejected_path=str(tmp_path / "rejected.jsonl"),
    )


def test_two_workers_are_one(job: FinetuneJob, tmp_path: Path) -> None:
    (tmp_path / "job.json").write_text(json.dumps(job.model_dump(mode="json")))
    program = Path(__file__).with_name("finetune_in_two.py")
    done = subprocess.run([sys.executable, str(program), str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    finetune_worker(job.model_dump(mode="json"), LocalWorker(tmp_path / "alone", device=torch.device("cpu")))
    alone = load_checkpoint(tmp_path / "alone" / "checkpoint")
    together = load_checkpoint(tmp_path / "rank-0" / "checkpoint")
    first, second = (torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True) for rank in range(2))
    assert (together.manifest["result"]["steps"], together.manifest["result"]["num_labelled"]) == (9, 24)
    for name, tensor in alone.weights.items():
        torch.testing.assert_close(first[name], tensor, rtol=1e-4, atol=1e-5, msg=name)
        assert torch.equal(first[name], second[name]), name
        assert torch.equal(first[name], together.weights[name]), name
