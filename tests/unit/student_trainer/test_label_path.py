"""The way to a label: asked for once, kept, the same for ever; a silent teacher is waited for, a wrong answer never kept."""

from __future__ import annotations

import asyncio
import re
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from distill.errors import FingerprintMismatch, StoreError, TeacherAnswerError, TeacherUnavailable
from distill.loader import CropBatch, CropLoader
from distill.soft_labels import softmax
from student_trainer import label_path
from student_trainer.label_path import LabelPath, LabelRules
from student_trainer.store import SoftLabelStore
from teacher_server.fake import FakeTeacher, fake_logits

RULES = LabelRules(temperature=2.0, temperatures=(1.0, 2.0), max_tv=0.02, patience_s=60)


async def label_all(path: LabelPath, batches: list[CropBatch]) -> list[Any]:
    """(logits, labels asked for) of each batch."""
    labels = [await path.read(batch) for batch in batches]
    return [(found.logits_BK, found.num_asked) for found in labels]


def one_epoch(loader_of: Any) -> list[CropBatch]:
    return list(loader_of(global_batch=4).epoch(0))


def test_asks_once_and_hands_on_the_same_bits_for_ever(store: SoftLabelStore, loader_of: Any, held_by: Any) -> None:
    batches = one_epoch(loader_of)
    teacher = FakeTeacher()
    path = LabelPath(store, teacher, RULES)
    first = asyncio.run(label_all(path, batches))
    assert [asked for _, asked in first] == [4] * 6
    assert sum(teacher.calls) == 24
    unwritten = asyncio.run(label_all(path, batches))  # not committed yet: from memory
    path.commit()
    written = asyncio.run(label_all(path, batches))
    later = asyncio.run(label_all(LabelPath(SoftLabelStore(store.folder, store.identity), teacher, RULES), batches))
    for again in (unwritten, written, later):
        assert [asked for _, asked in again] == [0] * 6
        for (before_BK, _), (now_BK, _) in zip(first, again, strict=True):
            np.testing.assert_array_equal(before_BK, now_BK)
    assert sum(teacher.calls) == path.num_asked == 24
    assert path.num_from_store == 48
    assert set(held_by(store).values()) == {1}
    assert len(held_by(store)) == 24


@pytest.mark.parametrize("temperature", [0.1, 1.0, 2.0])
def test_labels_are_the_teachers_within_max_tv(store: SoftLabelStore, loader_of: Any, temperature: float) -> None:
    rules = LabelRules(temperature, tuple(sorted({*RULES.temperatures, temperature})), RULES.max_tv, patience_s=60)
    for batch, (logits_BK, _) in zip(
        batches := one_epoch(loader_of), asyncio.run(label_all(LabelPath(store, FakeTeacher(), rules), batches)), strict=True
    ):
        true_BK = fake_logits(batch.crops_VBHWC[0], 10)
        tv_B = 0.5 * np.abs(softmax(true_BK, temperature) - softmax(logits_BK, temperature)).sum(axis=1)
        assert tv_B.max() <= RULES.max_tv + 1e-6


def test_asks_only_for_what_is_missing(store: SoftLabelStore, loader_of: Any) -> None:
    batches = one_epoch(loader_of)
    teacher = FakeTeacher()
    path = LabelPath(store, teacher, RULES)
    asyncio.run(label_all(path, batches[::2]))
    path.commit()
    counts = [asked for _, asked in asyncio.run(label_all(path, one_epoch(loader_of)))]
    assert counts == [0, 4, 0, 4, 0, 4]


class Clock:
    """Time that passes only when somebody sleeps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        self.pauses: list[float] = []
        monkeypatch.setattr(label_path, "time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr(label_path, "asyncio", SimpleNamespace(sleep=self.sleep, to_thread=asyncio.to_thread))

    async def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds


def test_waits_for_a_silent_teacher_with_growing_bounded_random_pauses(
    store: SoftLabelStore, loader_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    path = LabelPath(store, FakeTeacher(unavailable_calls=10), RULES)
    batch = one_epoch(loader_of)[0]
    asked = asyncio.run(path.read(batch)).num_asked
    assert asked == 4
    assert path.waiting_since is None
    longest = [min(0.2 * 2**n, 5.0) for n in range(10)]
    assert len(clock.pauses) == 10
    assert all(limit / 2 <= pause <= limit for pause, limit in zip(clock.pauses, longest, strict=True))
    assert len({pause / limit for pause, limit in zip(clock.pauses, longest, strict=True)}) > 5


def test_gives_up_after_its_patience_and_says_the_limit(store: SoftLabelStore, loader_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    path = LabelPath(store, FakeTeacher(unavailable_calls=10_000), RULES)
    with pytest.raises(TeacherUnavailable, match=r"no answer for 6\d s \(limit train.teacher_patience_s=60\): the fake teacher was told"):
        asyncio.run(path.read(one_epoch(loader_of)[0]))
    assert 60 < sum(clock.pauses) <= 65
    assert path.waiting_since == 1000.0


def test_another_teacher_is_refused_before_it_is_asked(store: SoftLabelStore, loader_of: Any, tmp_path: Path) -> None:
    other = SoftLabelStore(tmp_path / "other", store.identity.replace(fingerprint="e" * 64))
    teacher = FakeTeacher()
    with pytest.raises(FingerprintMismatch, match="the teacher that answers is ffffffffffff, the labels wanted are of eeeeeeeeeeee"):
        asyncio.run(LabelPath(other, teacher, RULES).read(one_epoch(loader_of)[0]))
    assert teacher.calls == []


def test_a_teacher_that_changes_while_it_is_asked_never_slips_into_the_store(
    store: SoftLabelStore, loader_of: Any, held_by: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store's own teacher answers who it is; before it answers the crops, another one has taken its place."""
    Clock(monkeypatch)

    class Replaced(FakeTeacher):
        async def info(self) -> Any:
            told = await super().info()
            self._served = self._info = told.replace(version=2, fingerprint="e" * 64)
            return told

    teacher = Replaced()
    path = LabelPath(store, teacher, RULES)
    with pytest.raises(FingerprintMismatch, match="the teacher that answers is eeeeeeeeeeee, the labels wanted are of ffffffffffff"):
        asyncio.run(path.read(one_epoch(loader_of)[0]))
    path.commit()
    assert teacher.calls == []
    assert held_by(store) == {}


def test_a_nan_is_never_kept(store: SoftLabelStore, loader_of: Any, held_by: Any) -> None:
    path = LabelPath(store, FakeTeacher(answer_nan=True), RULES)
    with pytest.raises(TeacherAnswerError, match="NaN"):
        asyncio.run(path.read(one_epoch(loader_of)[0]))
    path.commit()
    assert held_by(store) == {}
    assert path.num_asked == 0


def test_changed_images_are_refused(store: SoftLabelStore, loader_of: Any, source: Any) -> None:
    path = LabelPath(store, FakeTeacher(), RULES)
    asyncio.run(label_all(path, one_epoch(loader_of)))
    path.commit()
    renamed: CropLoader = loader_of(global_batch=4, of=type(source)(prefix="renamed"))
    with pytest.raises(FingerprintMismatch, match=r"has image 'image-.*' where the source has 'renamed-.*choose another store.path"):
        asyncio.run(path.read(next(iter(renamed.epoch(0)))))


def test_a_commit_that_fails_half_way_doubles_nothing_when_it_is_tried_again(
    store: SoftLabelStore, loader_of: Any, held_by: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = LabelPath(store, FakeTeacher(), RULES)
    batches = one_epoch(loader_of)
    asyncio.run(label_all(path, batches))
    real, calls = store.commit, iter(range(100))

    def fail_second(*arguments: Any) -> Any:
        if next(calls) == 1:
            raise StoreError("disk full")
        return real(*arguments)

    monkeypatch.setattr(store, "commit", fail_second)
    with pytest.raises(StoreError):
        path.commit()
    path.commit()  # what leaving the stream does
    assert set(held_by(store).values()) == {1}
    assert len(held_by(store)) == 18  # the shard whose commit failed is the store's to know
    asked = sum(asked for _, asked in asyncio.run(label_all(path, batches)))
    path.commit()
    assert asked == 6
    assert len(held_by(store)) == 24
    assert set(held_by(store).values()) == {1}


def test_what_others_committed_is_seen_after_a_refresh_even_if_it_was_looked_at_before(store: SoftLabelStore, loader_of: Any) -> None:
    batches = one_epoch(loader_of)
    mine = LabelPath(store, FakeTeacher(), RULES)
    other = LabelPath(SoftLabelStore(store.folder, store.identity), FakeTeacher(), RULES)
    asyncio.run(label_all(mine, batches[:1]))  # holds shards as they are now: empty
    asyncio.run(label_all(other, batches[1:]))
    other.commit()
    mine.refresh()
    assert [asked for _, asked in asyncio.run(label_all(mine, batches[1:]))] == [0] * 5


def test_labels_in_memory_are_written_before_they_are_many(
    store: SoftLabelStore, loader_of: Any, held_by: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(label_path, "COMMIT_AT", 8)
    path = LabelPath(store, FakeTeacher(), RULES)

    async def work() -> int:
        await label_all(path, one_epoch(loader_of)[:5])
        assert path._aside is not None
        await asyncio.wait([path._aside])
        written = len(held_by(store))
        await path.close()
        return written

    assert 8 <= asyncio.run(work()) <= 20
    assert len(held_by(store)) == 20
    assert set(held_by(store).values()) == {1}


class SlowDisk:
    """Every commit of a store waits until `go` is set."""

    def __init__(self, store: SoftLabelStore, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go, self.reached = threading.Event(), threading.Event()
        real = store.commit

        def commit(*arguments: Any) -> Any:
            self.reached.set()
            assert self.go.wait(10)
            return real(*arguments)

        monkeypatch.setattr(store, "commit", commit)


def test_while_the_disk_writes_the_teacher_is_asked_and_nothing_twice(
    store: SoftLabelStore, loader_of: Any, held_by: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until as many labels wait again: then the disk is waited for."""
    monkeypatch.setattr(label_path, "COMMIT_AT", 8)
    disk, teacher = SlowDisk(store, monkeypatch), FakeTeacher()
    path = LabelPath(store, teacher, RULES)

    async def work() -> None:
        batches = one_epoch(loader_of)
        await label_all(path, batches[:2])
        await asyncio.to_thread(disk.reached.wait, 10)
        assert (await path.read(batches[0])).num_asked == 0  # on its way to the disk
        rest = asyncio.create_task(label_all(path, batches[2:]))
        done, _ = await asyncio.wait([rest], timeout=0.3)
        assert done == set()
        assert path._num_pending < 8 + 4
        disk.go.set()
        await rest
        await path.close()

    asyncio.run(work())
    assert sum(teacher.calls) == 24
    assert len(held_by(store)) == 24
    assert set(held_by(store).values()) == {1}


def test_a_write_in_the_background_that_fails_stops_the_next_one(
    store: SoftLabelStore, loader_of: Any, held_by: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(label_path, "COMMIT_AT", 8)
    real, calls = store.commit, iter(range(100))

    def fail_first(*arguments: Any) -> Any:
        if next(calls) == 0:
            raise StoreError("disk full")
        return real(*arguments)

    monkeypatch.setattr(store, "commit", fail_first)
    path = LabelPath(store, FakeTeacher(), RULES)
    with pytest.raises(StoreError, match="disk full"):
        asyncio.run(label_all(path, one_epoch(loader_of)))
    path.commit()
    assert set(held_by(store).values()) == {1}


@pytest.mark.parametrize("end", ["commit", "close"])
def test_a_write_in_the_background_that_fails_in_any_way_is_told_at_the_end(
    store: SoftLabelStore, loader_of: Any, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    monkeypatch.setattr(label_path, "COMMIT_AT", 8)

    def fail(*_: Any) -> Any:
        raise ValueError("a file system of its own kind")

    path = LabelPath(store, FakeTeacher(), RULES)

    async def work() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(store, "commit", fail)
            await label_all(path, one_epoch(loader_of)[:2])
            assert path._aside is not None
            await asyncio.wait([path._aside])
        assert path._writing == {}
        assert path._pending == {}
        if end == "close":
            await path.close()
        else:
            path.commit()

    with pytest.raises(StoreError, match=r"cannot be written to .*ValueError: a file system of its own kind") as caught:
        asyncio.run(work())
    assert isinstance(caught.value.__cause__, ValueError)


def test_a_label_answered_twice_counts_once_among_those_that_wait(store: SoftLabelStore, loader_of: Any) -> None:
    """Two questions about the same crops at once: neither finds the other's answer."""
    path, batch = LabelPath(store, FakeTeacher(), RULES), one_epoch(loader_of)[0]

    async def work() -> None:
        await asyncio.gather(path.read(batch), path.read(batch))

    asyncio.run(work())
    assert path.num_asked == 8
    assert path._num_pending == sum(map(len, path._pending.values())) == 4
    path.commit()
    assert path._num_pending == 0


def test_shards_held_in_memory_are_bounded(store: SoftLabelStore, loader_of: Any) -> None:
    rules = LabelRules(temperature=1.0, temperatures=(1.0,), max_tv=0.02, patience_s=1, views_held=2)
    path = LabelPath(store, FakeTeacher(), rules)
    loader = loader_of(num_views=5, global_batch=4)
    for epoch in range(5):
        asyncio.run(label_all(path, list(loader.epoch(epoch))))
        path.commit()
    assert len(path._held) <= 2
    assert path._pending == {}


def test_the_bound_of_each_labels_error_is_the_records_fresh_and_read(store: SoftLabelStore, loader_of: Any) -> None:
    """Measured at T = 2, the job's temperature, against the teacher's own logits; and certified for a reader at a T not foreseen."""
    batches = one_epoch(loader_of)
    path = LabelPath(store, FakeTeacher(), RULES)
    fresh = [asyncio.run(path.read(batch)) for batch in batches]
    in_memory = [asyncio.run(path.read(batch)) for batch in batches]
    path.commit()
    stored = [asyncio.run(path.read(batch)) for batch in batches]
    certified_rules = LabelRules(temperature=3.0, temperatures=(3.0,), max_tv=0.3, patience_s=60)
    certified = [asyncio.run(LabelPath(store, FakeTeacher(), certified_rules).read(batch)) for batch in batches]
    assert {labels.num_asked for labels in in_memory + stored} == {0}
    bounds = np.concatenate([labels.tv_B for labels in fresh])
    assert bounds.dtype == np.float32
    assert 0 < bounds.max() <= RULES.max_tv
    for batch, one, two, three, other in zip(batches, fresh, in_memory, stored, certified, strict=True):
        np.testing.assert_array_equal(one.tv_B, two.tv_B)
        np.testing.assert_array_equal(one.tv_B, three.tv_B)
        true_BK = fake_logits(batch.crops_VBHWC[0], 10)
        for labels, temperature in ((one, 2.0), (other, 3.0)):
            tv_B = 0.5 * np.abs(softmax(true_BK, temperature) - softmax(labels.logits_BK, temperature)).sum(axis=1)
            assert (tv_B <= labels.tv_B + 1e-6).all()


def test_labels_too_rough_for_the_temperature_are_asked_for_again(store: SoftLabelStore, loader_of: Any) -> None:
    batches = one_epoch(loader_of)
    rough = LabelRules(temperature=4.0, temperatures=(4.0,), max_tv=0.3, patience_s=60)
    first = LabelPath(store, FakeTeacher(), rough)
    asyncio.run(label_all(first, batches))
    first.commit()
    fine = LabelRules(temperature=0.5, temperatures=(0.5,), max_tv=0.01, patience_s=60)
    teacher = FakeTeacher()
    again = asyncio.run(label_all(LabelPath(SoftLabelStore(store.folder, store.identity), teacher, fine), batches))
    assert sum(asked for _, asked in again) == sum(teacher.calls) > 0
    for batch, (logits_BK, _) in zip(batches, again, strict=True):
        true_BK = fake_logits(batch.crops_VBHWC[0], 10)
        assert (0.5 * np.abs(softmax(true_BK, 0.5) - softmax(logits_BK, 0.5)).sum(axis=1)).max() <= 0.01 + 1e-6


def test_a_silent_teacher_and_labels_too_rough_are_both_named(
    store: SoftLabelStore, loader_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The labels lie there; but a run that may be wrong by 0.01 at most does not take them, and says what it would need."""
    batches = one_epoch(loader_of)
    first = LabelPath(store, FakeTeacher(), LabelRules(temperature=4.0, temperatures=(4.0,), max_tv=0.3, patience_s=60))
    asyncio.run(label_all(first, batches))
    first.commit()
    Clock(monkeypatch)
    fine = LabelRules(temperature=0.5, temperatures=(0.5,), max_tv=0.01, patience_s=60)
    path = LabelPath(SoftLabelStore(store.folder, store.identity), FakeTeacher(unavailable_calls=10_000), fine)
    told = (
        r"no answer for .*told to be away; (\d) of the (\d) labels wanted are in the store, but only within (\S+) at temperature 0.5"
        r" \(limit store.max_tv=0.01\): bring the teacher back, or allow a larger store.max_tv"
    )
    with pytest.raises(TeacherUnavailable, match=told) as caught:
        asyncio.run(path.read(batches[0]))
    found = re.search(told, str(caught.value))
    assert found is not None
    rough, wanted, bound = found.groups()
    assert 1 <= int(rough) == int(wanted) <= 4
    # With the limit that it names it goes on, and the teacher is not missed.
    enough = LabelRules(temperature=0.5, temperatures=(0.5,), max_tv=float(bound) * 1.05, patience_s=60)
    path = LabelPath(SoftLabelStore(store.folder, store.identity), FakeTeacher(unavailable_calls=10_000), enough)
    assert asyncio.run(path.read(batches[0])).num_asked == 0
