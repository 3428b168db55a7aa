"""One step's gradient: whole, in micro-batches, with checkpointed blocks; and which statistics batch norms keep."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from distill.cluster.worker import LocalWorker
from distill.crops import CropKey
from distill.data_settings import DataSettings
from distill.loader import CropBatch
from distill.models.projection_head import unit_length
from teacher_trainer.augment import Distortion, distort
from teacher_trainer.contrastive import BatchParts
from teacher_trainer.contrastive_network import ContrastiveNetwork, kept_statistics
from teacher_trainer.contrastive_step import ContrastiveStep, Views
from teacher_trainer.settings import PretrainSettings

pytestmark = pytest.mark.usefixtures("one_thread")

BATCH = 7
DATA = DataSettings.model_validate(
    {**{name: {"path": "images"} for name in ("unlabelled", "labelled", "test")}, "image_size": 12, "mean": (0.4, 0.5, 0.6)}
)
SETTINGS = PretrainSettings.model_validate(
    {
        "network": {"depth": 14, "width_multiplier": 0.0625, "sk_ratio": 0.0625, "stem": "cifar"},
        "embedding_dim": 8,
        "global_batch": 8,
        "contrastive_temperature": 0.3,
        "precision": "fp32",
    }
)


def batch_of(count: int = BATCH) -> CropBatch:
    crops = np.random.default_rng(0).integers(0, 256, (2, count, 12, 12, 3), dtype=np.uint8)
    ids = [f"image {number}" for number in range(count)]
    return CropBatch(0, 0, (4, 5), np.zeros((count, 2), dtype=np.int64), ids, crops, np.full(count, -1))


def network_of(settings: PretrainSettings = SETTINGS) -> ContrastiveNetwork:
    torch.manual_seed(0)
    network = ContrastiveNetwork(settings, DATA)
    for module in network.modules():  # the last norm of a block starts at 0, which would keep gradients out of the block
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return network


class Plain(nn.Module):
    """No batch norm: every image for itself, so that micro-batches may not change anything."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 8))

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.layers(images_BCHW)


def step_on(
    network: nn.Module, tmp_path: Path, settings: PretrainSettings = SETTINGS, memory_MD: Tensor | None = None
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients."""
    worker = LocalWorker(tmp_path, device=torch.device("cpu"))
    views = Views(batch_of(), settings, seed=3, device=worker.device)
    outcome = ContrastiveStep(network, network, settings, worker).backward(views, BatchParts((BATCH,), 0), memory_MD)
    return outcome.loss.item(), {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    assert largest > 1e-3
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-5 * largest, msg=name)


class TestViews:
    def test_first_views_then_second_each_distorted_by_its_key(self) -> None:
        batch = batch_of()
        images = Views(batch, SETTINGS, seed=3, device=torch.device("cpu")).images(slice(2, 5))
        crops = torch.from_numpy(batch.crops_VBHWC[:, 2:5].reshape(6, 12, 12, 3)).permute(0, 3, 1, 2).float() / 255
        keys = [CropKey(3, view, f"image {number}") for view in (4, 5) for number in (2, 3, 4)]
        torch.testing.assert_close(images, distort(crops, Distortion.draw(keys, 1.0, 0.5)), atol=1e-6, rtol=0)

    @pytest.mark.parametrize(
        ("micro_batch", "counts", "rank", "sizes"),
        [
            (0, (7,), 0, [7]),
            (8, (7,), 0, [7]),
            (4, (7,), 0, [3, 4]),
            (3, (7,), 0, [2, 2, 3]),
            (2, (4, 3), 1, [1, 2]),  # a rejected image: still as many as the other worker
            (1, (4, 2), 0, [2, 2]),  # two rejected: the other worker cannot make more than two
        ],
    )
    def test_as_many_micro_batches_in_every_worker(self, micro_batch: int, counts: tuple[int, ...], rank: int, sizes: list[int]) -> None:
        settings = SETTINGS.replace(micro_batch=micro_batch)
        rows = Views(batch_of(counts[rank]), settings, 3, torch.device("cpu")).micro_batches(BatchParts(counts, rank))
        assert [part.stop - part.start for part in rows] == sizes
        assert [row for part in rows for row in range(counts[rank])[part]] == list(range(counts[rank]))


class TestMicroBatches:
    @pytest.mark.parametrize("micro_batch", [1, 2, 3, 4])
    def test_the_negatives_are_those_of_the_whole_batch(self, tmp_path: Path, micro_batch: int) -> None:
        loss, whole = step_on(Plain(), tmp_path)
        found_loss, found = step_on(Plain(), tmp_path, SETTINGS.replace(micro_batch=micro_batch))
        assert found_loss == pytest.approx(loss, rel=1e-6)
        assert_same(found, whole)

    def test_with_a_memory(self, tmp_path: Path) -> None:
        memory_MD = unit_length(torch.randn(20, 8, generator=torch.Generator().manual_seed(5)))
        loss, whole = step_on(Plain(), tmp_path, memory_MD=memory_MD)
        found_loss, found = step_on(Plain(), tmp_path, SETTINGS.replace(micro_batch=3), memory_MD)
        assert found_loss == pytest.approx(loss, rel=1e-6)
        assert loss > step_on(Plain(), tmp_path)[0]
        assert_same(found, whole)

    def test_as_large_as_the_batch_is_none(self, tmp_path: Path) -> None:
        loss, whole = step_on(network_of(), tmp_path)
        found_loss, found = step_on(network_of(), tmp_path, SETTINGS.replace(micro_batch=8))
        assert found_loss == loss
        assert all(torch.equal(found[name], whole[name]) for name in whole)

    def test_each_moves_the_running_statistics_once(self, tmp_path: Path) -> None:
        network, expected = network_of(), network_of()
        settings = SETTINGS.replace(micro_batch=4)
        step_on(network, tmp_path, settings)
        views = Views(batch_of(), settings, 3, torch.device("cpu"))
        expected.train()
        for rows in (slice(0, 3), slice(3, 7)):
            expected(views.images(rows))
        for name, buffer in network.named_buffers():
            torch.testing.assert_close(buffer, expected.get_buffer(name), msg=name)
        assert network.get_buffer("head.layers.0.1.num_batches_tracked") == 2


class TestCheckpointedBlocks:
    @pytest.mark.parametrize("micro_batch", [0, 4])
    def test_same_gradients_same_statistics(self, tmp_path: Path, micro_batch: int) -> None:
        settings = SETTINGS.replace(micro_batch=micro_batch)
        plain, checkpointed = network_of(settings), network_of(settings.replace(checkpoint_blocks=True))
        loss, whole = step_on(plain, tmp_path, settings)
        found_loss, found = step_on(checkpointed, tmp_path, settings)
        assert found_loss == loss
        assert_same(found, whole)
        assert all(torch.equal(buffer, plain.get_buffer(name)) for name, buffer in checkpointed.named_buffers())
        assert plain.get_buffer("head.layers.0.1.num_batches_tracked") == (2 if micro_batch else 1)

    def test_fewer_tensors_wait_for_the_backward_pass(self) -> None:
        """Elements saved for the backward pass, but for parameters."""
        saved: dict[bool, int] = {}
        for is_on in (False, True):
            network = network_of(SETTINGS.replace(checkpoint_blocks=is_on))
            own = {p.data_ptr() for p in network.parameters()}
            storages: dict[int, int] = {}

            def note(tensor: Tensor, own: set[int] = own, storages: dict[int, int] = storages) -> Tensor:
                if tensor.data_ptr() not in own:
                    storages[tensor.data_ptr()] = tensor.numel()
                return tensor

            images = Views(batch_of(), SETTINGS, 3, torch.device("cpu")).images(slice(0, BATCH))
            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                network(images)
            saved[is_on] = sum(storages.values())
        assert saved[True] < saved[False] / 3

    def test_same_weights_by_the_same_names(self) -> None:
        assert network_of().state_dict().keys() == network_of(SETTINGS.replace(checkpoint_blocks=True)).state_dict().keys()


class TestKeptStatistics:
    def test_batches_are_normalised_and_forgotten(self) -> None:
        network = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3), nn.BatchNorm1d(3, track_running_stats=False))
        before = copy.deepcopy(network.state_dict())
        rows = torch.randn(5, 3) * 4 + 2
        with kept_statistics(network):
            kept = network(rows)
        assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
        torch.testing.assert_close(kept, network(rows))
        assert network[0].num_batches_tracked == 1

    def test_also_when_something_fails(self) -> None:
        network = nn.BatchNorm1d(3)
        with pytest.raises(ValueError, match="expected 2D or 3D"), kept_statistics(network):
            network(torch.randn(3))
        network(torch.randn(5, 3))
        assert network.num_batches_tracked == 1
