"""Fine-tuning for int8: the rounding is int8's, the labels come from the store alone, and the student is the better for it."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from distill.cluster.worker import LocalWorker
from distill.errors import DistillError, StoreError
from distill.models.classifier import Classifier, build_classifier
from export.graph import export_student_graph
from export.label_space import log_softmax
from export.measured import logits_of
from export.quantize import Quantizer
from export.runtimes.onnx_runtime import open_file
from student_trainer import lessons
from student_trainer.fake_quantisation import RoundedInput, RoundedWeight, fake_quantised
from student_trainer.job import TrainJob
from student_trainer.quantised import train_quantised
from student_trainer.store import SoftLabelStore, StoreIdentity
from student_trainer.worker import train_worker
from teacher_server.fake import FakeTeacher, fake_logits

CLASSES = ("cat", "dog", "eel")
CPU = torch.device("cpu")
LOUDER = 2000.0


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 images, each of a grey of its own under noise."""
    folder = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for number in range(24):
        name = folder / CLASSES[number % 3] / f"{number}.png"
        name.parent.mkdir(exist_ok=True)
        pixels = np.clip(10 * number + random.normal(0, 20, (12, 12, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(name)
    return folder


@pytest.fixture(scope="module")
def job(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainJob:
    """Two epochs of two views on 24 images; its store is filled."""
    folder = tmp_path_factory.mktemp("run")
    images = {"path": str(photos)}
    student = {"name": "small", "network": {"depth": 10, "width_multiplier": 0.125, "stem": "cifar"}, "optimizer": {"learning_rate": 0.05}}
    made = TrainJob.model_validate(
        {
            "objective": "distill",
            "data": {"unlabelled": images, "labelled": images, "test": images, "image_size": 8, "class_names": CLASSES},
            "train": {"students": [student], "global_batch": 8, "num_views": 2, "precision": "fp32"},
            "epochs": 40,
            "seed": 3,
            "class_names": CLASSES,
            "rejected_path": str(folder / "rejected.jsonl"),
            "teacher": {"model": "fake", "repository": "nowhere"},
            "store_folder": str(folder / "store"),
        }
    )
    digest = made.open_images().digest()
    made = made.replace(
        store_identity=StoreIdentity(fingerprint="f" * 64, num_classes=3, recipe=made.recipe, seed=3, images=digest)
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lessons, "open_teacher", lambda address: FakeTeacher(len(CLASSES)))
        train_worker(made.model_dump(mode="json"), LocalWorker(folder / "train", device=CPU))
    return made


@pytest.fixture(scope="module")
def student(job: TrainJob) -> Classifier:
    """What that training made."""
    from distill.checkpoint import load_checkpoint

    settings = job.train.students[0]
    network = build_classifier(settings.network, len(CLASSES), job.data.preprocessing)
    found = load_checkpoint(Path(job.store_folder or "").parent / "train" / "checkpoint" / "students")
    network.load_state_dict({key.removeprefix("small/"): value for key, value in found.weights.items()})
    return network.eval()


@pytest.fixture(scope="module")
def crops() -> np.ndarray:
    random = np.random.default_rng(5)
    greys = random.uniform(0, 255, (48, 1, 1, 1))
    return np.clip(greys + random.normal(0, 20, (48, 8, 8, 3)), 0, 255).astype(np.uint8)


def loss_when_rounded(network: nn.Module, crops: np.ndarray, bits: int) -> float:
    """Cross-entropy against the fake teacher's own answers, with all layers rounded."""
    network = copy.deepcopy(network)
    probs = torch.softmax(torch.from_numpy(fake_logits(crops, 3)), dim=1)
    with torch.no_grad(), fake_quantised(network, bits) as rounding:
        rounding.measure_ranges(torch.from_numpy(crops))
        return float(-(probs * torch.log_softmax(network(torch.from_numpy(crops)), dim=1)).sum(dim=1).mean())


def test_weights_are_rounded_for_each_channel_and_the_gradient_goes_through() -> None:
    weight = torch.tensor([[1.0, -0.5, 0.004], [100.0, 0.3, -60.0]], requires_grad=True)
    rounded = RoundedWeight(8)(weight)
    expected = [[round(v * 127 / top) * top / 127 for v in row] for row, top in zip(weight.tolist(), (1.0, 100.0), strict=True)]
    assert torch.allclose(rounded, torch.tensor(expected), atol=1e-6)
    rounded.sum().backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [[1.0] * 3] * 2
    assert len(set(RoundedWeight(3)(torch.linspace(-1, 1, 101)[None])[0].tolist())) == 7


def test_inputs_are_rounded_to_256_steps_of_what_was_seen_and_zero_stays_zero() -> None:
    hook, layer = RoundedInput(), nn.Identity()
    hook.observing = True
    hook(layer, (torch.tensor([-1.0, 3.0]),))
    hook.observing = False
    (rounded,) = hook(layer, (torch.linspace(-2, 4, 10_000),))
    assert len(rounded.unique()) == 256
    assert rounded.min() == pytest.approx(-1.0, abs=4 / 255)
    assert rounded.max() == pytest.approx(3.0, abs=4 / 255)
    assert hook(layer, (torch.zeros(1),))[0].item() == 0.0


def test_a_network_rounds_only_for_the_while(student: Classifier, crops: np.ndarray) -> None:
    network, images = copy.deepcopy(student), torch.from_numpy(crops)
    before, names = network(images), list(network.state_dict())
    with fake_quantised(network, 4) as rounding:
        rounding.measure_ranges(images)
        assert not torch.allclose(network(images), before, atol=1e-3)
    assert torch.equal(network(images), before)
    assert set(network.state_dict()) == set(names)
    with pytest.raises(DistillError, match=r"no nn\.Conv2d and no nn\.Linear"), fake_quantised(nn.ReLU(), 8):
        pass


def test_fine_tuning_learns_from_the_store_alone_and_loses_less_to_rounding(
    job: TrainJob, student: Classifier, crops: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lessons, "open_teacher", lambda address: pytest.fail("nobody may be asked"))
    assert job.store_identity is not None
    before = SoftLabelStore(str(job.store_folder), job.store_identity).manifest_digest()
    weights = copy.deepcopy(student.state_dict())
    tuned = train_quantised(student, job, crops[:24], steps=90, learning_rate=1e-3, weight_bits=3)
    assert (tuned.steps, tuned.num_labels) == (90, 90 * 8)
    assert tuned.last_loss < tuned.first_loss
    assert loss_when_rounded(tuned.network, crops, 3) < 0.8 * loss_when_rounded(student, crops, 3)
    assert all(torch.equal(weights[name], tensor) for name, tensor in student.state_dict().items())
    assert tuned.network.state_dict().keys() == weights.keys()
    norms = [name for name in weights if "running" in name]
    assert norms
    assert all(torch.equal(weights[name], tuned.network.state_dict()[name]) for name in norms)
    assert SoftLabelStore(str(job.store_folder), job.store_identity).manifest_digest() == before


def test_a_label_that_is_not_there_is_an_error_and_nobody_is_asked(
    job: TrainJob, student: Classifier, crops: np.ndarray, tmp_path: Path
) -> None:
    shutil.copytree(str(job.store_folder), tmp_path / "store")
    wider = job.replace(store_folder=str(tmp_path / "store"), train=job.train.replace(num_views=3))
    with pytest.raises(StoreError, match="not in the store"):
        train_quantised(student, wider, crops, steps=50, learning_rate=1e-4)


def test_an_int8_file_that_was_spoilt_by_rounding_is_mended_by_fine_tuning(
    job: TrainJob, student: Classifier, crops: np.ndarray, tmp_path: Path
) -> None:
    """One channel of the stem is made 2000 times louder and what reads it as much quieter: the same student in float, but in int8 all
    channels share the loud one's steps. Measured on the files, in ONNX Runtime."""
    spoilt = copy.deepcopy(student)
    norm, block = spoilt.body.backbone.stem[1], spoilt.body.backbone.groups[0][0]  # type: ignore[union-attr,index]
    with torch.no_grad():
        norm.weight[0] *= LOUDER
        norm.bias[0] *= LOUDER
        for reader in (block.residual[0], block.shortcut[0]):
            reader.weight[:, 0] /= LOUDER
        assert torch.allclose(spoilt(torch.from_numpy(crops)), student(torch.from_numpy(crops)), atol=1e-3)
    random = np.random.default_rng(9)
    tests = np.clip(random.uniform(0, 255, (400, 1, 1, 1)) + random.normal(0, 20, (400, 8, 8, 3)), 0, 255).astype(np.uint8)
    probs_NK = torch.softmax(torch.from_numpy(fake_logits(tests, 3)), dim=1).numpy()

    def loss_of_file(network: nn.Module, name: str) -> float:
        fp32, int8 = tmp_path / f"{name}.fp32.onnx", tmp_path / f"{name}.int8.onnx"
        export_student_graph(network, 8, fp32)
        Quantizer(fp32, crops, tmp_path).write(int8, reduce_range=True)
        return float(-(probs_NK * log_softmax(logits_of(open_file(int8, 1), tests, name))).sum(axis=1).mean())

    floats = float(-(probs_NK * log_softmax(student(torch.from_numpy(tests)).detach().numpy())).sum(axis=1).mean())
    plain = loss_of_file(spoilt, "plain")
    tuned = train_quantised(spoilt, job, crops, steps=200, learning_rate=1e-3, weight_bits=7)
    trained = loss_of_file(tuned.network, "tuned")
    assert plain > floats + 0.02
    assert trained - floats < 0.5 * (plain - floats)
