"""Run by test_cluster.py: two processes, joined by gloo, each with its part of a batch; what each of them gets is saved.

    python two_workers.py FOLDER

FOLDER holds task.pt (see `Task`), and gets rank-0.pt and rank-1.pt. One program forks the second worker, so that torch is imported once.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TypedDict

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distill.cluster.ddp import sync_batch_norm, wrap
from distill.cluster.worker import LocalWorker

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


class GlooWorker(LocalWorker):
    """One of two processes."""

    world = WORLD

    def __init__(self, folder: Path, rank: int) -> None:
        super().__init__(folder, device=torch.device("cpu"))
        self.rank = rank


def work(folder: Path, rank: int) -> None:
    """Two training steps' worth of forward and backward passes, then one in evaluation mode."""
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=WORLD)
    worker = GlooWorker(folder, rank)
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
    dist.barrier()
    dist.destroy_process_group()


def main(folder: Path) -> int:
    """Both workers; the exit code is the worse one."""
    torch.set_num_threads(1)
    child = os.fork()
    if child == 0:
        work(folder, 1)
        os._exit(0)
    work(folder, 0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
