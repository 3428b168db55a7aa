"""From the plan to crops: reads shards, decodes, cuts one or more views of each image, and hands out batches in the plan's order.

Decoding runs in threads (the codecs release the interpreter lock) a bounded number of batches ahead. A bad image is listed and left out
of its batch; the batch keeps its place.

Unit of data: `CropBatch`. Shapes: V views, B images, H W pixels.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain
from threading import Lock

import numpy as np
import numpy.typing as npt

from distill.crops import CropKey, CropRecipe, crop_image, decode_image, random_generator
from distill.errors import ConfigError, ImageError
from distill.mixing import Crop, CropCache, mix, partner_cycle
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

    def take(self, positions: npt.NDArray[np.int64]) -> CropBatch:
        """The batch with only the images at these positions."""
        return replace(
            self,
            rows=self.rows[positions],
            image_ids=[self.image_ids[position] for position in positions],
            crops_VBHWC=self.crops_VBHWC[:, positions],
            labels_B=self.labels_B[positions],
        )


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
    crops_per_decode: int = 1
    """Epochs that are made in one pass over the images, each image decoded once for all of them."""
    mixing_cache_bytes: int = 256 * 2**20
    """Where crops are mixed: memory for plain crops that wait for their second use."""


class CropLoader:
    """Batches of crops in the plan's order.

    With `crops_per_decode` m, epochs p m to p m + m - 1 are one pass over the images. Batch d of the pass is decoded once, and the crops
    that these m epochs want of it are m batches, one after the other: steps m d to m d + m - 1 of the m S steps of the pass. An epoch is S
    of them, as ever. A batch never holds an image twice.

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
        self._sizes = np.fromiter((shard.num_records for shard in source.shards), dtype=np.int64, count=len(source.shards))
        self._steps_per_epoch = self.plan(0).num_steps
        self._plain = CropCache(settings.mixing_cache_bytes if recipe.mixing.mixes else 0)
        self._shards = _ShardCache(source, 2 * settings.window_shards, self._plain)
        self._crops_of_pass: int | None = None
        self._seen = rejections.begin(source)

    def plan(self, epoch: int) -> EpochPlan:
        """The plan of the pass over the images that an epoch belongs to; its own, but for `crops_per_decode`."""
        s = self.settings
        return EpochPlan(self._sizes, s.seed, epoch // s.crops_per_decode, s.global_batch, s.window_shards, s.drop_last, s.shuffle)

    def rows_of_shard(self, shard: int) -> Rows:
        """(shard, row) of every record of one shard, in its own order."""
        count = self.source.shards[shard].num_records
        return np.stack([np.full(count, shard), np.arange(count)], axis=1).astype(np.int64)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[CropBatch]:
        """The batches of an epoch from `start_step` on.

        Raises:
            TooManyRejected: the share of bad images is over the limit.
        """
        if epoch // self.settings.crops_per_decode != self._crops_of_pass:
            # Some crops never have their second use: of images in the last batch that is left out, or whose partner is another worker's.
            self._crops_of_pass = epoch // self.settings.crops_per_decode
            self._plain.clear()
        most_ahead = -(-self.settings.batches_ahead // self.settings.crops_per_decode)
        with ThreadPoolExecutor(self.settings.num_threads, thread_name_prefix="crop") as pool:
            ahead: deque[Future[list[CropBatch]]] = deque()
            try:
                for steps, rows in self._decodes(epoch, start_step):
                    ahead.append(pool.submit(self._make_steps, epoch, steps, rows, self._shards.hold(rows)))
                    if len(ahead) > most_ahead:
                        yield from self._checked(ahead.popleft().result())
                while ahead:
                    yield from self._checked(ahead.popleft().result())
            finally:
                for future in ahead:
                    future.cancel()

    def _decodes(self, epoch: int, start_step: int) -> Iterator[tuple[range, Rows]]:
        """The decode batches of an epoch: which steps of the pass each of them gives to the epoch, and its rows."""
        per_decode = self.settings.crops_per_decode
        begin = epoch % per_decode * self._steps_per_epoch  # of this epoch in the pass
        first, end = begin + start_step, begin + self._steps_per_epoch
        for decode, rows in self.plan(epoch).batches(first // per_decode, self.rank, self.world):
            steps = range(max(first, decode * per_decode), min(end, (decode + 1) * per_decode))
            if not steps:
                return
            yield steps, rows

    def _make_steps(self, epoch: int, steps: range, rows: Rows, shards: dict[int, _Shard]) -> list[CropBatch]:
        """One decode batch as the batches of these steps of the pass."""
        per_decode, pass_ = self.settings.crops_per_decode, epoch // self.settings.crops_per_decode
        views_of_steps = [self.views_of(pass_ * per_decode + step % per_decode) for step in steps]
        whole = self._make(epoch, 0, tuple(chain.from_iterable(views_of_steps)), rows, shards)
        begin, batches, at = epoch % per_decode * self._steps_per_epoch, [], 0
        for step, views in zip(steps, views_of_steps, strict=True):
            crops_VBHWC = whole.crops_VBHWC[at : at + len(views)]
            batches.append(replace(whole, step=step - begin, views=views, crops_VBHWC=crops_VBHWC))
            at += len(views)
        return batches

    def _checked(self, batches: list[CropBatch]) -> list[CropBatch]:
        self.rejections.check()
        return batches

    def make(self, epoch: int, step: int, views: tuple[int, ...], rows: Rows) -> CropBatch:
        """Decode and crop the images at `rows`; bad ones are listed and left out."""
        return self._make(epoch, step, views, rows, self._shards.hold(rows))

    def _make(self, epoch: int, step: int, views: tuple[int, ...], rows: Rows, shards: dict[int, _Shard]) -> CropBatch:
        self.rejections.saw(self._seen, rows)
        size = self.recipe.image_size
        crops_VBHWC = np.empty((len(views), len(rows), size, size, 3), dtype=np.uint8)
        kept: list[int] = []
        records: list[ImageRecord] = []
        for position, (shard, row) in enumerate(rows.tolist()):
            record = shards[shard].records()[row]
            try:
                crops = self._crops(shards[shard], row, views)
            except ImageError as error:
                self.rejections.reject(record.image_id, error.reason)
                continue
            for at, crop in enumerate(crops):
                crops_VBHWC[at, len(kept)] = crop
            kept.append(position)
            records.append(record)
        labels = np.array([UNLABELLED if r.label is None else r.label for r in records], dtype=np.int64)
        return CropBatch(epoch, step, views, rows[kept], [r.image_id for r in records], crops_VBHWC[:, : len(kept)], labels)

    def _crops(self, shard: _Shard, row: int, views: tuple[int, ...]) -> list[Crop]:
        """What teacher and students see of one image in each view.

        Raises:
            ImageError: the image cannot be used.
        """
        plain = self._plain_crops(shard, row, views, views)
        if not self.recipe.mixing.mixes:
            return plain
        return [self._mixed(shard, row, view, crop, views) for view, crop in zip(views, plain, strict=True)]

    def _mixed(self, shard: _Shard, row: int, view: int, own: Crop, views: tuple[int, ...]) -> Crop:
        """`own` mixed with the same view of the next usable image on the shard's cycle; alone in its shard it stays as it is."""
        partners = shard.partners(self.settings.seed, view)
        partner = int(partners[row])
        while partner != row:
            try:
                (crop,) = self._plain_crops(shard, partner, (view,), views)
            except ImageError:  # listed where it is an image of its own
                partner = int(partners[partner])
                continue
            key = CropKey(self.settings.seed, view, shard.records()[row].image_id)
            return mix(own, crop, self.recipe.mixing, random_generator(key, b"distill.mix"))
        return own

    def _plain_crops(self, shard: _Shard, row: int, wanted: tuple[int, ...], views: tuple[int, ...]) -> list[Crop]:
        """The crops of the `wanted` views; where crops are mixed, each of `views` is kept for the uses that it still has."""
        record, mixes = shard.records()[row], self.recipe.mixing.mixes
        held = [self._plain.take(shard.index, row, view) if mixes else None for view in wanted]
        if all(crop is not None for crop in held):
            return [crop for crop in held if crop is not None]
        pixels_HWC = decode_image(record.data)

        def cut(view: int, uses: int) -> Crop:
            crop = crop_image(pixels_HWC, CropKey(self.settings.seed, view, record.image_id), self.recipe)
            if mixes:
                self._plain.put(shard.index, row, view, crop, uses)
            return crop

        for view in views:
            if mixes and view not in wanted and self._plain.has_room():
                cut(view, uses=2)
        return [cut(view, uses=1) if crop is None else crop for view, crop in zip(wanted, held, strict=True)]


class _Shard:
    """The records of one shard, read by the first thread that needs them while the others wait."""

    def __init__(self, source: Source, index: int) -> None:
        self.index = index
        self._source = source
        self._lock = Lock()
        self._records: list[ImageRecord] | None = None
        self._partners: dict[int, npt.NDArray[np.int64]] = {}

    def records(self) -> list[ImageRecord]:
        with self._lock:
            if self._records is None:
                self._records = self._source.read_shard(self.index)
            return self._records

    def partners(self, seed: int, view: int) -> npt.NDArray[np.int64]:
        """int64 [N]: the row that each row is mixed with in this view."""
        if view not in self._partners:
            key = CropKey(seed, view, self._source.shards[self.index].name)
            self._partners[view] = partner_cycle(len(self.records()), random_generator(key, b"distill.partner"))
        return self._partners[view]


class _ShardCache:
    """The shards of the last few batches handed out. A batch holds its own shards until it is made, so that neither a slow thread nor a
    fast one makes the cache forget a shard which is still needed: each is read once in an epoch, whatever the threads do."""

    def __init__(self, source: Source, capacity: int, crops: CropCache) -> None:
        self._source = source
        self._capacity = capacity
        self._crops = crops
        self._lock = Lock()
        self._shards: OrderedDict[int, _Shard] = OrderedDict()

    def hold(self, rows: Rows) -> dict[int, _Shard]:
        """The shards of a batch; to be called in the plan's order."""
        with self._lock:
            held = {}
            for index in dict.fromkeys(rows[:, 0].tolist()):
                held[index] = self._shards.setdefault(index, _Shard(self._source, index))
                self._shards.move_to_end(index)
                self._crops.hold(index)
            while len(self._shards) > self._capacity:
                self._crops.drop(self._shards.popitem(last=False)[0])
            return held
