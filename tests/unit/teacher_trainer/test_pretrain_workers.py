"""Two workers do together what one does alone: loss, every gradient, statistics, and a whole pretraining with its restart."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from distill.checkpoint import load_checkpoint
from teacher_trainer.pretrain import ContrastiveNetwork, PretrainJob, pretrain_result

SETTINGS: dict[str, Any] = {
    "network": {"depth": 14, "width_multiplier": 0.0625, "sk_ratio": 0.0625, "stem": "cifar"},
    "embedding_dim": 8,
    "epochs": 2,
    "global_batch": 8,
    "contrastive_temperature": 0.3,
    "precision": "fp32",
    "optimizer": {"learning_rate": 1e-6},  # float32 gradients of so small a batch are good to three digits: no step may multiply that
    "checkpoint_every_s": 1e-9,  # before every step
}
STEPS: dict[str, dict[str, Any]] = {
    "whole": {},
    "memory": {"queue": 20},
    "micro": {"settings": {"micro_batch": 2}, "batch_norm": False},
    "micro-memory": {"settings": {"micro_batch": 3}, "batch_norm": False, "queue": 20},
}
"""One step each, on 7 images: 4 in worker 0 and 3 in worker 1."""
TRAININGS: dict[str, dict[str, Any]] = {
    "training": {},
    "queue": {"memory": {"size": 32, "momentum": 0.9}},
    "checkpointed": {"checkpoint_blocks": True},
}
"""Whole pretrainings of a ResNet, two epochs of two steps. All but `queue` meet a bad image: there the queue is to be as long as two
steps, for of a step that is half gone the workers would not have kept the same half as one worker alone."""


def task_of(name: str, settings: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"name": name, "settings": {**SETTINGS, **settings}, "batch_norm": True, "queue": 0, "job": None, **more}


def job_of(images: Path, settings: dict[str, Any]) -> dict[str, Any]:
    sets = {name: {"path": str(images)} for name in ("unlabelled", "labelled", "test")}
    data = {**sets, "image_size": 12, "max_rejected_share": 0.5}
    return {"data": data, "pretrain": {**SETTINGS, **settings}, "seed": 1, "rejected_path": str(images.parent / "rejected.jsonl")}


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which one worker alone and two together have done all tasks."""
    folder = tmp_path_factory.mktemp("workers")
    for images in (folder / "images", folder / "images-queue"):
        images.mkdir()
        random = np.random.default_rng(0)
        for number in range(16):
            Image.fromarray(random.integers(0, 256, (16, 18, 3), dtype=np.uint8)).save(images / f"{number:02d}.png")
    (folder / "images" / "05.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    tasks = [task_of(name, **{"settings": {}, **more}) for name, more in STEPS.items()]
    for name, settings in TRAININGS.items():
        images = folder / ("images-queue" if name == "queue" else "images")
        tasks.append(task_of(name, {}, job=job_of(images, settings)))
    (folder / "tasks.json").write_text(json.dumps(tasks))
    script = Path(__file__).with_name("pretraining_workers.py")
    made = subprocess.run(
        [sys.executable, "-W", "error", str(script), str(folder)], capture_output=True, text=True, timeout=300, check=False
    )
    assert made.returncode == 0, made.stderr
    return folder


@pytest.mark.parametrize("name", STEPS)
class TestStep:
    def test_loss_is_the_sum_of_the_parts(self, left: Path, name: str) -> None:
        alone, *parts = (torch.load(left / f"gradients-{name}-{who}.pt", weights_only=True)["said"] for who in ("alone", 0, 1))
        for key in ("loss", "accuracy", "entropy"):
            assert sum(part[key].item() for part in parts) == pytest.approx(alone[key].item(), rel=1e-5)
        assert all(part["loss"] > 0.2 * alone["loss"] for part in parts)

    def test_every_gradient_in_both_workers(self, left: Path, name: str) -> None:
        alone, *both = (torch.load(left / f"gradients-{name}-{who}.pt", weights_only=True) for who in ("alone", 0, 1))
        largest = max(gradient.abs().max().item() for gradient in alone["gradients"].values())
        assert largest > 1e-3
        for found in both:
            assert found["gradients"].keys() == alone["gradients"].keys()
            for parameter, gradient in alone["gradients"].items():
                torch.testing.assert_close(found["gradients"][parameter], gradient, rtol=1e-5, atol=1e-5 * largest, msg=parameter)

    def test_every_running_statistic(self, left: Path, name: str) -> None:
        alone, *both = (torch.load(left / f"gradients-{name}-{who}.pt", weights_only=True) for who in ("alone", 0, 1))
        for found in both:
            assert found["buffers"].keys() == alone["buffers"].keys()
            for buffer, tensor in alone["buffers"].items():
                torch.testing.assert_close(found["buffers"][buffer], tensor, rtol=1e-5, atol=1e-6, msg=buffer)


@pytest.mark.parametrize("name", TRAININGS)
class TestTraining:
    def test_two_workers_learn_what_one_does(self, left: Path, name: str) -> None:
        """Four steps; in some, an image is rejected, which leaves the workers unequal parts."""
        alone, together = (pretrain_result(left / f"{name}-{who}" / "checkpoint") for who in ("alone", "together"))
        assert (alone["steps"], alone["digest"]) == (together["steps"], together["digest"])
        assert len(alone["curve"]) == 4
        for row, other in zip(alone["curve"], together["curve"], strict=True):
            assert other["loss"] == pytest.approx(row["loss"], rel=1e-4)
        moved = [self.movement(left, f"{name}-{who}") for who in ("alone", "together")]
        largest = max(tensor.abs().max().item() for tensor in moved[0].values())
        assert largest > 1e-5
        for key, tensor in moved[0].items():
            torch.testing.assert_close(moved[1][key], tensor, rtol=1e-2, atol=1e-2 * largest, msg=key)

    def movement(self, left: Path, name: str) -> dict[str, torch.Tensor]:
        """How far the training moved each parameter."""
        job = PretrainJob.model_validate(job_of(left / "images", {}))
        torch.manual_seed(job.seed)
        start = dict(ContrastiveNetwork(job.pretrain, job.data).named_parameters())
        weights = load_checkpoint(left / name / "checkpoint").weights
        return {key: weights[key] - parameter.detach() for key, parameter in start.items()}

    def test_a_restart_changes_nothing(self, left: Path, name: str) -> None:
        """Killed before the third step, and again to the end: the very same weights, optimiser, memory and curve."""
        cut, straight = (load_checkpoint(left / f"{name}-{who}" / "checkpoint") for who in ("cut", "together"))
        assert cut.manifest["curve"] == straight.manifest["curve"]
        assert all(torch.equal(tensor, cut.weights[key]) for key, tensor in straight.weights.items())
        assert cut.state is not None
        assert straight.state is not None
        assert repr(cut.state) == repr(straight.state)
        if name == "queue":
            assert torch.equal(cut.state["memory"]["queue"], straight.state["memory"]["queue"])
            assert torch.equal(cut.state["memory"]["images"], straight.state["memory"]["images"])
            alone = load_checkpoint(left / f"{name}-alone" / "checkpoint").state
            assert alone is not None
            assert sorted(alone["memory"]["images"].tolist()) == sorted(cut.state["memory"]["images"].tolist())


def test_the_bad_image_was_met(left: Path) -> None:
    rejected = [json.loads(line) for line in (left / "rejected.jsonl").read_text().splitlines()]
    assert {row["image_id"] for row in rejected} == {"05.png"}
