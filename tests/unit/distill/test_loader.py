"""Batches of crops: in the plan's order whatever the number of threads, bad images listed and left out, several views from one decode."""

from __future__ import annotations

import io
import itertools
import json
import time
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from distill.crops import CropKey, CropRecipe, crop_image, decode_image, random_generator
from distill.errors import ConfigError, SourceError, TooManyRejected
from distill.loader import UNLABELLED, CropBatch, CropLoader, LoaderSettings
from distill.mixing import MixingRecipe, mix, partner_cycle
from distill.rejections import RejectionLog
from distill.sources import ImageRecord, ShardInfo

SIZE = 12
RECIPE = CropRecipe(kind="random_resized", image_size=SIZE)


def png(seed: int) -> bytes:
    """A noise image, so that no two crops of it are alike."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


class MemorySource:
    """Images in memory; counts how often each shard is read."""

    class_names = ("even", "odd")

    def __init__(self, shard_sizes: tuple[int, ...], broken: frozenset[int] = frozenset(), labelled: bool = True) -> None:
        numbers = itertools.count()
        self._records = [[self._make(next(numbers), broken, labelled) for _ in range(size)] for size in shard_sizes]
        self.shards = tuple(ShardInfo(f"s{index}", len(records)) for index, records in enumerate(self._records))
        self.num_images = sum(shard_sizes)
        self.reads: Counter[int] = Counter()

    @staticmethod
    def _make(number: int, broken: frozenset[int], labelled: bool) -> ImageRecord:
        return ImageRecord(f"{number:04d}", png(number)[: 60 if number in broken else None], number % 2 if labelled else None)

    def read_shard(self, index: int) -> list[ImageRecord]:
        self.reads[index] += 1
        return self._records[index]

    def read_labels(self, index: int) -> list[tuple[str, int | None]]:
        return [(record.image_id, record.label) for record in self._records[index]]

    def digest(self) -> str:
        return "memory"

    def record(self, shard: int, row: int) -> ImageRecord:
        return self._records[shard][row]


@pytest.fixture
def log(tmp_path: Path) -> Iterator[RejectionLog]:
    rejections = RejectionLog(tmp_path / "rejected.jsonl", max_share=1.0)
    yield rejections
    rejections.close()


def loader_of(
    source: MemorySource, log: RejectionLog, views: tuple[int, ...] = (0,), rank: int = 0, world: int = 1, **more: int
) -> CropLoader:
    chosen = LoaderSettings(**{"seed": 5, "global_batch": 4, "window_shards": 2, "drop_last": False, **more})  # type: ignore[arg-type]
    return CropLoader(source, RECIPE, chosen, lambda epoch: views, log, rank, world)


def same(one: CropBatch, other: CropBatch) -> bool:
    return (
        (one.epoch, one.step, one.views, one.image_ids) == (other.epoch, other.step, other.views, other.image_ids)
        and np.array_equal(one.rows, other.rows)
        and np.array_equal(one.crops_VBHWC, other.crops_VBHWC)
        and np.array_equal(one.labels_B, other.labels_B)
    )


class TestBatches:
    def test_each_batch_is_the_plans_rows_cut_by_key(self, log: RejectionLog) -> None:
        source = MemorySource((5, 0, 6, 3))
        loader = loader_of(source, log, views=(2, 7))
        batches = list(loader.epoch(1))
        assert [batch.step for batch in batches] == [0, 1, 2, 3]
        for batch, (_, rows) in zip(batches, loader.plan(1).batches(), strict=True):
            np.testing.assert_array_equal(batch.rows, rows)
            records = [source.record(shard, row) for shard, row in rows]
            assert batch.image_ids == [record.image_id for record in records]
            assert batch.labels_B.tolist() == [record.label for record in records]
            assert batch.crops_VBHWC.dtype == np.uint8
            assert batch.crops_VBHWC.shape == (2, len(rows), SIZE, SIZE, 3)
            for v, view in enumerate((2, 7)):
                for b, record in enumerate(records):
                    expected = crop_image(decode_image(record.data), CropKey(5, view, record.image_id), RECIPE)
                    np.testing.assert_array_equal(batch.crops_VBHWC[v, b], expected)

    def test_threads_change_nothing(self, log: RejectionLog) -> None:
        source = MemorySource((5, 6, 3, 9), broken=frozenset({4, 11}))
        runs = [
            list(loader_of(source, log, (0, 1), num_threads=threads, batches_ahead=ahead).epoch(0))
            for threads, ahead in ((1, 0), (4, 1), (4, 9))
        ]
        assert len(runs[0]) == 6
        for run in runs[1:]:
            assert all(same(one, other) for one, other in zip(runs[0], run, strict=True))

    def test_views_of_one_decode_differ(self, log: RejectionLog, monkeypatch: pytest.MonkeyPatch) -> None:
        decoded = []

        def counting(data: bytes) -> npt.NDArray[np.uint8]:
            decoded.append(data)
            return decode_image(data)

        monkeypatch.setattr("distill.loader.decode_image", counting)
        for batch in loader_of(MemorySource((8,)), log, (0, 1)).epoch(0):
            for first, second in zip(*batch.crops_VBHWC, strict=True):
                assert not np.array_equal(first, second)
        assert len(decoded) == 8

    def test_start_step_and_workers_follow_the_plan(self, log: RejectionLog) -> None:
        source = MemorySource((5, 6, 3))
        whole = list(loader_of(source, log).epoch(3))
        rest = list(loader_of(source, log).epoch(3, start_step=2))
        assert all(same(one, other) for one, other in zip(rest, whole[2:], strict=True))
        for rank in range(2):
            part = list(loader_of(source, log, rank=rank, world=2).epoch(3))
            for mine, all_of_it in zip(part, whole, strict=True):
                assert mine.image_ids == all_of_it.image_ids[rank::2]
                np.testing.assert_array_equal(mine.crops_VBHWC, all_of_it.crops_VBHWC[:, rank::2])

    def test_no_label_is_minus_one(self, log: RejectionLog) -> None:
        batch = next(loader_of(MemorySource((4,), labelled=False), log).epoch(0))
        assert batch.labels_B.tolist() == [UNLABELLED] * 4 == [-1] * 4

    def test_rows_of_a_shard(self, log: RejectionLog) -> None:
        assert loader_of(MemorySource((2, 3)), log).rows_of_shard(1).tolist() == [[1, 0], [1, 1], [1, 2]]

    def test_views_are_the_epochs(self, log: RejectionLog) -> None:
        source = MemorySource((4,))
        loader = CropLoader(source, RECIPE, LoaderSettings(0, 4), lambda epoch: (2 * epoch, 2 * epoch + 1), log)
        assert [next(loader.epoch(epoch)).views for epoch in range(3)] == [(0, 1), (2, 3), (4, 5)]


Pixels = dict[tuple[int, int, int], bytes]


def pixels_by_key(batches: Iterable[CropBatch]) -> Pixels:
    """(view, shard, row) -> the crop's bytes; nothing may come twice."""
    found: Pixels = {}
    for batch in batches:
        for v, view in enumerate(batch.views):
            for b, (shard, row) in enumerate(batch.rows.tolist()):
                assert (view, shard, row) not in found
                found[view, shard, row] = batch.crops_VBHWC[v, b].tobytes()
    return found


def stepwise(
    source: MemorySource,
    log: RejectionLog,
    crops_per_decode: int,
    mixing: MixingRecipe | None = None,
    rank: int = 0,
    world: int = 1,
    **more: int,
) -> CropLoader:
    """A loader as the student trainer uses it: epoch e trains on view e."""
    recipe = RECIPE.replace(mixing=mixing) if mixing else RECIPE
    chosen = {"seed": 5, "global_batch": 4, "window_shards": 2, "drop_last": True, "crops_per_decode": crops_per_decode, **more}
    return CropLoader(source, recipe, LoaderSettings(**chosen), lambda epoch: (epoch,), log, rank, world)  # type: ignore[arg-type]


def count_decodes(monkeypatch: pytest.MonkeyPatch) -> Counter[bytes]:
    decoded: Counter[bytes] = Counter()

    def counting(data: bytes) -> npt.NDArray[np.uint8]:
        decoded[data] += 1
        return decode_image(data)

    monkeypatch.setattr("distill.loader.decode_image", counting)
    return decoded


class TestSeveralCropsOfOneDecode:
    """14 images in batches of 4 are 3 steps an epoch."""

    SIZES = (5, 6, 3)

    def epochs(self, log: RejectionLog, per_decode: int, num_epochs: int, **more: int) -> list[list[CropBatch]]:
        loader = stepwise(MemorySource(self.SIZES), log, per_decode, **more)
        return [list(loader.epoch(epoch)) for epoch in range(num_epochs)]

    @pytest.mark.parametrize("per_decode", [2, 3, 4])
    def test_a_pass_gives_the_batches_of_its_epochs_decode_by_decode(self, log: RejectionLog, per_decode: int) -> None:
        """Decode batch d of pass p is batch d of the plan of p; its crops are steps m d to m d + m - 1, in the views of the m epochs."""
        found = self.epochs(log, per_decode, 2 * per_decode)
        assert [[batch.step for batch in epoch] for epoch in found] == [[0, 1, 2]] * (2 * per_decode)
        assert [batch.epoch for epoch in found for batch in epoch] == [e for e in range(2 * per_decode) for _ in range(3)]
        source = MemorySource(self.SIZES)
        for pass_ in range(2):
            plain = stepwise(source, log, 1)
            batches = list(itertools.chain(*found[pass_ * per_decode : (pass_ + 1) * per_decode]))
            for at, batch in enumerate(batches):
                decode, which = divmod(at, per_decode)
                rows = list(plain.plan(pass_).batches())[decode][1]
                view = pass_ * per_decode + which
                np.testing.assert_array_equal(batch.rows, rows)
                assert batch.views == (view,)
                for crop, (shard, row) in zip(batch.crops_VBHWC[0], rows.tolist(), strict=True):
                    record = source.record(shard, row)
                    expected = crop_image(decode_image(record.data), CropKey(5, view, record.image_id), RECIPE)
                    np.testing.assert_array_equal(crop, expected)

    @pytest.mark.parametrize("per_decode", [2, 3, 4])
    def test_as_many_images_and_no_batch_holds_one_twice(self, log: RejectionLog, per_decode: int) -> None:
        found = list(itertools.chain(*self.epochs(log, per_decode, 2 * per_decode)))
        assert len(pixels_by_key(found)) == 2 * per_decode * 12
        assert all(len(set(batch.image_ids)) == 4 for batch in found)

    @pytest.mark.parametrize("per_decode", [2, 3, 4])
    def test_resume_at_every_step(self, log: RejectionLog, per_decode: int) -> None:
        whole = self.epochs(log, per_decode, 2 * per_decode)
        for epoch, batches in enumerate(whole):
            for step in range(4):
                rest = list(stepwise(MemorySource(self.SIZES), log, per_decode).epoch(epoch, step))
                assert len(rest) == 3 - step
                assert all(same(one, other) for one, other in zip(rest, batches[step:], strict=True))

    @pytest.mark.parametrize("world", [2, 4])
    def test_workers_cut_the_same_batches(self, log: RejectionLog, world: int) -> None:
        whole = self.epochs(log, 2, 4)
        for rank in range(world):
            loader = stepwise(MemorySource(self.SIZES), log, 2, rank=rank, world=world)
            for epoch, batches in enumerate(whole):
                for mine, all_of_it in zip(loader.epoch(epoch), batches, strict=True):
                    assert mine.image_ids == all_of_it.image_ids[rank::world]
                    np.testing.assert_array_equal(mine.crops_VBHWC, all_of_it.crops_VBHWC[:, rank::world])

    def test_each_image_is_decoded_once_a_pass(self, log: RejectionLog, monkeypatch: pytest.MonkeyPatch) -> None:
        decoded = count_decodes(monkeypatch)
        loader = stepwise(MemorySource((8,)), log, 4, drop_last=False)  # 2 steps an epoch: no decode batch lies across the end of one
        for epoch in range(4):
            list(loader.epoch(epoch))
        assert set(decoded.values()) == {2}  # 2 steps of 4 lie in an epoch: each decode batch gives two epochs of two crops

    def test_counted_once_not_once_an_epoch(self, log: RejectionLog) -> None:
        loader = stepwise(MemorySource((8,), frozenset({3})), log, 4, drop_last=False)
        for epoch in range(8):
            list(loader.epoch(epoch))
        assert (log.num_seen, log.num_rejected) == (8, 1)


BOTH = MixingRecipe(kind="both")


class TestMixing:
    SIZES = (7, 1, 9, 6)
    BROKEN = frozenset({2, 3, 9, 12, 13, 14})

    def expected(self, source: MemorySource, views: range, broken: frozenset[int] = frozenset()) -> Pixels:
        """An oracle without loader, batches or cache: every usable image mixed with the next usable one on its shard's cycle."""
        found: Pixels = {}
        for view, (shard, size) in itertools.product(views, enumerate(self.SIZES)):
            cycle = partner_cycle(size, random_generator(CropKey(5, view, f"s{shard}"), b"distill.partner"))
            plain = {}
            for row in range(size):
                record = source.record(shard, row)
                if int(record.image_id) not in broken:
                    plain[row] = crop_image(decode_image(record.data), CropKey(5, view, record.image_id), RECIPE)
            for row, own in plain.items():
                partner = next((at for at in follow(cycle, row) if at in plain), row)
                draws = random_generator(CropKey(5, view, source.record(shard, row).image_id), b"distill.mix")
                crop = own if partner == row else mix(own, plain[partner], BOTH, draws)
                found[view, shard, row] = crop.tobytes()
        return found

    @pytest.mark.parametrize("broken", [frozenset[int](), BROKEN], ids=["all usable", "some bad"])
    @pytest.mark.parametrize(
        "more",
        [{}, {"num_threads": 4}, {"mixing_cache_bytes": 0}, {"mixing_cache_bytes": 2000}, {"global_batch": 9}],
        ids=["plain", "threads", "no cache", "small cache", "other batch"],
    )
    @pytest.mark.parametrize("per_decode", [1, 2])
    def test_pixels_depend_on_the_key_and_the_shard_alone(
        self, log: RejectionLog, per_decode: int, more: dict[str, int], broken: frozenset[int]
    ) -> None:
        source = MemorySource(self.SIZES, broken)
        expected = self.expected(source, range(2), broken)
        loader = stepwise(source, log, per_decode, BOTH, drop_last=False, **more)
        assert pixels_by_key(itertools.chain(*(loader.epoch(epoch) for epoch in range(2)))) == expected
        for world in (2, 4):
            parts: Pixels = {}
            for rank in range(world):
                loader = stepwise(source, log, per_decode, BOTH, rank, world, drop_last=False, **more)
                part = pixels_by_key(itertools.chain(*(loader.epoch(epoch) for epoch in range(2))))
                assert not parts.keys() & part.keys()
                parts |= part
            assert parts == expected

    def test_a_shard_labelled_by_itself_has_the_same_pixels(self, log: RejectionLog) -> None:
        """The way of `distill label`: one (view, shard) after the other, in its own order."""
        source = MemorySource(self.SIZES, self.BROKEN)
        loader = stepwise(source, log, 1, BOTH)
        parts = [loader.make(view, 0, (view,), loader.rows_of_shard(shard)) for view in range(2) for shard in range(4)]
        assert pixels_by_key(parts) == self.expected(source, range(2), self.BROKEN)

    def test_mixed_crops_are_no_plain_ones(self, log: RejectionLog) -> None:
        source = MemorySource((12,))
        mixed, plain = (pixels_by_key(stepwise(source, log, 1, mixing, drop_last=False).epoch(0)) for mixing in (BOTH, None))
        assert mixed.keys() == plain.keys()
        assert sum(mixed[key] != plain[key] for key in mixed) > 6

    @pytest.mark.parametrize(("cache", "decodes"), [(10**9, 1), (0, 2)])
    def test_the_cache_saves_the_second_decode(self, log: RejectionLog, monkeypatch: pytest.MonkeyPatch, cache: int, decodes: int) -> None:
        decoded = count_decodes(monkeypatch)
        loader = stepwise(MemorySource((8, 8, 8)), log, 1, BOTH, num_threads=1, drop_last=False, mixing_cache_bytes=cache)
        list(loader.epoch(0))
        assert set(decoded.values()) == {decodes}
        assert loader._plain.num_bytes == 0  # every crop has had both its uses

    @pytest.mark.parametrize(("world", "sizes"), [(1, (12, 12, 12)), (2, (12, 12, 12, 12))], ids=["dropped rest", "two workers"])
    def test_crops_never_used_again_do_not_fill_the_cache(
        self, log: RejectionLog, monkeypatch: pytest.MonkeyPatch, world: int, sizes: tuple[int, ...]
    ) -> None:
        decoded = count_decodes(monkeypatch)
        cache = 24 * SIZE * SIZE * 3
        more = {"global_batch": 8, "window_shards": 2, "num_threads": 1, "mixing_cache_bytes": cache}
        loader = stepwise(MemorySource(sizes), log, 1, BOTH, 0, world, **more)
        each = []
        for epoch in range(6):
            before = decoded.total()
            num_images = sum(len(batch.image_ids) for batch in loader.epoch(epoch))
            each.append((decoded.total() - before) / num_images)
        assert max(each[1:]) <= 1.15 * each[0], each

    def test_one_decode_for_all_crops_of_a_pass(self, log: RejectionLog, monkeypatch: pytest.MonkeyPatch) -> None:
        decoded = count_decodes(monkeypatch)
        loader = stepwise(MemorySource((8,)), log, 2, BOTH, num_threads=1, drop_last=False, global_batch=8, mixing_cache_bytes=10**9)
        loader._make_steps(0, range(2), loader.rows_of_shard(0), loader._shards.hold(loader.rows_of_shard(0)))
        assert set(decoded.values()) == {1}
        assert loader._plain.num_bytes == 0


def follow(cycle: npt.NDArray[np.int64], row: int) -> Iterator[int]:
    at = int(cycle[row])
    while at != row:
        yield at
        at = int(cycle[at])


class TestBadImages:
    def test_left_out_and_listed_the_rest_keeps_its_place(self, log: RejectionLog) -> None:
        broken = frozenset({1, 6, 7})
        clean = list(loader_of(MemorySource((6, 6)), log).epoch(0))
        found = list(loader_of(MemorySource((6, 6), broken), log).epoch(0))
        bad_ids = {f"{n:04d}" for n in broken}
        for batch, complete in zip(found, clean, strict=True):
            kept = [b for b, image_id in enumerate(complete.image_ids) if image_id not in bad_ids]
            assert batch.step == complete.step
            assert batch.image_ids == [complete.image_ids[b] for b in kept]
            np.testing.assert_array_equal(batch.rows, complete.rows[kept])
            np.testing.assert_array_equal(batch.crops_VBHWC, complete.crops_VBHWC[:, kept])
            assert batch.labels_B.tolist() == complete.labels_B[kept].tolist()
        listed = [json.loads(line) for line in log.path.read_text().splitlines()]
        assert {entry["image_id"] for entry in listed} == bad_ids
        assert all(entry["reason"] for entry in listed)

    def test_a_batch_of_bad_images_only(self, log: RejectionLog) -> None:
        batches = list(loader_of(MemorySource((4,), frozenset(range(4))), log, (0, 1)).epoch(0))
        assert [batch.crops_VBHWC.shape for batch in batches] == [(2, 0, SIZE, SIZE, 3)]
        assert batches[0].rows.shape == (0, 2)
        assert batches[0].image_ids == []

    def test_counted_once_not_once_an_epoch(self, log: RejectionLog) -> None:
        loader = loader_of(MemorySource((10,), frozenset({3})), log)
        for epoch in range(3):
            assert len(list(loader.epoch(epoch))) == 3
        assert (log.num_seen, log.num_rejected) == (10, 1)

    @pytest.mark.parametrize(("world", "start"), [(1, (0, 0)), (4, (0, 0)), (1, (3, 11))])
    def test_bad_images_below_the_limit_stop_no_worker_and_no_resumed_job(self, tmp_path: Path, world: int, start: tuple[int, int]) -> None:
        """3 of 100 are bad, 3 % allowed: a part of the images that was counted once would grow beyond it epoch by epoch."""
        log = RejectionLog(tmp_path / "rejected.jsonl", max_share=0.03, min_seen=1)
        loader = loader_of(MemorySource((50, 50), frozenset({7, 60, 98})), log, world=world, global_batch=8)
        first, step = start
        for epoch in range(first, first + 24):
            list(loader.epoch(epoch, step if epoch == first else 0))
        log.close()
        assert log.num_rejected == 3
        assert 95 < log.num_seen <= 100

    def test_too_many_stop_the_job(self, tmp_path: Path) -> None:
        log = RejectionLog(tmp_path / "rejected.jsonl", max_share=0.1, min_seen=8)
        loader = loader_of(MemorySource((40,), frozenset(range(0, 40, 2))), log)
        with pytest.raises(TooManyRejected, match=r"over the limit of 10\.00%") as caught:
            list(loader.epoch(0))
        assert str(log.path) in str(caught.value)
        with pytest.raises(TooManyRejected):
            log.close()

    def test_within_the_limit_it_goes_on(self, tmp_path: Path) -> None:
        with RejectionLog(tmp_path / "rejected.jsonl", max_share=0.1, min_seen=8) as log:
            batches = list(loader_of(MemorySource((40,), frozenset({1, 2})), log).epoch(0))
        assert sum(len(batch.image_ids) for batch in batches) == 38


class TestLimits:
    def test_batch_larger_than_the_source_names_both(self, log: RejectionLog) -> None:
        with pytest.raises(ConfigError, match="batch 12 is larger than the 11 images there are"):
            loader_of(MemorySource((5, 6)), log, global_batch=12, drop_last=True)

    def test_evaluation_may_have_less_than_a_batch(self, log: RejectionLog) -> None:
        assert [len(batch.image_ids) for batch in loader_of(MemorySource((3,)), log, global_batch=256).epoch(0)] == [3]

    def test_each_shard_is_read_once_an_epoch(self, log: RejectionLog, monkeypatch: pytest.MonkeyPatch) -> None:
        """Also where one thread is held up in every batch while the others run ahead into the next window."""
        source = MemorySource((8,) * 12)
        held_up = {source.record(shard, 0).data for shard in range(0, 12, 2)}

        def slow_for_some(data: bytes) -> npt.NDArray[np.uint8]:
            time.sleep(0.03 if data in held_up else 0)
            return decode_image(data)

        monkeypatch.setattr("distill.loader.decode_image", slow_for_some)
        list(loader_of(source, log, window_shards=2, num_threads=3).epoch(0))
        assert set(source.reads.values()) == {1}

    def test_bounded_ahead(self, log: RejectionLog) -> None:
        """With nobody taking batches, no more are made than may lie ahead."""
        source = MemorySource((4,) * 40)
        batches = loader_of(source, log, window_shards=1, num_threads=2, batches_ahead=3).epoch(0)
        assert isinstance(batches, Generator)
        next(batches)
        batches.close()  # waits for the threads
        assert 1 <= sum(source.reads.values()) <= 4

    def test_an_unreadable_shard_reaches_the_caller(self, log: RejectionLog) -> None:
        class Gone(MemorySource):
            def read_shard(self, index: int) -> list[ImageRecord]:
                raise SourceError("shard s0 is gone")

        with pytest.raises(SourceError, match="shard s0 is gone"):
            list(loader_of(Gone((8,)), log, num_threads=3).epoch(0))
