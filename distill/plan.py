"""The order of one epoch: which image, in which batch, for which worker. A pure function of (seed, epoch) and the sizes of the shards.

Shards are visited in a shuffled order, a window of them at a time; within a window the records are shuffled. So storage is read shard by
shard, memory holds one window, and the plan of a billion images needs no list of them. A global batch is cut among the workers by position,
so that the same run gives the same batches on 1 or 4 workers.

Unit of data: one batch, an int64 array [n, 2] of (shard, row).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class EpochPlan:
    """The batches of one epoch. It costs 16 bytes a shard and one window of rows, however many images the shards hold.

    Args:
        shard_sizes: number of records of every shard; an int64 array is not copied.
        seed: seed of the run.
        epoch: which pass, from 0.
        global_batch: images of one optimiser step over all workers.
        window_shards: shards whose records are shuffled together.
        drop_last: leave out a last batch that is not full (other images each epoch).
        shuffle: False keeps the source's own order.
    """

    shard_sizes: Sequence[int] | npt.NDArray[np.int64]
    seed: int
    epoch: int
    global_batch: int
    window_shards: int = 4
    drop_last: bool = True
    shuffle: bool = True

    @cached_property
    def sizes(self) -> npt.NDArray[np.int64]:
        """`shard_sizes` as an array."""
        return np.asarray(self.shard_sizes, dtype=np.int64)

    @property
    def num_images(self) -> int:
        """Images of the whole source."""
        return int(self.sizes.sum())

    @property
    def num_steps(self) -> int:
        """Batches of the epoch."""
        full, rest = divmod(self.num_images, self.global_batch)
        return full if self.drop_last or rest == 0 else full + 1

    def shard_order(self) -> npt.NDArray[np.int64]:
        """Every shard, in the order in which they are visited, `window_shards` at a time."""
        order = np.arange(len(self.sizes))
        return _generator(self.seed, self.epoch, -1).permutation(order) if self.shuffle else order

    def rows_of(self, window: int, shards: npt.NDArray[np.int64]) -> Rows:
        """(shard, row) of every record of one window, shuffled."""
        parts = [np.stack([np.full(size, shard), np.arange(size)], axis=1) for shard, size in zip(shards, self.sizes[shards], strict=True)]
        rows = np.concatenate(parts).astype(np.int64)
        return _generator(self.seed, self.epoch, window).permutation(rows) if self.shuffle else rows

    def batches(self, start_step: int = 0, rank: int = 0, world: int = 1) -> Iterator[tuple[int, Rows]]:
        """(step, rows) from `start_step` on; `rows` is the part of the global batch that falls to worker `rank` of `world`."""
        order, width, start = self.shard_order(), self.window_shards, start_step * self.global_batch
        ends = np.cumsum(self.sizes[order])[np.minimum(np.arange(0, len(order), width) + width, len(order)) - 1]  # of each window
        first_window = int(np.searchsorted(ends, start, side="right"))
        skip = start - int(ends[first_window - 1]) if first_window else start
        pending: Rows = np.empty((0, 2), dtype=np.int64)
        step = start_step
        for window in range(first_window, len(ends)):
            pending = np.concatenate([pending, self.rows_of(window, order[window * width : (window + 1) * width])[skip:]])
            skip = 0
            while len(pending) >= self.global_batch:
                yield step, pending[: self.global_batch][rank::world]
                pending, step = pending[self.global_batch :], step + 1
        if len(pending) and not self.drop_last:
            yield step, pending[rank::world]


def _generator(seed: int, epoch: int, window: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch, window + 1])))
