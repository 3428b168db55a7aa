"""The labelled images that are drawn beside the others where alpha is below 1: batch after batch without end, pass after pass.

There may be so few that a pass is one step, so batches are made ahead across the ends of passes. Which batch step s of the run gets is a
function of s alone, so a run that was cut off goes on with the very next one.

Unit of data: one `CropBatch`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from distill.loader import CropBatch, CropLoader
from distill.plan import Rows


def labelled_batches(loader: CropLoader, first_step: int) -> Generator[CropBatch]:
    """This worker's batches from step `first_step` of the run on; with n batches a pass, step s is batch s mod n of pass s div n.

    Close it (`contextlib.closing`): it owns threads.

    Raises:
        TooManyRejected: the share of bad images is over the limit.
    """
    with ThreadPoolExecutor(loader.settings.num_threads, thread_name_prefix="crop") as pool:
        ahead: deque[Future[CropBatch]] = deque()
        try:
            for epoch, step, rows in _plans(loader, first_step):
                ahead.append(pool.submit(loader.make, epoch, step, loader.views_of(epoch), rows))
                if len(ahead) > loader.settings.batches_ahead:
                    batch = ahead.popleft().result()
                    loader.rejections.check()
                    yield batch
        finally:
            for future in ahead:
                future.cancel()


def _plans(loader: CropLoader, first_step: int) -> Iterator[tuple[int, int, Rows]]:
    """(pass, step in it, rows) without end."""
    epoch, start = divmod(first_step, loader.plan(0).num_steps)
    while True:
        for step, rows in loader.plan(epoch).batches(start, loader.rank, loader.world):
            yield epoch, step, rows
        epoch, start = epoch + 1, 0
