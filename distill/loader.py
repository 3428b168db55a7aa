"""From the plan to crops: reads shards, decodes, cuts one or more views of each image, and hands out batches in the plan's order.

Decoding runs in threads (the codecs release the interpreter lock) a bounded number of batches ahead. A bad image is listed and left out
of its batch; the batch keeps its place.

Unit of data: `CropBatch`. Shapes: V views, B images, H W pixels.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock

import numpy as np
import numpy.typing as npt

from distill.crops import CropKey, CropRecipe, crop_image, decode_image
from distill.errors import ConfigError, ImageError
from distill.plan import EpochPlan, Rows
from distill.rejections import RejectionLog
from distill.sources import ImageRecord, Source

UNLABELLED = -1
"""Class id of an image whose source gives none."""


@dataclass(frozen=True)
class CropBatch:
    """One worker's part of one global batch."""

    epoch: int
    step: int
    views: tuple[int, ...]
    rows: Rows
    """int64 [B,2]: (shard, row) of each image."""
    image_ids: list[str]
    crops_VBHWC: npt.NDArray[np.uint8]
    labels_B: npt.NDArray[np.int64]
    """Class ids, `UNLABELLED` where there is none."""


@dataclass(frozen=True)
class LoaderSettings:
    """How batches are cut and how far ahead they are made."""

    seed: int
    global_batch: int
    window_shards: int = 4
    drop_last: bool = True
    shuffle: bool = True
    num_threads: int = 2
    batches_ahead: int = 4


class CropLoader:
    """Batches of crops in the plan's order.

    Args:
        views_of: epoch -> the views cut of each image in that epoch; all of them come from one decode.
        rank, world: which part of every global batch is this worker's.

    Raises:
        ConfigError: a global batch larger than the source (with `drop_last` it would have no batch at all).
    """

    def __init__(
        self,
        source: Source,
        recipe: CropRecipe,
        settings: LoaderSettings,
        views_of: Callable[[int], tuple[int, ...]],
        rejections: RejectionLog,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if settings.drop_last and source.num_images < settings.global_batch:
            raise ConfigError(f"batch {settings.global_batch} is larger than the {source.num_images} images there are; make it smaller")
        self.source = source
        self.recipe = recipe
        self.settings = settings
        self.views_of = views_of
        self.rejections = rejections
        self.rank = rank
        self.world = world
        self._shards = _ShardCache(source, capacity=2 * settings.window_shards)
        self._counted_epoch: int | None = None

    def plan(self, epoch: int) -> EpochPlan:
        """The plan of one epoch."""
        s = self.settings
        sizes = tuple(shard.num_records for shard in self.source.shards)
        return EpochPlan(sizes, s.seed, epoch, s.global_batch, s.window_shards, s.drop_last, s.shuffle)

    def rows_of_shard(self, shard: int) -> Rows:
        """(shard, row) of every record of one shard, in its own order."""
        count = self.source.shards[shard].num_records
        return np.stack([np.full(count, shard), np.arange(count)], axis=1).astype(np.int64)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[CropBatch]:
        """The batches of an epoch from `start_step` on.

        Raises:
            TooManyRejected: the share of bad images is over the limit.
        """
        views = self.views_of(epoch)
        if self._counted_epoch is None:
            self._counted_epoch = epoch  # an image is counted as seen once, not once an epoch
        with ThreadPoolExecutor(self.settings.num_threads, thread_name_prefix="crop") as pool:
            ahead: deque[Future[CropBatch]] = deque()
            try:
                for step, rows in self.plan(epoch).batches(start_step, self.rank, self.world):
                    ahead.append(pool.submit(self._make, epoch, step, views, rows, self._shards.hold(rows)))
                    if len(ahead) > self.settings.batches_ahead:
                        yield self._checked(ahead.popleft().result())
                while ahead:
                    yield self._checked(ahead.popleft().result())
            finally:
                for future in ahead:
                    future.cancel()

    def _checked(self, batch: CropBatch) -> CropBatch:
        self.rejections.check()
        return batch

    def make(self, epoch: int, step: int, views: tuple[int, ...], rows: Rows) -> CropBatch:
        """Decode and crop the images at `rows`; bad ones are listed and left out."""
        return self._make(epoch, step, views, rows, self._shards.hold(rows))

    def _make(self, epoch: int, step: int, views: tuple[int, ...], rows: Rows, shards: dict[int, _Shard]) -> CropBatch:
        crops: list[list[npt.NDArray[np.uint8]]] = []
        kept: list[int] = []
        records: list[ImageRecord] = []
        for position, (shard, row) in enumerate(rows):
            record = shards[int(shard)].records()[int(row)]
            try:
                pixels = decode_image(record.data)
                crops.append([crop_image(pixels, CropKey(self.settings.seed, view, record.image_id), self.recipe) for view in views])
            except ImageError as error:
                self.rejections.reject(record.image_id, error.reason)
                continue
            kept.append(position)
            records.append(record)
        if epoch == self._counted_epoch:
            self.rejections.saw(len(rows))
        size = self.recipe.image_size
        stacked = np.array(crops, dtype=np.uint8).reshape(len(records), len(views), size, size, 3)
        labels = np.array([UNLABELLED if r.label is None else r.label for r in records], dtype=np.int64)
        return CropBatch(epoch, step, views, rows[kept], [r.image_id for r in records], stacked.swapaxes(0, 1), labels)


class _Shard:
    """The records of one shard, read by the first thread that needs them while the others wait."""

    def __init__(self, source: Source, index: int) -> None:
        self._source = source
        self._index = index
        self._lock = Lock()
        self._records: list[ImageRecord] | None = None

    def records(self) -> list[ImageRecord]:
        with self._lock:
            if self._records is None:
                self._records = self._source.read_shard(self._index)
            return self._records


class _ShardCache:
    """The shards of the last few batches handed out. A batch holds its own shards until it is made, so that neither a slow thread nor a
    fast one makes the cache forget a shard which is still needed: each is read once in an epoch, whatever the threads do."""

    def __init__(self, source: Source, capacity: int) -> None:
        self._source = source
        self._capacity = capacity
        self._lock = Lock()
        self._shards: OrderedDict[int, _Shard] = OrderedDict()

    def hold(self, rows: Rows) -> dict[int, _Shard]:
        """The shards of a batch; to be called in the plan's order."""
        with self._lock:
            held = {}
            for index in dict.fromkeys(rows[:, 0].tolist()):
                held[index] = self._shards.setdefault(index, _Shard(self._source, index))
                self._shards.move_to_end(index)
            while len(self._shards) > self._capacity:
                self._shards.popitem(last=False)
            return held
