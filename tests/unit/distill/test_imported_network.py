"""A user's own network by name: built, saved and loaded again; and everything that can be wrong with it, said in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from distill.errors import ConfigError
from distill.models.classifier import build_classifier
from distill.models.saved_classifier import ClassifierCard, load_classifier, save_classifier
from distill.models.settings import NetworkSettings
from distill.teacher_info import Preprocessing

MODULE = """
import torch
from torch import nn


def tiny(num_classes):
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))


def thousand(num_classes):
    return tiny(1000)


def pair(num_classes):
    class Pair(nn.Module):
        def forward(self, images_BCHW):
            return images_BCHW, images_BCHW
    return Pair()


class Auxiliary(nn.Module):
    # As GoogLeNet and Inception: more than logits, but in training only.

    def __init__(self, num_classes):
        super().__init__()
        self.body = tiny(num_classes)

    def forward(self, images_BCHW):
        logits = self.body(images_BCHW)
        return (logits, logits) if self.training else logits


def only_224(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 224 * 224, num_classes))


def text(num_classes):
    return "no network"


def without_an_argument():
    return tiny(10)


def failing(num_classes):
    raise RuntimeError("no weights here")


NUMBER = 3
"""
PREPROCESSING = Preprocessing(image_size=16, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`nets_of_a_user` and a module that fails, importable."""
    (tmp_path / "nets_of_a_user.py").write_text(MODULE)
    (tmp_path / "broken_nets.py").write_text("import a_module_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)


def test_sees_normalised_pixels_with_the_channels_first() -> None:
    torch.manual_seed(0)
    network = build_classifier(NetworkSettings(name="nets_of_a_user:tiny"), 10, PREPROCESSING)
    assert network.body.training
    assert int(network.body[1].num_batches_tracked) == 0  # looking at it moved no statistics
    crops_BHWC = torch.randint(0, 256, (5, 16, 16, 3), dtype=torch.uint8)
    logits_BK = network.eval()(crops_BHWC)
    assert (logits_BK.shape, logits_BK.dtype) == ((5, 10), torch.float32)
    normalised_BCHW = (crops_BHWC.permute(0, 3, 1, 2) / 255 - 0.5) / 0.25
    torch.testing.assert_close(network.body(normalised_BCHW), logits_BK)


def test_is_saved_and_loaded_by_its_name(tmp_path: Path) -> None:
    settings = NetworkSettings(name="nets_of_a_user:tiny")
    network = build_classifier(settings, 3, PREPROCESSING)
    save_classifier(tmp_path / "saved", network, ClassifierCard(network=settings, class_names=("a", "b", "c"), preprocessing=PREPROCESSING))
    crops_BHWC = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8)
    assert torch.equal(load_classifier(tmp_path / "saved").network(crops_BHWC), network.eval()(crops_BHWC))


def test_torchvisions_own() -> None:
    network = build_classifier(NetworkSettings(name="torchvision.models:shufflenet_v2_x0_5"), 7, PREPROCESSING.model_copy())
    assert network.eval()(torch.zeros(2, 16, 16, 3, dtype=torch.uint8)).shape == (2, 7)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nowhere_at_all:tiny", r"nowhere_at_all cannot be imported \(ModuleNotFoundError.*name its folder in PYTHONPATH"),
        ("broken_nets:tiny", r"broken_nets cannot be imported \(ModuleNotFoundError: No module named 'a_module_that_is_not_there'\)"),
        ("nets_of_a_user:huge", "nets_of_a_user has no function huge"),
        ("nets_of_a_user:NUMBER", "nets_of_a_user has no function NUMBER"),
        ("nets_of_a_user:text", "returned a str; a torch.nn.Module is needed"),
        ("nets_of_a_user:without_an_argument", "called with num_classes=10 it fails: TypeError"),
        ("nets_of_a_user:failing", "called with num_classes=10 it fails: RuntimeError: no weights here"),
        ("nets_of_a_user:thousand", r"returned shape \[2, 1000\] for two crops; \[2, 10\] is needed"),
        ("nets_of_a_user:pair", "in evaluation mode returned a tuple and no tensor of floats for two crops"),
        ("nets_of_a_user:Auxiliary", "in training mode returned a tuple and no tensor of floats for two crops"),
        ("nets_of_a_user:only_224", r"in evaluation mode fails on float crops of shape \[2, 3, 16, 16\]: RuntimeError"),
        ("os:abort", "called with num_classes=10 it fails: TypeError"),  # what a checkpoint names runs only if it takes num_classes
    ],
)
def test_what_is_wrong_is_said(name: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        build_classifier(NetworkSettings(name=name), 10, PREPROCESSING)
    assert f"network {name!r}" in str(caught.value)


@pytest.mark.parametrize("name", ["resnet50", "nets.py:tiny()", "nets:", ":tiny", "a b:c", "https://x:y", "nets:tiny:more", "../nets:tiny"])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(ValidationError, match="name is 'resnet', 'timm:NAME' or 'MODULE:FUNCTION'"):
        NetworkSettings(name=name)
