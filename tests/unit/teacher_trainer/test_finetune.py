"""Fine-tuning: what is kept of the pretrained network, that all of it is trained, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from distill.checkpoint import save_checkpoint
from distill.data_settings import DataSettings
from distill.errors import CheckpointError, ConfigError
from distill.evaluation import evaluate_on, network_logits
from distill.label_metrics import score
from distill.models.classifier import Classifier, ResNetClassifier
from distill.rejections import RejectionLog
from distill.sources import open_source
from teacher_trainer.finetune import classifier_from_pretrained, finetune
from teacher_trainer.pretrain import PRETRAINED, ContrastiveNetwork
from teacher_trainer.settings import FinetuneSettings, PretrainSettings

PRETRAINING = PretrainSettings.model_validate(
    {"network": {"depth": 10, "width_multiplier": 0.125, "sk_ratio": 0.0, "stem": "cifar"}, "num_head_layers": 3, "embedding_dim": 8}
)
SETTINGS = FinetuneSettings.model_validate(
    {"epochs": 6, "global_batch": 8, "min_area": 0.5, "optimizer": {"learning_rate": 0.05, "warmup_share": 0.0}}
)
CLASSES = ("green", "red")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 noisy images of each of two colours."""
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for name, colour in zip(CLASSES, ((40, 180, 60), (200, 50, 60)), strict=True):
        (folder / name).mkdir()
        for number in range(16):
            pixels = np.clip(random.normal(colour, 25, (14, 14, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number:02d}.png")
    return folder


def data_of(images: Path) -> DataSettings:
    sets = {name: {"path": str(images)} for name in ("unlabelled", "labelled", "test")}
    return DataSettings.model_validate({**sets, "image_size": 12, "mean": (0.5, 0.4, 0.3), "crop_ratio": 1.0})


@pytest.fixture(scope="module")
def checkpoint(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretrained checkpoint with weights and statistics that no fresh network has."""
    torch.manual_seed(5)
    network = ContrastiveNetwork(PRETRAINING, data_of(images))
    network(torch.rand(8, 3, 12, 12))
    folder = tmp_path_factory.mktemp("run") / "checkpoint"
    save_checkpoint(folder, network.state_dict(), {"kind": PRETRAINED})
    return folder


def body_of(network: Classifier) -> ResNetClassifier:
    assert isinstance(network.body, ResNetClassifier)
    return network.body


def run(network: Classifier, images: Path, folder: Path, seed: int = 1, **changes: Any) -> dict[str, Any]:
    with RejectionLog(folder / "rejected.jsonl", max_share=0.5) as rejections:
        return finetune(network, open_source(str(images)), data_of(images), SETTINGS.replace(**changes), seed, rejections)


class TestFromPretrained:
    @pytest.mark.parametrize("num_head_layers", [0, 1, 2])
    def test_keeps_backbone_and_exactly_the_first_layers(self, images: Path, checkpoint: Path, num_head_layers: int) -> None:
        torch.manual_seed(99)
        network = body_of(classifier_from_pretrained(checkpoint, data_of(images), PRETRAINING, num_head_layers, num_classes=3))
        torch.manual_seed(5)
        contrastive = ContrastiveNetwork(PRETRAINING, data_of(images))
        contrastive(torch.rand(8, 3, 12, 12))
        for name, tensor in contrastive.backbone.state_dict().items():
            assert torch.equal(network.backbone.state_dict()[name], tensor), name
        assert len(network.neck) == num_head_layers
        for kept, origin in zip(network.neck, list(contrastive.head.layers)[:num_head_layers], strict=True):
            assert kept.state_dict().keys() == origin.state_dict().keys()
            assert all(torch.equal(tensor, origin.state_dict()[name]) for name, tensor in kept.state_dict().items())
        assert network.linear.weight.shape == (3, 64)
        assert not network.linear.weight.any()

    def test_logits_come_from_the_middle_of_the_head(self, images: Path, checkpoint: Path) -> None:
        """By hand: normalise, backbone, dense, batch norm, ReLU, linear."""
        network = classifier_from_pretrained(checkpoint, data_of(images), PRETRAINING, 1, num_classes=3).eval()
        body = body_of(network)
        nn.init.normal_(body.linear.weight)
        crops = torch.randint(0, 256, (4, 12, 12, 3), dtype=torch.uint8)
        images_BCHW = crops.permute(0, 3, 1, 2) / 255 - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)
        with torch.inference_mode():
            dense, norm = body.neck.get_submodule("0.0"), body.neck.get_submodule("0.1")
            assert isinstance(norm, nn.BatchNorm1d)
            assert norm.running_mean is not None
            assert norm.running_var is not None
            hidden = dense(body.backbone(images_BCHW))
            hidden = (hidden - norm.running_mean) / (norm.running_var + 1e-5).sqrt() * norm.weight + norm.bias
            expected = hidden.clamp(min=0) @ body.linear.weight.T + body.linear.bias
            torch.testing.assert_close(network(crops), expected, atol=1e-5, rtol=1e-4)

    def test_refuses_other_checkpoints(self, images: Path, tmp_path: Path) -> None:
        network = ContrastiveNetwork(PRETRAINING, data_of(images))
        save_checkpoint(tmp_path / "c", network.state_dict(), {"kind": "classifier"})
        with pytest.raises(CheckpointError, match="holds a 'classifier' checkpoint, not a pretrained one"):
            classifier_from_pretrained(tmp_path / "c", data_of(images), PRETRAINING, 1, 2)
        with pytest.raises(CheckpointError, match="no checkpoint in"):
            classifier_from_pretrained(tmp_path / "nowhere", data_of(images), PRETRAINING, 1, 2)

    def test_refuses_weights_of_another_network(self, images: Path, checkpoint: Path) -> None:
        other = PRETRAINING.replace(network=PRETRAINING.network.replace(width_multiplier=0.25))
        with pytest.raises(CheckpointError, match=r"belongs to another network \(other shape: "):
            classifier_from_pretrained(checkpoint, data_of(images), other, 1, 2)

    def test_refuses_the_last_layer_of_the_head(self, images: Path, checkpoint: Path) -> None:
        with pytest.raises(ConfigError, match=r"finetune\.num_head_layers 3 must be below pretrain\.num_head_layers 3"):
            classifier_from_pretrained(checkpoint, data_of(images), PRETRAINING, 3, 2)


class TestFinetune:
    def test_trains_every_weight_the_kept_layer_too(self, images: Path, checkpoint: Path, tmp_path: Path) -> None:
        network = classifier_from_pretrained(checkpoint, data_of(images), PRETRAINING, 1, 2)
        before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
        result = run(network, images, tmp_path)
        assert any(name.startswith("body.neck") for name in before)
        assert [name for name, parameter in network.named_parameters() if torch.equal(parameter.detach(), before[name])] == []
        assert (result["steps"], result["num_labelled"]) == (24, 32)
        assert np.isfinite(result["loss"])

    def test_learns_two_colours(self, images: Path, checkpoint: Path, tmp_path: Path) -> None:
        network = classifier_from_pretrained(checkpoint, data_of(images), PRETRAINING, 1, 2)
        run(network, images, tmp_path)
        with RejectionLog(tmp_path / "rejected.jsonl", max_share=0) as rejections:
            logits, labels = evaluate_on(network_logits(network), open_source(str(images)), data_of(images), rejections)
        assert labels.tolist() == [0] * 16 + [1] * 16
        assert score(logits, labels).top1 == 1.0

    def test_same_seed_same_weights(self, images: Path, checkpoint: Path, tmp_path: Path) -> None:
        networks = [classifier_from_pretrained(checkpoint, data_of(images), PRETRAINING, 1, 2) for _ in range(3)]
        for network, seed in zip(networks, (1, 1, 2), strict=True):
            run(network, images, tmp_path, seed, epochs=1)
        one, same, other = (network.state_dict() for network in networks)
        assert all(torch.equal(one[name], same[name]) for name in one)
        assert not torch.equal(one["body.linear.weight"], other["body.linear.weight"])

    def test_bad_images_leave_one_of_a_batch(self, images: Path, checkpoint: Path, tmp_path: Path) -> None:
        """Batch norm cannot take a batch of one; the step is passed over."""
        for name in CLASSES:
            (tmp_path / "broken" / name).mkdir(parents=True)
            for number, path in enumerate(sorted((images / name).iterdir())):
                (tmp_path / "broken" / name / path.name).write_bytes(path.read_bytes()[: 60 if number % 3 == 0 else None])
        network = classifier_from_pretrained(checkpoint, data_of(images), PRETRAINING, 1, 2)
        result = run(network, tmp_path / "broken", tmp_path, global_batch=2, epochs=1)
        assert result["steps"] == 16
        assert np.isfinite(result["loss"])

    def test_a_batch_larger_than_the_labelled_set(self, images: Path, checkpoint: Path, tmp_path: Path) -> None:
        network = classifier_from_pretrained(checkpoint, data_of(images), PRETRAINING, 1, 2)
        with pytest.raises(ConfigError, match="batch 33 is larger than the 32 images there are"):
            run(network, images, tmp_path, global_batch=33)
