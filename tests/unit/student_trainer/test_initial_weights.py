"""What a student starts from: every kind of checkpoint, and every one that does not fit, refused with both sides named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from distill.checkpoint import save_checkpoint
from distill.errors import CheckpointError
from distill.models.classifier import Classifier, build_backbone, build_classifier
from distill.models.projection_head import ProjectionHead
from distill.models.saved_classifier import ClassifierCard, save_classifier
from distill.models.settings import NetworkSettings
from distill.teacher_info import Preprocessing
from student_trainer.initial_weights import load_initial_weights
from student_trainer.settings import StudentSettings

NETWORK = NetworkSettings(depth=10, width_multiplier=0.125, stem="cifar")
PREPROCESSING = Preprocessing(image_size=16)
CLASSES = ("cat", "dog", "owl")


@pytest.fixture(autouse=True)
def _few_threads(one_thread: None) -> None:
    """See `one_thread`."""


def settings_of(num_head_layers: int = 0, **network: Any) -> StudentSettings:
    return StudentSettings(name="small", network=NETWORK.replace(**network), num_head_layers=num_head_layers)


def student_of(settings: StudentSettings, seed: int = 1) -> Classifier:
    torch.manual_seed(seed)
    return build_classifier(settings.network, 3, PREPROCESSING, settings.num_head_layers)


@pytest.fixture
def pretrained(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A checkpoint as stage 1 writes it, with a head of 3 layers; and its weights."""
    torch.manual_seed(0)
    backbone = build_backbone(NETWORK)
    head = ProjectionHead(backbone.feature_dim, num_layers=3, embedding_dim=8)
    weights = {f"{part}.{n}": t for part, module in (("backbone", backbone), ("head", head)) for n, t in module.state_dict().items()}
    manifest = {"kind": "pretrained", "network": NETWORK.model_dump(), "num_head_layers": 3, "preprocessing": PREPROCESSING.model_dump()}
    save_checkpoint(tmp_path / "pretrained", weights, manifest)
    return tmp_path / "pretrained", weights


@pytest.mark.parametrize("num_head_layers", [0, 1, 2])
def test_pretrained_gives_backbone_and_head_layers_and_leaves_the_classifier_new(
    pretrained: tuple[Path, dict[str, torch.Tensor]], num_head_layers: int
) -> None:
    folder, weights = pretrained
    settings = settings_of(num_head_layers)
    network, before = student_of(settings), student_of(settings).state_dict()
    load_initial_weights(network, settings, CLASSES, folder)
    state = network.state_dict()
    for name in state:
        if name.startswith("body.backbone."):
            torch.testing.assert_close(state[name], weights[name.removeprefix("body.")], rtol=0, atol=0)
    assert torch.equal(state["body.linear.weight"], before["body.linear.weight"])
    assert len(network.body.neck) == num_head_layers
    for layer in range(num_head_layers):
        for name, tensor in network.body.neck[layer].state_dict().items():
            assert torch.equal(tensor, weights[f"head.layers.{layer}.{name}"])
    assert not torch.equal(before["body.backbone.stem.0.weight"], state["body.backbone.stem.0.weight"])


def test_more_head_layers_than_lie_below_the_last_are_refused(pretrained: tuple[Path, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"student small: .* has 2 head layers below the last; num_head_layers is 3"):
        load_initial_weights(student_of(settings_of(3)), settings_of(3), CLASSES, pretrained[0])


def test_a_pretrained_backbone_of_another_network_is_refused_with_both_names(pretrained: tuple[Path, Any]) -> None:
    other = settings_of(depth=18, width_multiplier=1.0)
    with pytest.raises(
        CheckpointError, match=r"holds resnet 10 \(width_multiplier 0.125, stem cifar\), and the student is resnet 18 \(stem cifar\)$"
    ):
        load_initial_weights(student_of(other), other, CLASSES, pretrained[0])


@pytest.mark.parametrize("change", [{"mean": (0.5, 0.4, 0.3)}, {"std": (0.2, 0.2, 0.2)}])
def test_a_backbone_pretrained_on_other_pixels_is_refused(pretrained: tuple[Path, Any], change: dict[str, Any]) -> None:
    settings = settings_of()
    network = build_classifier(settings.network, 3, PREPROCESSING.replace(**change), 0)
    with pytest.raises(CheckpointError, match=r"data\.(mean|std) is .*student small: .* was pretrained with"):
        load_initial_weights(network, settings, CLASSES, pretrained[0])


def saved(folder: Path, num_head_layers: int = 0, class_names: tuple[str, ...] = CLASSES, **network: Any) -> Classifier:
    card = ClassifierCard(
        network=NETWORK.replace(**network), num_head_layers=num_head_layers, class_names=class_names, preprocessing=PREPROCESSING
    )
    torch.manual_seed(0)
    made = build_classifier(card.network, len(class_names), card.preprocessing, num_head_layers)
    torch.nn.init.normal_(made.body.linear.weight)
    save_classifier(folder, made, card)
    return made


@pytest.mark.parametrize("num_head_layers", [0, 1])
def test_a_classifier_gives_everything(tmp_path: Path, num_head_layers: int) -> None:
    teacher = saved(tmp_path / "teacher", num_head_layers)
    settings = settings_of(num_head_layers)
    network = student_of(settings)
    load_initial_weights(network, settings, CLASSES, tmp_path / "teacher")
    crops_BHWC = torch.randint(0, 256, (4, 16, 16, 3), dtype=torch.uint8)
    assert torch.equal(network.eval()(crops_BHWC), teacher.eval()(crops_BHWC))


@pytest.mark.parametrize(
    ("num_head_layers", "network", "complaint"),
    [
        (0, {"sk_ratio": 0.0625, "depth": 14}, r"holds resnet 14 \(.*sk_ratio 0.0625.*\), and the student is resnet 10 \(.*\)"),
        (1, {}, r"holds resnet 10 \(.*num_head_layers 1\), and the student is resnet 10 \(.*num_head_layers 0\)"),
    ],
)
def test_a_classifier_of_another_network_is_refused_with_both_names(
    tmp_path: Path, num_head_layers: int, network: dict[str, Any], complaint: str
) -> None:
    saved(tmp_path / "teacher", num_head_layers, **network)
    with pytest.raises(CheckpointError, match=complaint):
        load_initial_weights(student_of(settings_of()), settings_of(), CLASSES, tmp_path / "teacher")


@pytest.mark.parametrize("class_names", [("cat", "dog"), ("dog", "cat", "owl")], ids=["fewer", "another order"])
def test_other_classes_are_refused(tmp_path: Path, class_names: tuple[str, ...]) -> None:
    saved(tmp_path / "teacher", class_names=class_names)
    complaint = rf"knows {len(class_names)} classes \({', '.join(class_names)}\), and this run has 3 classes \(cat, dog, owl\)"
    with pytest.raises(CheckpointError, match=complaint):
        load_initial_weights(student_of(settings_of()), settings_of(), CLASSES, tmp_path / "teacher")


def test_other_pixels_are_refused(tmp_path: Path) -> None:
    saved(tmp_path / "teacher")
    network = build_classifier(NETWORK, 3, PREPROCESSING.replace(mean=(0.5, 0.5, 0.5)))
    with pytest.raises(CheckpointError, match=r"was trained with data.mean and data.std \(\(0.0, 0.0, 0.0\), .*this run has \(\(0.5,"):
        load_initial_weights(network, settings_of(), CLASSES, tmp_path / "teacher")


def test_another_kind_of_checkpoint_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "other", {}, {"kind": "students"})
    with pytest.raises(CheckpointError, match=r"holds a 'students' checkpoint; a student starts from a pretrained one or a classifier"):
        load_initial_weights(student_of(settings_of()), settings_of(), CLASSES, tmp_path / "other")


def test_nothing_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        load_initial_weights(student_of(settings_of()), settings_of(), CLASSES, tmp_path / "nowhere")


def test_a_timm_student_has_no_projection_head() -> None:
    with pytest.raises(ValueError, match="network 'timm:resnet18' has no projection head of ours: num_head_layers must be 0"):
        StudentSettings(name="small", network=NetworkSettings(name="timm:resnet18"), num_head_layers=1)
