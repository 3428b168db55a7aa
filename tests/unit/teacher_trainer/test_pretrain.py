"""Pretraining that was cut off ends with the very weights of one that was not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from distill.checkpoint import load_checkpoint
from distill.data_settings import DataSettings
from distill.errors import ConfigError
from distill.rejections import RejectionLog
from distill.sources import open_source
from teacher_trainer import pretrain as module
from teacher_trainer.pretrain import PRETRAINED, ContrastiveNetwork, pretrain, step_generator
from teacher_trainer.settings import PretrainSettings

SETTINGS = PretrainSettings.model_validate(
    {
        "network": {"name": "resnet", "depth": 14, "width_multiplier": 0.0625, "sk_ratio": 0.0625, "stem": "cifar"},
        "num_head_layers": 3,
        "embedding_dim": 8,
        "epochs": 2,
        "global_batch": 8,
        "min_area": 0.3,
        "optimizer": {"name": "sgd", "learning_rate": 0.05},
        "checkpoint_every_s": 1e-9,  # after every step
    }
)
"""18 images in batches of 8: two epochs of two steps each, with two images left out of each epoch."""


class Killed(Exception):
    """The process dies here."""


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for number in range(18):
        Image.fromarray(random.integers(0, 256, (16, 18, 3), dtype=np.uint8)).save(folder / f"{number:02d}.png")
    return folder


def data_of(images: Path, **changes: Any) -> DataSettings:
    sets = {name: {"path": str(images), "records_per_shard": 7} for name in ("unlabelled", "labelled", "test")}
    return DataSettings.model_validate({**sets, "image_size": 12, "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25), **changes})


def run(images: Path, folder: Path, settings: PretrainSettings = SETTINGS, seed: int = 1, **data: Any) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    source = open_source(str(images), records_per_shard=7)
    with RejectionLog(folder / "rejected.jsonl", max_share=0.5) as rejections:
        return pretrain(source, data_of(images, **data), settings, seed, folder, rejections)


def dying_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process dies before it takes step `step`, counted from 1."""
    taken = 0
    train_step = module._train_step

    def step_or_death(*arguments: Any) -> Any:
        nonlocal taken
        taken += 1
        if taken == step:
            raise Killed
        return train_step(*arguments)

    monkeypatch.setattr(module, "_train_step", step_or_death)


def killed_run(step: int, monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> None:
    with monkeypatch.context() as patch:
        dying_at(step, patch)
        with pytest.raises(Killed):
            run(*arguments)


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(folder / "checkpoint").weights


def same_weights(one: Path, other: Path) -> bool:
    first, second = weights_in(one), weights_in(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def journal_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def straight(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps without a break."""
    folder = tmp_path_factory.mktemp("straight")
    run(images, folder)
    return folder


class TestResume:
    @pytest.mark.parametrize(("killed_at", "every_s"), [(2, 1e-9), (3, 1e-9), (4, 1e-9), (2, 1e9), (4, 1e9)])
    def test_two_and_two_are_four(
        self, images: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: int, every_s: float
    ) -> None:
        """Whether the last checkpoint is of the step before, or of the end of the epoch before, or there is none yet."""
        settings = SETTINGS.replace(checkpoint_every_s=every_s)
        killed_run(killed_at, monkeypatch, images, tmp_path, settings)
        result = run(images, tmp_path, settings)
        assert result["steps"] == 4
        assert same_weights(tmp_path, straight)
        assert journal_of(tmp_path) == journal_of(straight)

    def test_adamw_too(self, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        settings = SETTINGS.replace(optimizer={"name": "adamw", "learning_rate": 0.01})
        run(images, tmp_path / "straight", settings)
        killed_run(3, monkeypatch, images, tmp_path / "cut", settings)
        run(images, tmp_path / "cut", settings)
        assert same_weights(tmp_path / "cut", tmp_path / "straight")

    def test_a_finished_one_is_not_trained_again(
        self, images: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = run(images, tmp_path)
        dying_at(1, monkeypatch)
        again = run(images, tmp_path)
        assert {**again, "seconds": 0} == {**first, "seconds": 0}
        assert journal_of(tmp_path) == journal_of(straight)

    @pytest.mark.parametrize("changed", [{"settings": SETTINGS.replace(checkpoint_every_s=7.0)}, {"num_threads": 1}])
    def test_what_does_not_matter_does_not_start_afresh(
        self, images: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any]
    ) -> None:
        killed_run(4, monkeypatch, images, tmp_path)
        with monkeypatch.context() as patch:
            dying_at(2, patch)  # one step is left; a second would be one too many
            run(images, tmp_path, **changed)
        assert same_weights(tmp_path, straight)

    @pytest.mark.parametrize("changed", [{"settings": SETTINGS.replace(min_area=0.5)}, {"seed": 2}, {"mean": (0.4, 0.5, 0.5)}])
    def test_what_matters_does(self, images: Path, straight: Path, tmp_path: Path, changed: dict[str, Any]) -> None:
        run(images, tmp_path)
        run(images, tmp_path, **changed)
        assert [entry["step"] for entry in journal_of(tmp_path)] == [1, 2, 3, 4]
        assert not same_weights(tmp_path, straight)

    def test_a_damaged_checkpoint_starts_afresh(
        self, images: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        killed_run(3, monkeypatch, images, tmp_path)
        path = tmp_path / "checkpoint" / "weights.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
        run(images, tmp_path)
        assert same_weights(tmp_path, straight)

    def test_a_torn_journal_line(self, images: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        killed_run(3, monkeypatch, images, tmp_path)
        with (tmp_path / "metrics.jsonl").open("a") as journal:
            journal.write('{"step": 3, "ep')
        run(images, tmp_path)
        assert journal_of(tmp_path) == journal_of(straight)


class TestTraining:
    def test_says_what_it_did(self, images: Path, straight: Path, tmp_path: Path) -> None:
        result = run(images, tmp_path)
        assert same_weights(tmp_path, straight)
        journal = journal_of(tmp_path)
        assert [(entry["step"], entry["epoch"]) for entry in journal] == [(1, 0), (2, 0), (3, 1), (4, 1)]
        assert {key: journal[-1][key] for key in ("loss", "accuracy", "entropy")} == {k: result[k] for k in ("loss", "accuracy", "entropy")}
        manifest = load_checkpoint(tmp_path / "checkpoint").manifest
        assert (manifest["kind"], manifest["step"], manifest["identity"]) == (PRETRAINED, 4, result["digest"])

    def test_every_step_has_random_numbers_and_crops_of_its_own(
        self, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        generators: list[bytes] = []
        crops: list[bytes] = []
        train_step = module._train_step

        def noted(network: Any, optimizer: Any, crops_VBHWC: Any, settings: Any, generator: torch.Generator, *rest: int) -> Any:
            generators.append(generator.get_state().numpy().tobytes())
            crops.extend(crop.tobytes() for crop in crops_VBHWC.reshape(-1, 12, 12, 3))
            return train_step(network, optimizer, crops_VBHWC, settings, generator, *rest)

        monkeypatch.setattr(module, "_train_step", noted)
        run(images, tmp_path)
        assert len(set(generators)) == 4
        assert len(set(crops)) == 4 * 2 * 8

    def test_every_weight_but_the_frozen_offset_moves(self, images: Path, straight: Path) -> None:
        torch.manual_seed(1)
        network = ContrastiveNetwork(SETTINGS, data_of(images))
        trained = weights_in(straight)
        still = {name for name, parameter in network.named_parameters() if torch.equal(parameter.detach(), trained[name])}
        assert still == {"head.layers.2.1.bias"}

    def test_it_learns_to_find_the_partner(self, tmp_path: Path) -> None:
        """Eight images of eight colours, hardly distorted: after 20 steps far above the chance of 1 in 15."""
        folder = tmp_path / "colours"
        folder.mkdir()
        for number, colour in enumerate(np.random.default_rng(3).integers(0, 256, (8, 3), dtype=np.uint8)):
            Image.fromarray(np.tile(colour, (12, 12, 1))).save(folder / f"{number}.png")
        easy = SETTINGS.replace(epochs=20, jitter_strength=0.0, blur_probability=0.0, optimizer={"name": "adamw", "learning_rate": 0.01})
        run(folder, tmp_path / "run", easy)
        accuracy = [entry["accuracy"] for entry in journal_of(tmp_path / "run")]
        assert np.mean(accuracy[-5:]) > 0.6

    def test_no_epochs_leave_initial_weights(self, images: Path, tmp_path: Path) -> None:
        result = run(images, tmp_path, SETTINGS.replace(epochs=0))
        torch.manual_seed(1)
        network = ContrastiveNetwork(SETTINGS, data_of(images))
        assert result["steps"] == 0
        assert all(torch.equal(tensor, network.state_dict()[name]) for name, tensor in weights_in(tmp_path).items())

    def test_bad_images_leave_nothing_of_a_batch(self, images: Path, tmp_path: Path) -> None:
        """Batches of two, one image in three broken: what is left of some batches is one image or none, and the run goes on."""
        folder = tmp_path / "broken"
        folder.mkdir()
        for number, path in enumerate(sorted(images.iterdir())):
            (folder / path.name).write_bytes(path.read_bytes()[: 60 if number % 3 == 0 else None])
        result = run(folder, tmp_path / "run", SETTINGS.replace(global_batch=2))
        assert result["steps"] == 18
        assert 0 < len(journal_of(tmp_path / "run")) < 18
        assert np.isfinite(result["loss"])

    def test_a_batch_larger_than_the_source(self, images: Path, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="batch 19 is larger than the 18 images there are"):
            run(images, tmp_path, SETTINGS.replace(global_batch=19))

    def test_an_image_smaller_than_the_stride(self, images: Path) -> None:
        settings = SETTINGS.replace(network=SETTINGS.network.replace(stem="imagenet"))
        with pytest.raises(ConfigError, match="image_size 12 is smaller than the network's total stride 32"):
            ContrastiveNetwork(settings, data_of(images))


def test_random_numbers_are_of_the_step_alone() -> None:
    def draw(seed: int, epoch: int, step: int) -> float:
        return torch.rand(1, generator=step_generator(seed, epoch, step)).item()

    assert draw(1, 2, 3) == draw(1, 2, 3)
    assert len({draw(seed, epoch, step) for seed in range(3) for epoch in range(3) for step in range(3)}) == 27
