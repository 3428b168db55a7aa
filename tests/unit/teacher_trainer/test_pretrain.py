"""Pretraining that was cut off ends with the very weights of one that was not."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from distill.checkpoint import PRETRAINED, load_checkpoint
from distill.cluster.worker import LocalWorker, Row
from distill.data_settings import DataSettings
from distill.errors import ConfigError
from distill.image_sets import open_unlabelled
from distill.loader import CropBatch
from teacher_trainer import pretrain as module
from teacher_trainer.contrastive import BatchParts, ContrastiveOutcome, nt_xent
from teacher_trainer.contrastive_network import ContrastiveNetwork
from teacher_trainer.pretrain import pretrain_result, pretrain_worker
from teacher_trainer.pretrain_job import PretrainJob, check_job
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
        "precision": "fp32",
        "checkpoint_every_s": 1e-9,  # after every step
    }
)
"""18 images in batches of 8: two epochs of two steps each, with two images left out of each epoch."""

MEMORY = SETTINGS.replace(memory={"size": 20, "momentum": 0.9})
"""16 views of a step do not divide the queue."""

MICRO = SETTINGS.replace(micro_batch=3, checkpoint_blocks=True)
"""3 does not divide the batch."""


WORKERS = runpy.run_path(str(Path(__file__).with_name("pretraining_workers.py")))
Killed, dying_before = WORKERS["Killed"], WORKERS["dying_before"]

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
    pixels = {"image_size": 12, "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
    return DataSettings.model_validate({**sets, **pixels, "max_rejected_share": 0.5, **changes})


def job_of(images: Path, folder: Path, settings: PretrainSettings = SETTINGS, seed: int = 1, **data: Any) -> PretrainJob:
    return PretrainJob(data=data_of(images, **data), pretrain=settings, seed=seed, rejected_path=str(folder / "rejected.jsonl"))


def run(images: Path, folder: Path, settings: PretrainSettings = SETTINGS, seed: int = 1, **data: Any) -> dict[str, Any]:
    worker = LocalWorker(folder, device=torch.device("cpu"))
    pretrain_worker(job_of(images, folder, settings, seed, **data).model_dump(mode="json"), worker)
    return pretrain_result(folder / "checkpoint")


def killed_run(step: int, *arguments: Any) -> None:
    with dying_before(step), pytest.raises(Killed):
        run(*arguments)


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(folder / "checkpoint").weights


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of a saved state by their paths."""
    if isinstance(tree, list):
        tree = dict(enumerate(tree))
    if isinstance(tree, dict):
        return {k: v for key, inner in tree.items() for k, v in flat(inner, f"{prefix}/{key}").items()}
    return {prefix: tree}


def same_checkpoint(one: Path, other: Path) -> bool:
    """Weights, optimiser, memory and curve, bit for bit."""
    first, second = (load_checkpoint(folder / "checkpoint") for folder in (one, other))
    leaves = [flat({"weights": c.weights, "state": c.state, "curve": c.manifest["curve"]}) for c in (first, second)]
    return leaves[0].keys() == leaves[1].keys() and all(
        torch.equal(leaf, leaves[1][path]) if isinstance(leaf, torch.Tensor) else leaf == leaves[1][path]
        for path, leaf in leaves[0].items()
    )


def curve_of(folder: Path) -> list[dict[str, Any]]:
    return pretrain_result(folder / "checkpoint")["curve"]


@pytest.fixture(scope="module")
def straight(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps without a break."""
    folder = tmp_path_factory.mktemp("straight")
    run(images, folder)
    return folder


class TestResume:
    @pytest.mark.parametrize(("killed_at", "every_s"), [(2, 1e-9), (3, 1e-9), (4, 1e-9), (4, 1e9)])
    def test_two_and_two_are_four(self, images: Path, straight: Path, tmp_path: Path, killed_at: int, every_s: float) -> None:
        """Whether the last checkpoint is of the step before, or there is none yet."""
        settings = SETTINGS.replace(checkpoint_every_s=every_s)
        killed_run(killed_at, images, tmp_path, settings)
        assert (tmp_path / "checkpoint").exists() == (every_s < 1)
        result = run(images, tmp_path, settings)
        assert result["steps"] == 4
        assert same_checkpoint(tmp_path, straight)

    @pytest.mark.parametrize(
        "settings",
        [
            SETTINGS.replace(optimizer={"name": "adamw", "learning_rate": 0.01}),
            SETTINGS.replace(optimizer={"name": "lars", "learning_rate": 0.3, "scaling": "sqrt"}),
            SETTINGS.replace(precision="bf16"),
            MEMORY,
            MICRO,
            MICRO.replace(memory={"size": 20, "momentum": 0.9}),
        ],
        ids=["adamw", "lars", "bf16", "memory", "micro", "micro and memory"],
    )
    def test_whatever_the_settings(self, images: Path, straight: Path, tmp_path: Path, settings: PretrainSettings) -> None:
        run(images, tmp_path / "straight", settings)
        killed_run(3, images, tmp_path / "cut", settings)
        assert load_checkpoint(tmp_path / "cut" / "checkpoint").manifest["step"] == 2
        run(images, tmp_path / "cut", settings)
        assert same_checkpoint(tmp_path / "cut", tmp_path / "straight")
        assert not same_checkpoint(tmp_path / "cut", straight)

    def test_a_finished_one_is_not_trained_again(self, images: Path, straight: Path, tmp_path: Path) -> None:
        first = run(images, tmp_path)
        with dying_before(1):
            assert run(images, tmp_path) == first
        assert same_checkpoint(tmp_path, straight)

    @pytest.mark.parametrize(
        "changed",
        [
            {"settings": SETTINGS.replace(checkpoint_every_s=7.0)},
            {"settings": SETTINGS.replace(checkpoint_blocks=True)},
        ],
        ids=["interval", "checkpointed blocks"],
    )
    def test_what_does_not_matter_does_not_start_afresh(
        self, images: Path, straight: Path, tmp_path: Path, changed: dict[str, Any]
    ) -> None:
        killed_run(4, images, tmp_path)
        with dying_before(2):  # one step is left; a second would be one too many
            run(images, tmp_path, **changed)
        found, expected = weights_in(tmp_path), weights_in(straight)
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("changed", [{"settings": SETTINGS.replace(min_area=0.5)}, {"seed": 2}, {"mean": (0.4, 0.5, 0.5)}])
    def test_what_matters_does(self, images: Path, straight: Path, tmp_path: Path, changed: dict[str, Any]) -> None:
        run(images, tmp_path)
        run(images, tmp_path, **changed)
        assert [row["step"] for row in curve_of(tmp_path)] == [1, 2, 3, 4]
        assert not same_checkpoint(tmp_path, straight)

    def test_a_damaged_checkpoint_starts_afresh(self, images: Path, straight: Path, tmp_path: Path) -> None:
        killed_run(3, images, tmp_path)
        path = tmp_path / "checkpoint" / "weights.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
        run(images, tmp_path)
        assert same_checkpoint(tmp_path, straight)


class TestTraining:
    def test_says_what_it_did(self, images: Path, straight: Path, tmp_path: Path) -> None:
        result = run(images, tmp_path)
        assert same_checkpoint(tmp_path, straight)
        curve = result["curve"]
        assert [(row["step"], row["epoch"]) for row in curve] == [(1, 0), (2, 0), (3, 1), (4, 1)]
        assert {key: curve[-1][key] for key in ("loss", "accuracy", "entropy")} == {k: result[k] for k in ("loss", "accuracy", "entropy")}
        rates = [0.05 * SETTINGS.optimizer.schedule_at(step, 4) for step in range(4)]
        assert [row["learning_rate"] for row in curve] == rates
        manifest = load_checkpoint(tmp_path / "checkpoint").manifest
        assert (manifest["kind"], manifest["step"], manifest["identity"]) == (PRETRAINED, 4, result["digest"])
        assert (manifest["num_head_layers"], manifest["embedding_dim"]) == (3, 8)
        assert manifest["network"] == SETTINGS.network.model_dump(mode="json")
        assert {name.split(".")[0] for name in weights_in(tmp_path)} == {"backbone", "head"}

    def test_tells_how_far_it_is(self, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "POST_EVERY_S", 0.0)
        rows: list[Row] = []
        killed_run(3, images, tmp_path)
        pretrain_worker(job_of(images, tmp_path).model_dump(mode="json"), LocalWorker(tmp_path, rows.append, torch.device("cpu")))
        steps = [row for row in rows if row["kind"] == "step"]
        assert [(row["step"], row["of"], row["images"]) for row in steps] == [(step, 4, 8) for step in (2, 3, 4)]
        assert "loss" in steps[-1]["note"]
        assert [row["step"] for row in rows if row["kind"] == "curve"] == [3, 4]

    def test_every_view_has_a_crop_of_its_own(self, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        crops: list[bytes] = []
        views: list[tuple[int, ...]] = []
        take = module._Pretraining.take

        def noted(self: Any, batch: CropBatch, parts: BatchParts) -> Any:
            views.append(batch.views)
            crops.extend(crop.tobytes() for crop in batch.crops_VBHWC.reshape(-1, 12, 12, 3))
            return take(self, batch, parts)

        monkeypatch.setattr(module._Pretraining, "take", noted)
        run(images, tmp_path)
        assert views == [(0, 1), (0, 1), (2, 3), (2, 3)]
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
        accuracy = [row["accuracy"] for row in curve_of(tmp_path / "run")]
        assert np.mean(accuracy[-5:]) > 0.6

    def test_the_memory_gives_negatives_from_the_second_step_on(self, images: Path, straight: Path, tmp_path: Path) -> None:
        """The same first step, so the same weights in the second; there each of 16 views has 16 more to be told from."""
        run(images, tmp_path, MEMORY)
        with_memory, without = curve_of(tmp_path), curve_of(straight)
        assert with_memory[0] == without[0]
        assert with_memory[1]["loss"] > without[1]["loss"]
        assert with_memory[1]["entropy"] > without[1]["entropy"]

    def test_no_image_is_a_negative_of_itself(self, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """In the third step the queue holds both views of the 16 images of the first epoch, which left two out."""
        told: list[torch.Tensor] = []

        def heard(*given: Any) -> ContrastiveOutcome:
            told.append(given[-1])
            return nt_xent(*given)

        monkeypatch.setattr("teacher_trainer.contrastive_step.nt_xent", heard)
        run(images, tmp_path, SETTINGS.replace(memory={"size": 36}))
        assert [own_BM.shape for own_BM in told] == [(8, 0), (8, 16), (8, 32), (8, 36)]
        assert not told[1].any()
        counts = told[2].sum(dim=1)
        assert set(counts.tolist()) <= {0, 2}
        assert (counts == 2).sum() >= 6

    def test_the_memory_is_an_average_of_the_network(self, images: Path, tmp_path: Path) -> None:
        run(images, tmp_path, MEMORY)
        found = load_checkpoint(tmp_path / "checkpoint")
        assert found.state is not None
        memory = found.state["memory"]
        assert (memory["next"], memory["filled"]) == (4 * 16 % 20, 20)
        torch.testing.assert_close(memory["queue"].norm(dim=1), torch.ones(20))
        last_step = memory["images"].roll(-8, dims=0)[:16].tolist()  # first views, then second ones
        assert last_step[:8] == last_step[8:]
        assert len({(shard, row) for shard, row in last_step}) == 8
        assert all(row < 7 and 7 * shard + row < 18 for shard, row in last_step)
        torch.manual_seed(1)
        start = dict(ContrastiveNetwork(MEMORY, data_of(images)).named_parameters())
        way = {name: (memory["network"][name] - p).norm() / (found.weights[name] - p).norm() for name, p in start.items()}
        del way["head.layers.2.1.bias"]  # frozen at 0
        assert 0.05 < min(way.values()) < max(way.values()) < 0.8

    def test_no_epochs_leave_initial_weights(self, images: Path, tmp_path: Path) -> None:
        result = run(images, tmp_path, SETTINGS.replace(epochs=0))
        torch.manual_seed(1)
        network = ContrastiveNetwork(SETTINGS, data_of(images))
        assert (result["steps"], result["curve"]) == (0, [])
        assert all(torch.equal(tensor, network.state_dict()[name]) for name, tensor in weights_in(tmp_path).items())

    @pytest.mark.parametrize("settings", [SETTINGS, MICRO], ids=["whole", "micro"])
    def test_bad_images_leave_nothing_of_a_batch(self, images: Path, tmp_path: Path, settings: PretrainSettings) -> None:
        """Batches of two, one image in three broken: what is left of some batches is one image or none, and the run goes on."""
        folder = tmp_path / "broken"
        folder.mkdir()
        for number, path in enumerate(sorted(images.iterdir())):
            (folder / path.name).write_bytes(path.read_bytes()[: 60 if number % 3 == 0 else None])
        result = run(folder, tmp_path / "run", settings.replace(global_batch=2))
        assert result["steps"] == 18
        assert 0 < len(result["curve"]) < 18
        assert np.isfinite(result["loss"])


class TestRefused:
    def test_a_batch_larger_than_the_source(self, images: Path, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="batch 19 is larger than the 18 images there are"):
            run(images, tmp_path, SETTINGS.replace(global_batch=19))

    def test_less_than_one_image_for_each_worker(self, images: Path) -> None:
        with pytest.raises(
            ConfigError, match=r"global_batch 8 gives 9 workers less than 1 image each; make it at least 9 or ray\.num_workers"
        ):
            check_job(SETTINGS, open_unlabelled(data_of(images)), world=9)
        check_job(SETTINGS, open_unlabelled(data_of(images)), world=8)

    def test_a_queue_longer_than_an_epoch(self, images: Path, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"memory\.size 37 is more than the 36 views of one epoch"):
            run(images, tmp_path, SETTINGS.replace(memory={"size": 37}))

    def test_an_image_smaller_than_the_stride(self, images: Path, tmp_path: Path) -> None:
        settings = SETTINGS.replace(network=SETTINGS.network.replace(stem="imagenet"))
        with pytest.raises(ConfigError, match="image_size 12 is smaller than the network's total stride 32"):
            run(images, tmp_path, settings)

    def test_a_loss_that_is_not_finite(self, images: Path, tmp_path: Path) -> None:
        """Nothing of it is kept: the checkpoint stays the last good one."""
        wild = SETTINGS.replace(optimizer={"learning_rate": 1e30, "warmup_share": 0.0})
        with pytest.raises(ConfigError, match=r"the loss is not finite in step \d; give a smaller pretrain\.optimizer\.learning_rate"):
            run(images, tmp_path, wild)
        assert all(np.isfinite(row["loss"]) for row in curve_of(tmp_path))
