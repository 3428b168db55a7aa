"""The order of one epoch: which image, in which batch, for which worker. A pure function of (seed, epoch) and the sizes of the shards.

Shards are visited in a shuffled order, a window of them at a time; within a window the records are shuffled. So storage is read shard by
shard, memory holds one window, and the plan of a billion images needs no list of them. A global batch is cut among the workers by position,
so that the same run gives the same batches on 1 or 4 workers.

Unit of data: one batch, an int64 array [n, 2] of (shard, row).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class EpochPlan:
    """The batches of one epoch.

    Args:
        shard_sizes: number of records of every shard.
        seed: seed of the run.
        epoch: which pass, from 0.
        global_batch: images of one optimiser step over all workers.
        window_shards: shards whose records are shuffled together.
        drop_last: leave out a last batch that is not full (other images each epoch).
        shuffle: False keeps the source's own order.
    """

    shard_sizes: tuple[int, ...]
    seed: int
    epoch: int
    global_batch: int
    window_shards: int = 4
    drop_last: bool = True
    shuffle: bool = True

    @property
    def num_images(self) -> int:
        """Images of the whole source."""
        return sum(self.shard_sizes)

    @property
    def num_steps(self) -> int:
        """Batches of the epoch."""
        full, rest = divmod(self.num_images, self.global_batch)
        return full if self.drop_last or rest == 0 else full + 1

    def windows(self) -> list[tuple[int, ...]]:
        """The shards of each window, in the order in which they are visited."""
        order = np.arange(len(self.shard_sizes))
        if self.shuffle:
            order = _generator(self.seed, self.epoch, -1).permutation(order)
        return [tuple(int(i) for i in order[at : at + self.window_shards]) for at in range(0, len(order), self.window_shards)]

    def rows_of(self, window: int, shards: Sequence[int]) -> Rows:
        """(shard, row) of every record of one window, shuffled."""
        parts = [np.stack([np.full(self.shard_sizes[s], s), np.arange(self.shard_sizes[s])], axis=1) for s in shards]
        rows = np.concatenate(parts).astype(np.int64)
        return _generator(self.seed, self.epoch, window).permutation(rows) if self.shuffle else rows

    def batches(self, start_step: int = 0, rank: int = 0, world: int = 1) -> Iterator[tuple[int, Rows]]:
        """(step, rows) from `start_step` on; `rows` is the part of the global batch that falls to worker `rank` of `world`."""
        pending: Rows = np.empty((0, 2), dtype=np.int64)
        step, skip = start_step, start_step * self.global_batch
        for window, shards in enumerate(self.windows()):
            count = sum(self.shard_sizes[s] for s in shards)
            if skip >= count:
                skip -= count
                continue
            pending = np.concatenate([pending, self.rows_of(window, shards)[skip:]])
            skip = 0
            while len(pending) >= self.global_batch:
                yield step, pending[: self.global_batch][rank::world]
                pending, step = pending[self.global_batch :], step + 1
        if len(pending) and not self.drop_last:
            yield step, pending[rank::world]


def _generator(seed: int, epoch: int, window: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch, window + 1])))
