"""What the tests of the student trainer share: a few images in memory, a loader over them, a store, a look at what a store really holds.

Unit of data: one source of 24 noise images in 4 shards of 6. `FakeTeacher` (10 classes, 8 x 8 crops) is the teacher.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from distill.config import digest_of
from distill.crops import CropRecipe
from distill.loader import CropLoader, LoaderSettings
from distill.rejections import RejectionLog
from distill.sources import ImageRecord, ShardInfo
from student_trainer.store import SoftLabelStore, StoreIdentity

RECIPE = CropRecipe(image_size=8)
Key = tuple[int, int, int]


@dataclass(frozen=True)
class MemorySource:
    """A `Source` of 10 x 10 noise; `prefix` names the images."""

    sizes: tuple[int, ...] = (6, 6, 6, 6)
    prefix: str = "image"
    class_names: tuple[str, ...] | None = None

    @property
    def shards(self) -> tuple[ShardInfo, ...]:
        return tuple(ShardInfo(f"shard-{number}", size) for number, size in enumerate(self.sizes))

    @property
    def num_images(self) -> int:
        return sum(self.sizes)

    def read_shard(self, index: int) -> list[ImageRecord]:
        return [ImageRecord(f"{self.prefix}-{index}-{row}", _png(100 * index + row), None) for row in range(self.sizes[index])]

    def read_labels(self, index: int) -> list[tuple[str, int | None]]:
        return [(record.image_id, None) for record in self.read_shard(index)]

    def digest(self) -> str:
        return digest_of([self.sizes, self.prefix])


def _png(seed: int) -> bytes:
    file = io.BytesIO()
    random = np.random.default_rng(seed)
    # A grey of its own under the noise: the fake teacher looks at the mean.
    pixels = np.clip(random.integers(0, 256) + random.normal(0, 20, (10, 10, 3)), 0, 255)
    Image.fromarray(pixels.astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def source() -> MemorySource:
    return MemorySource()


@pytest.fixture
def identity(source: MemorySource) -> StoreIdentity:
    return StoreIdentity(fingerprint="f" * 64, num_classes=10, recipe=RECIPE, seed=0, images=source.digest())


@pytest.fixture
def store(tmp_path: Path, identity: StoreIdentity) -> SoftLabelStore:
    return SoftLabelStore(tmp_path / "store", identity)


LoaderOf = Callable[..., CropLoader]


@pytest.fixture
def loader_of(tmp_path: Path, source: MemorySource) -> LoaderOf:
    """A loader of batches of `global_batch` images; epoch e cuts view e mod `num_views`."""

    def make(*, num_views: int = 1, global_batch: int = 2, rank: int = 0, world: int = 1, of: MemorySource = source) -> CropLoader:
        settings = LoaderSettings(seed=0, global_batch=global_batch, window_shards=2)
        log = RejectionLog(tmp_path / "rejected.jsonl", 0.0)
        return CropLoader(of, RECIPE, settings, lambda epoch: (epoch % num_views,), log, rank, world)

    return make


HeldBy = Callable[[SoftLabelStore], Counter[Key]]


@pytest.fixture
def held_by() -> HeldBy:
    """How often a store holds each (view, shard, row), counted by a reader of its own over all segments of the manifest."""

    def count(store: SoftLabelStore) -> Counter[Key]:
        fresh = SoftLabelStore(store.folder, store.identity)
        found: Counter[Key] = Counter()
        for segment in fresh.segments:
            rows = pq.read_table(store.folder / segment.file)["row"].to_pylist()
            assert len(rows) == segment.num_labels
            found.update((segment.view, segment.shard, row) for row in rows)
        return found

    return count
