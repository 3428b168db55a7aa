"""A group of workers is as good as one: synchronised batch norm and averaged gradients against plain torch on the whole batch."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distill.cluster import group
from distill.cluster.ddp import sync_batch_norm, wrap
from distill.cluster.group import _remove_unregistered
from distill.cluster.worker import LocalWorker
from distill.errors import ConfigError

CPU = torch.device("cpu")


SCRIPT = Path(__file__).with_name("two_workers.py")
small_network = runpy.run_path(str(SCRIPT))["small_network"]


@pytest.fixture(scope="module")
def two_workers(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(the task, what each worker got)."""
    folder = tmp_path_factory.mktemp("two")
    torch.manual_seed(0)
    parts = [torch.randn(5, 3, 4, 4), 1 + 0.5 * torch.randn(2, 3, 4, 4)]
    weights = small_network().state_dict()
    weights["0.bias"] += 30  # far from 0 for its spread: E[x^2] - E[x]^2 in float32 would be off by more than the tolerance
    task = {"weights": weights, "parts": parts, "targets": [torch.randn(len(part), 2) for part in parts]}
    torch.save(task, folder / "task.pt")
    made = subprocess.run(
        [sys.executable, "-W", "error", str(SCRIPT), str(folder)], capture_output=True, text=True, timeout=120, check=False
    )
    assert made.returncode == 0, made.stderr
    return task, [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module")
def alone(two_workers: tuple[dict[str, Any], Any]) -> dict[str, Any]:
    """The same with torch's own layers in one process, all images in one batch."""
    task, _ = two_workers
    network = small_network()
    network.load_state_dict(task["weights"])
    images = torch.cat(task["parts"]).requires_grad_()
    results: list[Tensor] = []
    for _ in range(2):
        results.append(network(images))
        (results[-1] * torch.cat(task["targets"])).sum().backward()
    gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    return {"results": results, "gradients": gradients, "images": images.grad, "state": state, "evaluated": network.eval()(images)}


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other.detach(), rtol=1e-5, atol=1e-5)


def test_results_are_those_of_the_whole_batch(two_workers: Any, alone: dict[str, Any]) -> None:
    _, found = two_workers
    for number in range(2):
        close(torch.cat([worker["results"][number] for worker in found]), alone["results"][number])
    close(torch.cat([worker["evaluated"] for worker in found]), alone["evaluated"])


def test_gradients_of_images_and_weights_are_those_of_the_whole_batch(two_workers: Any, alone: dict[str, Any]) -> None:
    _, found = two_workers
    close(torch.cat([worker["images"] for worker in found]), alone["images"])
    for worker in found:
        for name, gradient in alone["gradients"].items():
            close(worker["gradients"][name], gradient)


def test_running_statistics_are_those_of_the_whole_batch_under_the_same_names(two_workers: Any, alone: dict[str, Any]) -> None:
    _, found = two_workers
    for worker in found:
        assert list(worker["state"]) == list(alone["state"])
        for name, tensor in alone["state"].items():
            close(worker["state"][name], tensor)


def test_one_worker_keeps_its_network_as_it_is() -> None:
    network, worker = small_network(), LocalWorker(Path(), device=CPU)
    assert sync_batch_norm(network, worker) is network
    assert wrap(network, worker) is network
    assert type(network[1]) is nn.BatchNorm2d


class TwoWorkers(LocalWorker):
    world = 2


def test_a_batch_norm_with_an_activation_of_its_own_is_refused() -> None:
    class NormAndReLU(nn.BatchNorm2d):
        pass

    with pytest.raises(ConfigError, match=r"NormAndReLU cannot be synchronised over 2 workers; use ray.num_workers=1"):
        sync_batch_norm(nn.Sequential(NormAndReLU(3)), TwoWorkers(Path(), device=CPU))


def test_synchronising_twice_changes_nothing_more() -> None:
    network, worker = small_network(), TwoWorkers(Path(), device=CPU)
    weights = {name: tensor.data_ptr() for name, tensor in network.state_dict().items()}
    once = [type(module) for module in sync_batch_norm(network, worker).modules()]
    assert [type(module) for module in sync_batch_norm(network, worker).modules()] == once
    assert {name: tensor.data_ptr() for name, tensor in network.state_dict().items()} == weights  # optimisers hold these tensors


def test_a_checkpoints_folder_is_made_durable_after_what_is_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its parent's list of names last: the order of the calls, as no test can cut the power."""
    done: list[object] = []
    monkeypatch.setattr(group, "fsync_path", done.append)
    group._write_into(tmp_path / "ray" / "checkpoint_1", lambda folder: done.append(("written", folder.is_dir())))
    assert done == [("written", True), tmp_path / "ray"]


class TestCheckpointsThatRayDoesNotKnow:
    """`{"checkpoint_results": [...]}` is the shape of Ray 2.60's snapshot."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        for name in ("checkpoint_1", "checkpoint_2", "checkpoint_3"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "weights").write_text("x")
        return tmp_path

    @pytest.mark.parametrize(
        ("snapshot", "left"),
        [
            ('{"checkpoint_results": [{"checkpoint_dir_name": "checkpoint_2"}]}', {"checkpoint_2"}),
            ('{"in another form": []}', {"checkpoint_1", "checkpoint_2", "checkpoint_3"}),
            (None, {"checkpoint_1", "checkpoint_2", "checkpoint_3"}),
        ],
    )
    def test_are_removed_where_it_is_sure(self, folder: Path, snapshot: str | None, left: set[str]) -> None:
        if snapshot is not None:
            (folder / "checkpoint_manager_snapshot.json").write_text(snapshot)
        _remove_unregistered(folder)
        assert {path.name for path in folder.iterdir() if path.is_dir()} == left
