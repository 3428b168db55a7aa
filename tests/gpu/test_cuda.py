"""What computes on a GPU computes what it computes on a CPU: `python -m pytest tests/gpu`, skipped as a whole where there is none."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

from distill.checkpoint import Write, load_checkpoint
from distill.cluster.worker import LocalWorker
from distill.crops import CropKey
from distill.data_settings import DataSettings
from distill.models.classifier import build_classifier
from distill.models.settings import NetworkSettings
from distill.optimizer_settings import OptimizerSettings
from distill.optimizers import build_optimizer
from distill.precision import resolve_precision
from export.fingerprint import read_teacher_info
from export.settings import TeacherExportSettings
from export.teacher import export_teacher, publish_teacher
from student_trainer.job import TrainJob
from student_trainer.store import StoreIdentity
from student_trainer.worker import train_worker
from teacher_server.address import TeacherAddress, open_teacher
from teacher_server.embedded import CUDA, Engine
from teacher_server.model_repository import served_model
from teacher_trainer.augment import Distortion, distort
from teacher_trainer.finetune import FinetuneJob, finetune_worker
from teacher_trainer.pretrain import pretrain_result, pretrain_worker
from teacher_trainer.pretrain_job import PretrainJob
from teacher_trainer.settings import FinetuneSettings, PretrainSettings

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

CLASSES = ("green", "red")
NETWORK = {"depth": 10, "width_multiplier": 0.25, "stem": "cifar"}
PRETRAIN = {
    "network": {**NETWORK, "sk_ratio": 0.0625},
    "embedding_dim": 16,
    "epochs": 2,
    "global_batch": 16,
    "min_area": 0.3,
    "contrastive_temperature": 0.5,
    "optimizer": {"name": "sgd", "learning_rate": 0.01, "warmup_share": 0.0},
    "precision": "fp32",
}
"""Steps small enough that two ways to round stay together."""
SGD = {"name": "sgd", "learning_rate": 0.02, "warmup_share": 0.0}
CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def _all_digits() -> Iterator[None]:
    """TF32, which convolutions use unless told otherwise, keeps ten bits: nothing could be compared closely."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """32 images of coloured squares in each of two classes, one of them greener."""
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for name, colour in zip(CLASSES, ((60, 160, 80), (160, 70, 80)), strict=True):
        (folder / name).mkdir()
        for number in range(32):
            squares = np.clip(random.normal(colour, 80, (5, 4, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(squares).resize((36, 40), Image.Resampling.NEAREST).save(folder / name / f"{number:02d}.png")
    return folder


def data_of(images: Path) -> DataSettings:
    sets = {name: {"path": str(images)} for name in ("unlabelled", "labelled", "test")}
    return DataSettings.model_validate({**sets, "image_size": 32, "crop_ratio": 1.0, "class_names": CLASSES})


def pretrained(images: Path, folder: Path, device: torch.device, **changes: Any) -> list[dict[str, float]]:
    """The curve of two epochs of four steps."""
    settings = PretrainSettings.model_validate({**PRETRAIN, **changes})
    job = PretrainJob(data=data_of(images), pretrain=settings, seed=1, rejected_path=str(folder / "rejected.jsonl"))
    pretrain_worker(job.model_dump(mode="json"), LocalWorker(folder, device=device))
    curve: list[dict[str, float]] = pretrain_result(folder / "checkpoint")["curve"]
    return curve


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(folder / "checkpoint").weights


def furthest(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest distance of a tensor from the same one of the other network, relative to its size."""
    assert one.keys() == other.keys()
    floats = [name for name, tensor in one.items() if tensor.is_floating_point() and tensor.norm() > 1e-3]
    return max(float((one[name] - other[name]).norm() / one[name].norm()) for name in floats)


@pytest.mark.parametrize("changes", [{}, {"micro_batch": 6, "checkpoint_blocks": True}, {"memory": {"size": 40, "momentum": 0.9}}])
def test_pretraining_takes_the_same_steps(images: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    curves = [pretrained(images, tmp_path / device.type, device, **changes) for device in (CPU, GPU)]
    for on_cpu, on_gpu in zip(*curves, strict=True):
        assert on_gpu["loss"] == pytest.approx(on_cpu["loss"], rel=2e-3)
    assert furthest(weights_in(tmp_path / "cpu"), weights_in(tmp_path / "cuda")) < 0.02


def test_auto_is_bf16_and_learns_the_same(images: Path, tmp_path: Path) -> None:
    assert resolve_precision("auto", GPU) == "bf16"
    exact, short = (pretrained(images, tmp_path / precision, GPU, precision=precision) for precision in ("fp32", "auto"))
    for in_fp32, in_bf16 in zip(exact, short, strict=True):
        assert in_bf16["loss"] != in_fp32["loss"]
        assert in_bf16["loss"] == pytest.approx(in_fp32["loss"], rel=0.03)
    assert load_checkpoint(tmp_path / "auto" / "checkpoint").manifest["precision"] == "bf16"


def test_finetuning_takes_the_same_steps(images: Path, tmp_path: Path) -> None:
    settings = FinetuneSettings.model_validate(
        {"num_head_layers": 0, "epochs": 3, "global_batch": 16, "min_area": 0.5, "optimizer": SGD, "precision": "fp32"}
    )
    for device in (CPU, GPU):
        folder = tmp_path / device.type
        network = NetworkSettings.model_validate(NETWORK)
        job = FinetuneJob(
            data=data_of(images), finetune=settings, network=network, seed=1, class_names=CLASSES, rejected_path=str(folder / "r.jsonl")
        )
        finetune_worker(job.model_dump(mode="json"), LocalWorker(folder, device=device))
    assert furthest(weights_in(tmp_path / "cpu"), weights_in(tmp_path / "cuda")) < 0.02


@pytest.fixture(scope="module")
def repository(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model repository with a residual network, through the parity gate."""
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(0)
    data, settings = data_of(images), TeacherExportSettings(name="teacher", num_parity_images=8)
    network = build_classifier(NetworkSettings.model_validate(NETWORK), len(CLASSES), data.preprocessing).eval()
    crops = np.random.default_rng(1).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
    names = [f"crop {number}" for number in range(8)]
    export_teacher(network, data.preprocessing, CLASSES, crops, names, folder, settings)
    publish_teacher(folder, folder / "repository", settings)
    return folder / "repository"


def test_the_embedded_teacher_finds_the_gpu_and_gives_the_same_logits(repository: Path) -> None:
    if CUDA not in onnxruntime.get_available_providers():
        pytest.skip("the extra gpu is not installed")
    engine = Engine(served_model(repository, "teacher"))
    assert engine._session.get_providers()[0] == CUDA
    engine.close()
    crops = np.random.default_rng(2).integers(0, 256, (300, 32, 32, 3), dtype=np.uint8)

    async def ask(device: str) -> Any:
        address = TeacherAddress.model_validate({"model": "teacher", "repository": str(repository), "device": device})
        teacher = open_teacher(address)
        try:
            return await teacher.logits(crops)
        finally:
            await teacher.close()

    np.testing.assert_allclose(asyncio.run(ask("cuda")), asyncio.run(ask("cpu")), atol=1e-4)


def job_of(images: Path, repository: Path, folder: Path, **train: Any) -> TrainJob:
    """Two epochs of two students, whose teacher is on the device that `auto` finds."""
    students = [{"name": name, "network": NETWORK, "optimizer": {**SGD, "name": name}} for name in ("sgd", "lamb")]
    job = TrainJob.model_validate(
        {
            "objective": "distill",
            "data": data_of(images),
            "train": {"students": students, "global_batch": 16, "num_views": 1, "precision": "fp32", **train},
            "epochs": 2,
            "seed": 3,
            "class_names": CLASSES,
            "rejected_path": str(folder / "rejected.jsonl"),
            "teacher": {"model": "teacher", "repository": str(repository)},
            "store_folder": str(folder / "store"),
        }
    )
    fingerprint, digest = read_teacher_info(served_model(repository, "teacher")).fingerprint, job.open_images().digest()
    return job.replace(store_identity=StoreIdentity(fingerprint=fingerprint, num_classes=2, recipe=job.recipe, seed=3, images=digest))


def distilled(job: TrainJob, folder: Path, device: torch.device, kind: type[LocalWorker] = LocalWorker) -> dict[str, torch.Tensor]:
    """The students' weights at the end."""
    train_worker(job.model_dump(mode="json"), kind(folder, device=device))
    return load_checkpoint(folder / "checkpoint" / "students").weights


class Killed(Exception):
    """What happened to the worker; no error of the loop's."""


class MortalWorker(LocalWorker):
    """Dies right after its first checkpoint."""

    def checkpoint(self, prepare: Callable[[], Write]) -> None:
        super().checkpoint(prepare)
        raise Killed


def test_students_take_the_same_steps_and_go_on_after_a_death(images: Path, repository: Path, tmp_path: Path) -> None:
    on_cpu, on_gpu = (
        distilled(job_of(images, repository, tmp_path / device.type), tmp_path / device.type, device) for device in (CPU, GPU)
    )
    assert furthest(on_cpu, on_gpu) < 0.02
    cut = tmp_path / "cut"
    with pytest.raises(Killed):
        distilled(job_of(images, repository, cut), cut, GPU, MortalWorker)
    assert furthest(on_gpu, distilled(job_of(images, repository, cut), cut, GPU)) < 1e-3


@pytest.mark.filterwarnings("ignore")  # of torch.compile about itself
def test_compiled_students_learn_the_same(images: Path, repository: Path, tmp_path: Path) -> None:
    plain, compiled = (
        distilled(job_of(images, repository, tmp_path / name, **train), tmp_path / name, GPU)
        for name, train in (("plain", {}), ("compiled", {"compile_backend": "inductor"}))
    )
    assert furthest(plain, compiled) < 0.02


def test_colours_are_distorted_alike() -> None:
    images_BCHW = torch.rand(64, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    distortion = Distortion.draw([CropKey(0, 0, f"image {number}") for number in range(64)], 1.0, 0.5)
    on_cpu, on_gpu = distort(images_BCHW, distortion), distort(images_BCHW.to(GPU), distortion).cpu()
    torch.testing.assert_close(on_gpu, on_cpu, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["sgd", "adamw", "lars", "lamb"])
def test_optimisers_take_the_same_step(name: str) -> None:
    stepped = []
    for device in (CPU, GPU):
        torch.manual_seed(0)
        network = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4)).to(device)
        optimizer = build_optimizer(network, OptimizerSettings.model_validate({"name": name, "learning_rate": 0.01}), global_batch=8)
        for _ in range(3):
            optimizer.zero_grad()
            network(torch.arange(64, dtype=torch.float32, device=device).view(8, 8).sin()).square().mean().backward()
            optimizer.step()
        stepped.append({key: tensor.cpu() for key, tensor in network.state_dict().items()})
    assert furthest(*stepped) < 1e-3


def test_two_workers_on_one_gpu_normalise_as_one() -> None:
    """By gloo: NCCL refuses two workers on one GPU."""
    done = subprocess.run([sys.executable, str(Path(__file__).with_name("two_on_one_gpu.py"))], capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
