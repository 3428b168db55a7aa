"""Run by test_cluster.py: two processes, joined by gloo, each with its part of a batch; what each of them gets is saved.

    python two_workers.py FOLDER

FOLDER holds task.pt (see `Task`), and gets rank-0.pt and rank-1.pt.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TypedDict

import torch
from torch import Tensor, nn

from distill.cluster.ddp import sync_batch_norm, wrap

sys.path.insert(0, str(Path(__file__).parents[2]))  # the folder of the tests
from forked_workers import ForkedWorker, run_forked

WORLD = 2


class Task(TypedDict):
    """What both workers are given."""

    weights: dict[str, Tensor]
    """Of `small_network()`."""
    parts: list[Tensor]
    """The images of each worker; they need not be equally many."""
    targets: list[Tensor]
    """What each worker's loss multiplies its results with."""


def small_network() -> nn.Sequential:
    """A convolution, both kinds of batch norm, a linear layer."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * 4, 5),
        nn.BatchNorm1d(5, momentum=0.3),
        nn.Linear(5, 2),
    )


def work(worker: ForkedWorker) -> None:
    """Two training steps' worth of forward and backward passes, then one in evaluation mode."""
    folder, rank = worker.folder, worker.rank
    task: Task = torch.load(folder / "task.pt", weights_only=True)
    network = small_network()
    network.load_state_dict(task["weights"])
    if rank == 1:
        nn.init.zeros_(network[0].weight)  # worker 0's weights are to be taken
    trained = wrap(sync_batch_norm(network, worker), worker)
    images = task["parts"][rank].clone().requires_grad_()
    results = []
    for _ in range(2):
        results.append(trained(images))
        # The gradients are averaged over the workers, so the sum over all images is WORLD times that.
        (WORLD * (results[-1] * task["targets"][rank]).sum()).backward()
    gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
    assert images.grad is not None
    found = {"results": [r.detach() for r in results], "gradients": gradients, "images": images.grad / WORLD, "state": network.state_dict()}
    torch.save({**found, "evaluated": network.eval()(images).detach()}, folder / f"rank-{rank}.pt")


if __name__ == "__main__":
    sys.exit(run_forked(Path(sys.argv[1]), work, WORLD))
