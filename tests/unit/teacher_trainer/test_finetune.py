"""Which weights fine-tuning starts from, which of them it trains, and that a run which was cut off ends as one that was not."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from distill.checkpoint import PRETRAINED, Write, load_checkpoint, save_checkpoint
from distill.cluster.worker import LocalWorker, Row
from distill.crops import CropRecipe, center_crop, decode_image
from distill.data_settings import DataSettings
from distill.errors import CheckpointError, ConfigError, SourceError
from distill.evaluation import evaluate_on, evaluation_batches, network_logits
from distill.label_metrics import score
from distill.loader import CropLoader
from distill.models.classifier import Classifier, ResNetClassifier, build_backbone, build_classifier
from distill.models.projection_head import ProjectionHead
from distill.models.saved_classifier import ClassifierCard, load_classifier
from distill.models.settings import NetworkSettings
from distill.optimizer_settings import OptimizerSettings
from distill.optimizers import take_step
from distill.rejections import RejectionLog
from distill.sources import Source, open_source
from teacher_trainer import supervised as module
from teacher_trainer.finetune import FinetuneJob, classifier_from_pretrained, finetune_worker
from teacher_trainer.settings import FinetuneSettings
from teacher_trainer.supervised import batch_that_fits, train_supervised

NETWORK = NetworkSettings(depth=10, width_multiplier=0.125, stem="cifar")
SETTINGS = FinetuneSettings.model_validate(
    {"epochs": 6, "global_batch": 8, "min_area": 0.5, "optimizer": {"learning_rate": 0.05, "warmup_share": 0.0}}
)
"""32 images in batches of 8: four steps an epoch."""
CLASSES = ("green", "red")


pytestmark = pytest.mark.usefixtures("one_thread")


class Killed(Exception):
    """The process dies here."""


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


def data_of(images: Path, **changes: Any) -> DataSettings:
    sets = {name: {"path": str(images)} for name in ("unlabelled", "labelled", "test")}
    return DataSettings.model_validate({**sets, "image_size": 12, "mean": (0.5, 0.4, 0.3), "crop_ratio": 1.0, **changes})


def pretrained_parts() -> tuple[nn.Module, ProjectionHead]:
    """Backbone and head with weights and statistics that no fresh network has."""
    torch.manual_seed(5)
    backbone = build_backbone(NETWORK)
    head = ProjectionHead(backbone.feature_dim, 3, 8)
    head(backbone(torch.rand(8, 3, 12, 12)))
    return backbone, head


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    backbone, head = pretrained_parts()
    weights = {
        f"{name}.{key}": tensor for name, part in (("backbone", backbone), ("head", head)) for key, tensor in part.state_dict().items()
    }
    folder = tmp_path_factory.mktemp("run") / "checkpoint"
    save_checkpoint(folder, weights, {"kind": PRETRAINED, "preprocessing": {"image_size": 16, "mean": [0.5, 0.4, 0.3], "std": [1, 1, 1]}})
    return folder


def pretrained(images: Path, checkpoint: Path, num_head_layers: int = 1, num_classes: int = 2) -> Classifier:
    return classifier_from_pretrained(checkpoint, NETWORK, data_of(images).preprocessing, num_head_layers, num_classes)


def body_of(network: Classifier) -> ResNetClassifier:
    assert isinstance(network.body, ResNetClassifier)
    return network.body


def run(
    network: Classifier, images: Path, folder: Path, seed: int = 1, on_row: Callable[[Row], None] = lambda row: None, **changes: Any
) -> dict[str, Any]:
    """Train and return the result; the checkpoint is `folder/checkpoint`."""
    data, settings, worker = data_of(images), SETTINGS.replace(**changes), LocalWorker(folder, on_row, torch.device("cpu"))
    card = ClassifierCard(
        network=NETWORK, num_head_layers=len(body_of(network).neck), class_names=CLASSES, preprocessing=data.preprocessing
    )
    with RejectionLog(folder / "rejected.jsonl", max_share=0.5) as rejections:
        return train_supervised(network, card, open_source(str(images)), data, settings, seed, worker, rejections)


def test_crops_of_evaluation_and_training_go_through_the_filter_of_the_data(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, recipes = data_of(images, interpolation="bicubic"), []

    class Loader(CropLoader):
        def __init__(self, source: Source, recipe: CropRecipe, *more: Any) -> None:
            recipes.append(recipe)
            super().__init__(source, recipe, *more)

    monkeypatch.setattr(module, "CropLoader", Loader)
    network, card = (
        build_classifier(NETWORK, 2, data.preprocessing),
        ClassifierCard(network=NETWORK, class_names=CLASSES, preprocessing=data.preprocessing),
    )
    with RejectionLog(tmp_path / "rejected.jsonl", max_share=0) as rejections:
        worker = LocalWorker(tmp_path, lambda row: None, torch.device("cpu"))
        train_supervised(network, card, open_source(str(images)), data, SETTINGS.replace(epochs=1), 1, worker, rejections)
        batch = next(evaluation_batches(open_source(str(images)), data, rejections))
    assert [recipe.interpolation for recipe in recipes] == ["bicubic"]
    pixels = decode_image((images / batch.image_ids[0]).read_bytes())
    assert np.array_equal(batch.crops_VBHWC[0, 0], center_crop(pixels, 12, 1.0, "bicubic"))
    assert not np.array_equal(batch.crops_VBHWC[0, 0], center_crop(pixels, 12, 1.0))


def first_kernel(network: Classifier) -> torch.Tensor:
    return next(body_of(network).backbone.parameters()).detach().clone()


def top1_of(network: Classifier, images: Path, folder: Path) -> float:
    with RejectionLog(folder / "rejected.jsonl", max_share=0) as rejections:
        logits, labels = evaluate_on(network_logits(network), open_source(str(images)), data_of(images), rejections)
    assert labels.tolist() == [0] * 16 + [1] * 16
    return score(logits, labels).top1


class TestFromPretrained:
    @pytest.mark.parametrize("num_head_layers", [0, 1, 2])
    def test_keeps_backbone_and_exactly_the_first_layers(self, images: Path, checkpoint: Path, num_head_layers: int) -> None:
        torch.manual_seed(99)
        network = body_of(pretrained(images, checkpoint, num_head_layers, num_classes=3))
        backbone, head = pretrained_parts()
        for name, tensor in backbone.state_dict().items():
            assert torch.equal(network.backbone.state_dict()[name], tensor), name
        assert len(network.neck) == num_head_layers
        for kept, origin in zip(network.neck, list(head.layers)[:num_head_layers], strict=True):
            assert kept.state_dict().keys() == origin.state_dict().keys()
            assert all(torch.equal(tensor, origin.state_dict()[name]) for name, tensor in kept.state_dict().items())
        assert network.linear.weight.shape == (3, 64)
        assert not network.linear.weight.any()

    def test_logits_come_from_the_middle_of_the_head(self, images: Path, checkpoint: Path) -> None:
        """By hand: normalise, backbone, dense, batch norm, ReLU, linear."""
        network = pretrained(images, checkpoint, 1, num_classes=3).eval()
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
        save_checkpoint(tmp_path / "c", {"x": torch.zeros(1)}, {"kind": "classifier"})
        with pytest.raises(CheckpointError, match="holds a 'classifier' checkpoint, not a pretrained one"):
            pretrained(images, tmp_path / "c")
        with pytest.raises(CheckpointError, match="no checkpoint in"):
            pretrained(images, tmp_path / "nowhere")

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"width_multiplier": 0.25}, r"belongs to another network \(other shape: "),
            ({"depth": 18}, r"belongs to another network \(missing: "),
        ],
    )
    def test_refuses_weights_of_another_network(self, images: Path, checkpoint: Path, change: dict[str, Any], said: str) -> None:
        with pytest.raises(CheckpointError, match=said):
            classifier_from_pretrained(checkpoint, NETWORK.replace(**change), data_of(images).preprocessing, 1, 2)

    @pytest.mark.parametrize(("name", "now"), [("mean", (0.5, 0.4, 0.2)), ("std", (0.2, 0.2, 0.2))])
    def test_refuses_pixels_normalised_otherwise_than_in_pretraining(
        self, images: Path, checkpoint: Path, name: str, now: tuple[float, ...]
    ) -> None:
        with pytest.raises(CheckpointError, match=rf"data\.{name} is .* was pretrained with .*; set data\.{name} to that"):
            classifier_from_pretrained(checkpoint, NETWORK, data_of(images, **{name: now}).preprocessing, 1, 2)

    def test_refuses_the_last_layer_of_the_head(self, images: Path, checkpoint: Path) -> None:
        with pytest.raises(ConfigError, match=r"finetune\.num_head_layers 3 must be below 3, the layers of the projection head in"):
            pretrained(images, checkpoint, 3)


class TestFinetune:
    def test_trains_every_weight_the_kept_layer_too(self, images: Path, checkpoint: Path, tmp_path: Path) -> None:
        network = pretrained(images, checkpoint)
        before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
        result = run(network, images, tmp_path)
        assert any(name.startswith("body.neck") for name in before)
        assert [name for name, parameter in network.named_parameters() if torch.equal(parameter.detach(), before[name])] == []
        assert {key: result[key] for key in ("steps", "num_labelled", "global_batch")} == {
            "steps": 24,
            "num_labelled": 32,
            "global_batch": 8,
        }
        assert math.isfinite(result["loss"])

    @pytest.mark.parametrize("optimizer", ["sgd", "lars", "adamw"])
    def test_learns_two_colours(self, images: Path, checkpoint: Path, tmp_path: Path, optimizer: str) -> None:
        rate = {"sgd": 0.05, "lars": 0.2, "adamw": 0.003}[optimizer]
        network = pretrained(images, checkpoint)
        run(network, images, tmp_path, optimizer={"name": optimizer, "learning_rate": rate, "warmup_share": 0.0})
        assert top1_of(network, images, tmp_path) == 1.0

    def test_fresh_weights_learn_too(self, images: Path, tmp_path: Path) -> None:
        torch.manual_seed(0)
        network = build_classifier(NETWORK, 2, data_of(images).preprocessing)
        run(network, images, tmp_path)
        assert top1_of(network, images, tmp_path) == 1.0

    def test_same_seed_same_weights(self, images: Path, checkpoint: Path, tmp_path: Path) -> None:
        networks = [pretrained(images, checkpoint) for _ in range(3)]
        for number, (network, seed) in enumerate(zip(networks, (1, 1, 2), strict=True)):
            run(network, images, tmp_path / str(number), seed, epochs=1)
        one, same, other = (network.state_dict() for network in networks)
        assert all(torch.equal(one[name], same[name]) for name in one)
        assert not torch.equal(one["body.linear.weight"], other["body.linear.weight"])

    def test_the_backbone_may_go_slower(self, images: Path, checkpoint: Path, tmp_path: Path) -> None:
        """In the first step only the classifier moves (it is 0, so no gradient passes it); in the second all the rest, at its own rate."""
        moved = {}
        for factor in (1.0, 0.125):
            network = pretrained(images, checkpoint)
            before = first_kernel(network)
            plain = OptimizerSettings(learning_rate=0.05, weight_decay=0, warmup_share=0, momentum=0)
            run(
                network,
                images,
                tmp_path / str(factor),
                global_batch=16,
                epochs=1,
                backbone_rate_factor=factor,
                optimizer=plain,
                precision="fp32",
            )
            moved[factor] = first_kernel(network) - before
        assert moved[1.0].any()
        torch.testing.assert_close(moved[0.125], moved[1.0] / 8, rtol=1e-3, atol=1e-7)

    def test_bad_images_leave_one_of_a_batch(self, images: Path, checkpoint: Path, tmp_path: Path) -> None:
        """Batch norm cannot take a batch of one; the step is passed over."""
        for name in CLASSES:
            (tmp_path / "broken" / name).mkdir(parents=True)
            for number, path in enumerate(sorted((images / name).iterdir())):
                (tmp_path / "broken" / name / path.name).write_bytes(path.read_bytes()[: 60 if number % 3 == 0 else None])
        result = run(pretrained(images, checkpoint), tmp_path / "broken", tmp_path, global_batch=2, epochs=1)
        assert result["steps"] == 16
        assert math.isfinite(result["loss"])

    def test_a_loss_that_is_not_finite_keeps_nothing(self, images: Path, checkpoint: Path, tmp_path: Path) -> None:
        wild = {"learning_rate": 1e30, "warmup_share": 0.0}
        with pytest.raises(ConfigError, match=r"the loss is (nan|inf) in step \d+; give a smaller finetune\.optimizer\.learning_rate"):
            run(pretrained(images, checkpoint), images, tmp_path, optimizer=wild, checkpoint_every_s=1e-9)
        kept = load_checkpoint(tmp_path / "checkpoint")  # of a step before it
        assert math.isfinite(kept.manifest["result"]["loss"])


class TestFewLabels:
    def test_a_step_takes_all_images_where_there_are_fewer_than_a_batch(self, images: Path, checkpoint: Path, tmp_path: Path) -> None:
        rows: list[Row] = []
        result = run(pretrained(images, checkpoint), images, tmp_path, on_row=rows.append, global_batch=64, epochs=3)
        assert (result["steps"], result["global_batch"]) == (3, 32)
        assert rows[-1] == {
            "kind": "step", "step": 3, "of": 3, "images": 32, "loss": result["loss"],
            "note": f"loss {result['loss']:.3f}, all 32 labelled images in each step",
        }  # fmt: skip

    def test_the_rate_follows_the_batch_that_is_taken(self, images: Path, checkpoint: Path, tmp_path: Path) -> None:
        """32 images at 0.1 for 256 images are 32 images at 0.0125."""
        found = []
        for number, optimizer in enumerate([{"learning_rate": 0.1, "scaling": "linear"}, {"learning_rate": 0.0125}]):
            network = pretrained(images, checkpoint)
            run(network, images, tmp_path / str(number), global_batch=256, epochs=2, optimizer=optimizer)
            found.append(network.state_dict())
        assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])

    def test_batch_that_fits(self) -> None:
        assert batch_that_fits(64, 1000, 4) == 64
        assert batch_that_fits(64, 20, 4) == 20
        with pytest.raises(ConfigError, match=r"finetune\.global_batch 64 of 7 labelled images gives 4 workers less than 2 images each"):
            batch_that_fits(64, 7, 4)


class TestLinearEvaluation:
    def test_only_the_classifier_moves(self, images: Path, checkpoint: Path, tmp_path: Path) -> None:
        """Neither weights nor statistics of the backbone."""
        network = pretrained(images, checkpoint, 0)
        before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        run(network, images, tmp_path, linear=True, epochs=12, optimizer={"learning_rate": 1.0, "warmup_share": 0.0})
        moved = {name for name, tensor in network.state_dict().items() if not torch.equal(tensor, before[name])}
        assert moved == {"body.linear.weight", "body.linear.bias"}
        assert top1_of(network, images, tmp_path) == 1.0

    def test_it_is_logistic_regression_on_the_features(self, images: Path, checkpoint: Path, tmp_path: Path) -> None:
        """One step from 0 with all images: the gradient of the bias is the mean of (1/2 - one-hot), which is 0 for balanced classes, and
        that of the weights is the mean of (1/2 - one-hot) x features, the features taken in evaluation mode."""
        network = pretrained(images, checkpoint, 0)
        features_BD, labels_B = [], []
        backbone = body_of(network).backbone
        hook = backbone.register_forward_hook(lambda _, __, found: features_BD.append(found.detach().clone()))
        crops_seen: list[torch.Tensor] = []
        watch = network.normalize.register_forward_hook(lambda _, given, found: crops_seen.append(found.detach().clone()))
        plain = OptimizerSettings(learning_rate=0.5, weight_decay=0, warmup_share=0, momentum=0)
        original = F.cross_entropy

        def noted(logits_BK: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            labels_B.append(labels)
            return original(logits_BK, labels)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(F, "cross_entropy", noted)
            run(network, images, tmp_path, linear=True, global_batch=32, epochs=1, optimizer=plain, precision="fp32")
        hook.remove()
        watch.remove()
        torch.testing.assert_close(features_BD[0], backbone.eval()(crops_seen[0]))
        error_BK = 0.5 - F.one_hot(labels_B[0], 2).float()
        torch.testing.assert_close(body_of(network).linear.weight.detach(), -0.5 * error_BK.T @ features_BD[0] / 32)

    def test_no_head_layer_is_kept(self) -> None:
        assert SETTINGS.replace(num_head_layers=2).kept_head_layers == 2
        assert SETTINGS.replace(num_head_layers=2, linear=True).kept_head_layers == 0

    def test_refuses_layers_in_between(self, images: Path, checkpoint: Path, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"finetune\.linear needs a backbone of ours"):
            run(pretrained(images, checkpoint, 1), images, tmp_path, linear=True)


def dying_at(step: int, patch: pytest.MonkeyPatch) -> None:
    """The process dies before it takes step `step` of this process, counted from 1."""
    taken = 0

    def step_or_death(*arguments: Any) -> None:
        nonlocal taken
        taken += 1
        if taken == step:
            raise Killed
        take_step(*arguments)

    patch.setattr(module, "take_step", step_or_death)


class TestResume:
    """One epoch of four steps, in several optimisers and precisions."""

    @pytest.mark.parametrize(
        "changes",
        [
            {"precision": "fp32"},
            {"precision": "bf16", "optimizer": {"name": "lars", "learning_rate": 1.0}},
            {"optimizer": {"name": "adamw", "learning_rate": 0.01}, "backbone_rate_factor": 0.5},
            {"linear": True, "num_head_layers": 0},
        ],
        ids=["sgd", "lars", "adamw", "linear"],
    )
    def test_two_and_two_are_four(self, images: Path, checkpoint: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
        settings: dict[str, Any] = {"epochs": 2, "global_batch": 16, "checkpoint_every_s": 1e-9, **changes}
        kept = 0 if changes.get("linear") else 1
        straight = pretrained(images, checkpoint, kept)
        said = run(straight, images, tmp_path / "straight", **settings)
        for killed_at in (3, 4):
            folder = tmp_path / str(killed_at)
            with pytest.MonkeyPatch.context() as patch:
                dying_at(killed_at, patch)
                with pytest.raises(Killed):
                    run(pretrained(images, checkpoint, kept), images, folder, **settings)
            with pytest.MonkeyPatch.context() as patch:
                dying_at(6 - killed_at, patch)  # what is left is 4 - (killed_at - 1) steps; one more is death
                cut = pretrained(images, checkpoint, kept)
                result = run(cut, images, folder, **settings)
            assert {**result, "seconds": 0} == {**said, "seconds": 0}
            weights = cut.state_dict()
            assert all(torch.equal(tensor, weights[name]) for name, tensor in straight.state_dict().items())
            saved = load_checkpoint(folder / "checkpoint").weights
            assert all(torch.equal(tensor, saved[name]) for name, tensor in straight.state_dict().items())

    def test_a_finished_one_is_not_trained_again(self, images: Path, checkpoint: Path, tmp_path: Path) -> None:
        first = run(pretrained(images, checkpoint), images, tmp_path, epochs=1)
        with pytest.MonkeyPatch.context() as patch:
            dying_at(1, patch)
            assert run(pretrained(images, checkpoint), images, tmp_path, epochs=1, checkpoint_every_s=5) == first

    @pytest.mark.parametrize("change", [{"min_area": 0.9}, {"seed": 2}, {"linear": True}])
    def test_other_settings_start_afresh(self, images: Path, checkpoint: Path, tmp_path: Path, change: dict[str, Any]) -> None:
        kept = 0 if "linear" in change else 1
        run(pretrained(images, checkpoint), images, tmp_path / "once", epochs=1)
        run(pretrained(images, checkpoint, kept), images, tmp_path / "once", **{"epochs": 1, **change})
        alone = pretrained(images, checkpoint, kept)
        run(alone, images, tmp_path / "alone", **{"epochs": 1, **change})
        saved = load_checkpoint(tmp_path / "once" / "checkpoint").weights
        assert all(torch.equal(tensor, saved[name]) for name, tensor in alone.state_dict().items())

    def test_a_damaged_checkpoint_starts_afresh(self, images: Path, checkpoint: Path, tmp_path: Path) -> None:
        first = run(pretrained(images, checkpoint), images, tmp_path, epochs=1)
        path = tmp_path / "checkpoint" / "weights.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
        assert {**run(pretrained(images, checkpoint), images, tmp_path, epochs=1), "seconds": 0} == {**first, "seconds": 0}

    def test_saves_now_and_then_and_at_the_end(self, images: Path, checkpoint: Path, tmp_path: Path) -> None:
        steps: list[int] = []

        def note(weights: Any, manifest: dict[str, Any], state: Any) -> Write:
            steps.append(manifest["result"]["steps"])
            return lambda folder: None

        for number, (every_s, expected) in enumerate([(1e-9, [1, 2, 3, 4]), (1e9, [4])]):
            steps.clear()
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(module, "prepare_checkpoint", note)
                run(pretrained(images, checkpoint), images, tmp_path / str(number), epochs=1, checkpoint_every_s=every_s)
            assert steps == expected


class TestJob:
    def job(self, images: Path, folder: Path, pretrained: Path | None, **data: Any) -> FinetuneJob:
        return FinetuneJob(
            data=data_of(images, **data),
            finetune=SETTINGS,
            network=NETWORK,
            pretrained=None if pretrained is None else str(pretrained),
            seed=1,
            class_names=CLASSES,
            origin={"pretrained": "abc"},
            rejected_path=str(folder / "rejected.jsonl"),
        )

    @pytest.mark.parametrize("fresh", [False, True])
    def test_ends_with_a_classifier_and_its_scores(self, images: Path, checkpoint: Path, tmp_path: Path, fresh: bool) -> None:
        job = self.job(images, tmp_path, None if fresh else checkpoint, label_fraction=0.5)
        finetune_worker(job.model_dump(mode="json"), LocalWorker(tmp_path, device=torch.device("cpu")))
        saved = load_classifier(tmp_path / "checkpoint")
        assert (saved.card.network, saved.card.num_head_layers, saved.card.class_names) == (NETWORK, 1, CLASSES)
        assert saved.card.origin == {"pretrained": "abc"}
        result = load_checkpoint(tmp_path / "checkpoint").manifest["result"]
        assert (result["num_labelled"], result["steps"], result["scores"]["num_images"]) == (16, 12, 32)
        assert result["scores"]["top1"] == top1_of(saved.network, images, tmp_path)

    def test_test_images_without_labels_give_no_score(self, images: Path, checkpoint: Path, tmp_path: Path) -> None:
        job = self.job(images, tmp_path, checkpoint, test={"path": str(images / "red")})
        with pytest.raises(SourceError, match="red: 16 of 16 test images have no label; evaluation needs all of them"):
            finetune_worker(job.model_dump(mode="json"), LocalWorker(tmp_path, device=torch.device("cpu")))

    def test_fresh_weights_are_those_of_the_seed(self, images: Path, tmp_path: Path) -> None:
        networks = []
        for number in range(2):
            torch.manual_seed(number)
            finetune_worker(
                self.job(images, tmp_path, None).model_dump(mode="json"), LocalWorker(tmp_path / str(number), device=torch.device("cpu"))
            )
            networks.append(load_checkpoint(tmp_path / str(number) / "checkpoint").weights)
        assert all(torch.equal(tensor, networks[1][name]) for name, tensor in networks[0].items())
