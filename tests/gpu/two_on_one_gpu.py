"""Run by test_cuda.py: two processes with one GPU, joined by gloo, take the step that one of them takes alone.

Unit of data: the gradients and running statistics of one step. Shapes: B images.
"""

from __future__ import annotations

import multiprocessing
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distill.cluster.ddp import sync_batch_norm, wrap
from distill.cluster.worker import LocalWorker

B = 12


class OneOfTwo(LocalWorker):
    """A worker on the GPU."""

    def __init__(self, folder: Path, rank: int, world: int) -> None:
        super().__init__(folder, device=torch.device("cuda", 0))
        self.rank, self.world = rank, world


def step(worker: LocalWorker) -> dict[str, Tensor]:
    """What this worker's share of the batch leaves in the network."""
    torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.GELU(), nn.Flatten(), nn.Linear(8 * 36, 4)).to(worker.device)
    layers = sync_batch_norm(layers, worker)
    assert any(isinstance(module, nn.SyncBatchNorm) for module in layers) == (worker.world > 1)
    images_BCHW = torch.randn(B, 3, 8, 8, generator=torch.Generator().manual_seed(1)).to(worker.device)
    wrap(layers, worker)(images_BCHW[worker.rank :: worker.world]).square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in layers.named_parameters() if parameter.grad is not None}
    return {name: tensor.cpu() for name, tensor in {**gradients, **dict(layers.named_buffers())}.items()}


def member(folder: Path, rank: int) -> None:
    """One of the two."""
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    torch.save(step(OneOfTwo(folder, rank, 2)), folder / f"{rank}.pt")
    dist.destroy_process_group()


def main() -> None:
    """Compare."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        context = multiprocessing.get_context("spawn")
        members = [context.Process(target=member, args=(folder, rank)) for rank in range(2)]
        for process in members:
            process.start()
        for process in members:
            process.join(120)
        for process in members:
            process.kill()  # one that waits for the other, which died
        assert [process.exitcode for process in members] == [0, 0]
        alone = step(OneOfTwo(folder, 0, 1))
        for rank in range(2):
            together = torch.load(folder / f"{rank}.pt", weights_only=True)
            assert together.keys() == alone.keys()
            for key, tensor in alone.items():
                torch.testing.assert_close(together[key], tensor, atol=1e-5, rtol=1e-4, msg=key)


if __name__ == "__main__":
    main()
