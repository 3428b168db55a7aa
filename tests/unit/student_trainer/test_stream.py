"""The stream: the plan's order whatever the answers' order, errors at their batch, no thread left behind, nothing asked for twice."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from distill.config import validate
from distill.crops import CropRecipe
from distill.errors import ConfigError, RequestRefused, StageMissing, StoreError
from distill.loader import CropBatch, CropLoader, LoaderSettings
from distill.mixing import MixingRecipe
from distill.rejections import RejectionLog
from distill.soft_labels import softmax
from student_trainer import stream as stream_module
from student_trainer.label_path import LabelRules
from student_trainer.settings import DistillSettings
from student_trainer.store import ShardLabels, SoftLabelStore, StoreIdentity
from student_trainer.stream import LabelledBatch, LabelledStream
from student_trainer.waits import Waits
from teacher_server.backend import Crops, Floats
from teacher_server.fake import FakeTeacher, fake_logits

RULES = LabelRules(temperature=1.0, temperatures=(1.0,), max_tv=0.02, patience_s=60)


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())  # another test's library may keep one for the life of the process
    yield
    names = [thread.name for thread in threading.enumerate() if thread not in before]
    assert [name for name in names if name in ("labels", "feeder") or name.startswith(("crop", "asyncio"))] == []


def reopened(store: SoftLabelStore) -> SoftLabelStore:
    return SoftLabelStore(store.folder, store.identity)


class ReversingTeacher(FakeTeacher):
    """Answers every `size` questions in the reverse of their order."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.answered: list[int] = []
        self._turns: list[asyncio.Event] = []

    async def _infer(self, crops_BHWC: Crops, temperature_B1: Floats, names: tuple[str, ...]) -> dict[str, Floats]:
        number = len(self._turns)
        self._turns.append(asyncio.Event())
        if len(self._turns) % self.size == 0:
            self._turns[number].set()
        await self._turns[number].wait()
        self.answered.append(number)
        if number % self.size:
            self._turns[number - 1].set()
        return await super()._infer(crops_BHWC, temperature_B1, names)


def steps(batches: list[LabelledBatch]) -> list[int]:
    return [batch.crops.step for batch in batches]


def test_batches_keep_the_plans_order_though_answers_come_reversed(store: SoftLabelStore, loader_of: Any, held_by: Any) -> None:
    teacher = ReversingTeacher(4)
    with LabelledStream(loader_of(), store, lambda: teacher, RULES, in_flight=4) as stream:
        batches = list(stream.epoch(0))
    assert steps(batches) == list(range(12))
    assert teacher.answered == [3, 2, 1, 0, 7, 6, 5, 4, 11, 10, 9, 8]
    for batch, crops in zip(batches, loader_of().epoch(0), strict=True):
        assert batch.crops.image_ids == crops.image_ids
        assert batch.logits_BK is not None
        true_BK = fake_logits(crops.crops_VBHWC[0], 10)
        assert (batch.logits_BK.argmax(axis=1) == true_BK.argmax(axis=1)).all()
        assert batch.num_asked == 2
    assert len(held_by(store)) == 24
    assert set(held_by(store).values()) == {1}
    assert teacher.closed


class GatedTeacher(FakeTeacher):
    """Answers only after `gate` is opened; counts how many questions wait."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = asyncio.Event()
        self.waiting = 0
        self.most = 0

    async def _infer(self, crops_BHWC: Crops, temperature_B1: Floats, names: tuple[str, ...]) -> dict[str, Floats]:
        self.waiting += 1
        self.most = max(self.most, self.waiting)
        try:
            await self.gate.wait()
            return await super()._infer(crops_BHWC, temperature_B1, names)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.waiting -= 1


def test_no_more_than_in_flight_wait_for_the_teacher(store: SoftLabelStore, loader_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The feeder says that its queue is full; only then the teacher answers, and it never saw more than allowed."""
    teacher = GatedTeacher()
    loop: list[asyncio.AbstractEventLoop] = []

    class TellingQueue(queue.Queue[Any]):
        def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
            if self.full():
                loop[0].call_soon_threadsafe(teacher.gate.set)
            super().put(item, block, timeout)

    monkeypatch.setattr(queue, "Queue", TellingQueue)
    with LabelledStream(loader_of(), store, lambda: teacher, RULES, in_flight=3) as stream:
        loop.append(stream._loop)
        assert steps(list(stream.epoch(0))) == list(range(12))
    assert teacher.most == 3


class FailingTeacher(FakeTeacher):
    """From question number `at` (from 0) on, every one is refused."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    async def _infer(self, crops_BHWC: Crops, temperature_B1: Floats, names: tuple[str, ...]) -> dict[str, Floats]:
        if len(self.calls) >= self.at:
            raise RequestRefused("crops of another size are wanted")
        return await super()._infer(crops_BHWC, temperature_B1, names)


def test_an_error_comes_at_its_batch_and_what_was_answered_is_kept(store: SoftLabelStore, loader_of: Any, held_by: Any) -> None:
    with LabelledStream(loader_of(), store, lambda: FailingTeacher(5), RULES, in_flight=3) as stream:
        batches = stream.epoch(0)
        assert [next(batches).crops.step for _ in range(5)] == [0, 1, 2, 3, 4]
        with pytest.raises(RequestRefused, match="of another size"):
            next(batches)
    assert len(held_by(store)) >= 10
    assert set(held_by(store).values()) == {1}


def test_an_error_of_the_loader_comes_after_the_batches_before_it(store: SoftLabelStore, loader_of: Any) -> None:
    loader = loader_of()
    real = loader.epoch

    def broken(epoch: int, start_step: int = 0) -> Iterator[CropBatch]:
        for batch in real(epoch, start_step):
            if batch.step == 3:
                raise StoreError("stands for a shard that is gone")
            yield batch

    loader.epoch = broken
    with LabelledStream(loader, store, FakeTeacher, RULES, in_flight=2) as stream:
        batches = stream.epoch(0)
        assert [next(batches).crops.step for _ in range(3)] == [0, 1, 2]
        with pytest.raises(StoreError, match="gone"):
            next(batches)


@pytest.mark.parametrize("held", [False, True], ids=["dropped", "still held"])
def test_leaving_early_keeps_the_answers_and_no_thread(store: SoftLabelStore, loader_of: Any, held_by: Any, held: bool) -> None:
    with LabelledStream(loader_of(), store, FakeTeacher, RULES, in_flight=2) as stream:
        batches = stream.epoch(0)
        first = [next(batches) for _ in range(3)]
        if not held:
            del batches
    counts = held_by(store)
    assert len(counts) >= 6
    assert set(counts.values()) == {1}
    assert {(0, int(shard), int(row)) for batch in first for shard, row in batch.crops.rows} <= set(counts)


def test_leaving_while_the_teacher_thinks_gives_its_questions_up(store: SoftLabelStore, loader_of: Any, held_by: Any) -> None:
    """Ctrl-C reaches the training loop while it waits: its batch is in nobody's queue any more, and must be given up all the same."""
    teacher = GatedTeacher()
    with LabelledStream(loader_of(), store, lambda: teacher, RULES, in_flight=2) as stream:
        loop, asked = stream._loop, threading.Event()
        loop.call_soon_threadsafe(_tell_when, lambda: teacher.waiting == 2, asked, loop)
        given_up: list[BaseException] = []
        reader = threading.Thread(target=_read_one, args=(stream.epoch(0), given_up))
        reader.start()
        assert asked.wait(10)
    reader.join(10)
    assert [type(error).__name__ for error in given_up] == ["CancelledError"]
    assert teacher.waiting == 0
    assert teacher.cancelled >= 2
    assert teacher.closed
    assert held_by(store) == {}


def _read_one(batches: Iterator[LabelledBatch], given_up: list[BaseException]) -> None:
    try:
        next(batches)
    except BaseException as error:  # noqa: BLE001 - the test looks at it
        given_up.append(error)


def _tell_when(ready: Callable[[], bool], told: threading.Event, loop: asyncio.AbstractEventLoop) -> None:
    if ready():
        told.set()
    elif not loop.is_closed():
        loop.call_soon(_tell_when, ready, told, loop)


def test_starting_an_epoch_ends_the_one_before(store: SoftLabelStore, loader_of: Any, held_by: Any) -> None:
    with LabelledStream(loader_of(), store, FakeTeacher, RULES, in_flight=2) as stream:
        before: Any = stream.epoch(0)
        next(before)
        assert steps(list(stream.epoch(0))) == list(range(12))
        before.close()
    assert set(held_by(store).values()) == {1}


def test_an_epoch_that_was_ended_says_so_when_it_is_asked_for_more(store: SoftLabelStore, loader_of: Any) -> None:
    with LabelledStream(loader_of(), store, FakeTeacher, RULES, in_flight=2) as stream:
        before = stream.epoch(0)
        next(before)
        now = stream.epoch(0)
        next(now)
        with pytest.raises(RuntimeError, match="this epoch was ended"):
            next(before)
        assert steps(list(now)) == list(range(1, 12))  # the other one is not touched
        left = stream.epoch(0)
        next(left)
    with pytest.raises(RuntimeError, match="by leaving the stream"):
        next(left)


def test_a_teacher_that_cannot_be_opened_leaves_no_thread(store: SoftLabelStore, loader_of: Any) -> None:
    def nobody() -> FakeTeacher:
        raise StageMissing("there is no teacher")

    with pytest.raises(StageMissing):
        LabelledStream(loader_of(), store, nobody, RULES, in_flight=2)


@pytest.mark.parametrize(("epoch", "step"), [(0, 5), (1, 0), (1, 11)])
def test_resuming_gives_the_very_next_batches(store: SoftLabelStore, loader_of: Any, epoch: int, step: int) -> None:
    with LabelledStream(loader_of(num_views=2), store, FakeTeacher, RULES, in_flight=3) as stream:
        whole = list(stream.epoch(epoch))
    with LabelledStream(loader_of(num_views=2), reopened(store), FakeTeacher, RULES, in_flight=3) as stream:
        rest = list(stream.epoch(epoch, step))
    assert steps(rest) == list(range(step, 12))
    for before, now in zip(whole[step:], rest, strict=True):
        assert now.num_asked == 0
        assert now.crops.image_ids == before.crops.image_ids
        np.testing.assert_array_equal(now.crops.crops_VBHWC, before.crops.crops_VBHWC)
        assert before.logits_BK is not None
        assert now.logits_BK is not None
        np.testing.assert_array_equal(now.logits_BK, before.logits_BK)


def test_workers_read_in_the_next_epoch_what_the_others_asked_for(store: SoftLabelStore, loader_of: Any, held_by: Any) -> None:
    """Two workers on one view: each epoch cuts the batches anew, so a worker meets images that the other one asked for."""
    teachers = [FakeTeacher(), FakeTeacher()]
    workers = [
        LabelledStream(loader_of(global_batch=4, rank=rank, world=2), reopened(store), lambda t=teachers[rank]: t, RULES, 2)  # type: ignore[misc]
        for rank in range(2)
    ]
    asked = []
    for epoch in range(3):
        asked.append([sum(batch.num_asked for batch in worker.epoch(epoch)) for worker in workers])
        for worker in workers:
            worker.commit()  # a checkpoint, at which Ray lets workers wait for each other
    for worker in workers:
        worker.__exit__(None, None, None)
    assert asked == [[12, 12], [0, 0], [0, 0]]
    assert set(held_by(store).values()) == {1}


class ScriptedTime:
    """The stream's clock. It moves only when the test says so; `read[n]` tells that the training loop looked at it n times."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self._count = 0
        self.read = [threading.Event() for _ in range(20)]
        monkeypatch.setattr(stream_module, "time", SimpleNamespace(monotonic=self.monotonic))

    def monotonic(self) -> float:
        now = self.now
        self._count += 1
        self.read[self._count].set()
        return now


def test_each_wait_goes_to_what_was_waited_for(store: SoftLabelStore, loader_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One batch an epoch. The loop looks at the clock: 1 asks for a batch, 2 has its crops, 3 has its labels, 4 was trained on."""

    class SlowLoader:
        def __init__(self) -> None:
            self._loader = loader_of(global_batch=24)
            self.rejections = self._loader.rejections

        def epoch(self, epoch: int, start_step: int = 0) -> Iterator[CropBatch]:
            clock.read[1].wait(10)
            for batch in self._loader.epoch(epoch, start_step):
                clock.now += 3
                yield batch

    class SlowTeacher(FakeTeacher):
        async def _infer(self, *arguments: Any) -> dict[str, Floats]:
            await asyncio.to_thread(clock.read[2].wait, 10)
            clock.now += 5
            return await super()._infer(*arguments)

    class SlowStore(SoftLabelStore):
        slow = False

        def read(self, view: int, shard: int, temperature: float, max_tv: float) -> ShardLabels:
            if self.slow:
                clock.read[2].wait(10)
                clock.now += 7
            return super().read(view, shard, temperature, max_tv)

    slow_store = SlowStore(store.folder, store.identity)
    loader: Any = SlowLoader()
    for kind, expected in (
        ("teacher", Waits(decode=3, teacher=5, student=2)),
        ("store", Waits(decode=3, store=7 * 4, student=2)),  # four shards are read for the one batch
    ):
        clock = ScriptedTime(monkeypatch)
        slow_store.slow = kind == "store"
        with LabelledStream(loader, slow_store, SlowTeacher, RULES, in_flight=1) as stream:
            for _ in stream.epoch(0):
                clock.now += 2
            assert stream.waits == expected


MIXED = CropRecipe(image_size=8, mixing=MixingRecipe(kind="both"))


def mixing_loader(source: Any, log: RejectionLog, rank: int = 0, world: int = 1, **more: Any) -> CropLoader:
    """Epoch e trains on view e mod 4; crops are mixed."""
    settings = LoaderSettings(**{"seed": 0, "global_batch": 4, "window_shards": 2, **more})
    return CropLoader(source, MIXED, settings, lambda epoch: (epoch % 4,), log, rank, world)


LabelOf = dict[tuple[int, int, int], tuple[bytes, bytes]]


def labels_by_key(batches: list[LabelledBatch]) -> LabelOf:
    """(view, shard, row) -> (pixels, logits)."""
    found: LabelOf = {}
    for batch in batches:
        assert batch.logits_BK is not None
        for b, (shard, row) in enumerate(batch.crops.rows.tolist()):
            key = (batch.crops.views[0], shard, row)
            pair = (batch.crops.crops_VBHWC[0, b].tobytes(), batch.logits_BK[b].tobytes())
            assert found.setdefault(key, pair) == pair
    return found


def test_labels_of_mixed_crops_serve_every_other_cut_of_the_batches(
    tmp_path: Path, source: Any, identity: StoreIdentity, held_by: Any
) -> None:
    """Asked for by one worker, one crop a decode; read by 1, 2 and 4 workers, other batches, several crops a decode: the same pixels, the
    same labels, and the teacher is not asked again."""
    log = RejectionLog(tmp_path / "rejected.jsonl", 0.0)
    store = SoftLabelStore(tmp_path / "store", identity.replace(recipe=MIXED))
    with LabelledStream(mixing_loader(source, log), store, FakeTeacher, RULES, in_flight=3) as stream:
        first = labels_by_key([batch for epoch in range(4) for batch in stream.epoch(epoch)])
    assert len(first) == 4 * 24
    for world, more in ((1, {"crops_per_decode": 4}), (2, {"crops_per_decode": 2, "global_batch": 6}), (4, {"global_batch": 8})):
        for rank in range(world):
            teacher = FakeTeacher()
            loader = mixing_loader(source, log, rank, world, **more)
            with LabelledStream(loader, reopened(store), lambda told=teacher: told, RULES, in_flight=3) as stream:  # type: ignore[misc]
                again = labels_by_key([batch for epoch in range(4) for batch in stream.epoch(epoch)])
            assert teacher.calls == []
            assert len(again) == 4 * 24 // world
            assert again == {key: first[key] for key in again}
    assert set(held_by(store).values()) == {1}


def test_the_label_is_of_the_mixed_crop(tmp_path: Path, source: Any, identity: StoreIdentity) -> None:
    log = RejectionLog(tmp_path / "rejected.jsonl", 0.0)
    store = SoftLabelStore(tmp_path / "store", identity.replace(recipe=MIXED))
    with LabelledStream(mixing_loader(source, log), store, FakeTeacher, RULES, in_flight=3) as stream:
        for batch in stream.epoch(0):
            assert batch.logits_BK is not None
            assert batch.tv_B is not None
            tv_B = 0.5 * np.abs(softmax(fake_logits(batch.crops.crops_VBHWC[0], 10), 1.0) - softmax(batch.logits_BK, 1.0)).sum(axis=1)
            assert (tv_B <= batch.tv_B + 1e-6).all()


def test_several_crops_a_decode_ask_for_as_many_labels_and_resume_at_any_step(
    tmp_path: Path, source: Any, identity: StoreIdentity, held_by: Any
) -> None:
    log = RejectionLog(tmp_path / "rejected.jsonl", 0.0)
    identity = identity.replace(recipe=MIXED)
    teacher = FakeTeacher()
    store = SoftLabelStore(tmp_path / "store", identity)
    whole = []
    with LabelledStream(mixing_loader(source, log, crops_per_decode=2), store, lambda: teacher, RULES, in_flight=3) as stream:
        whole = [list(stream.epoch(epoch)) for epoch in range(4)]
    assert [steps(epoch) for epoch in whole] == [list(range(6))] * 4
    assert sum(teacher.calls) == 4 * 24
    assert len(held_by(store)) == 4 * 24
    assert set(held_by(store).values()) == {1}
    for epoch, step in ((0, 1), (1, 3), (2, 5), (3, 0)):
        with LabelledStream(mixing_loader(source, log, crops_per_decode=2), reopened(store), FakeTeacher, RULES, 3) as stream:
            rest = list(stream.epoch(epoch, step))
        assert steps(rest) == list(range(step, 6))
        for before, now in zip(whole[epoch][step:], rest, strict=True):
            assert now.crops.image_ids == before.crops.image_ids
            np.testing.assert_array_equal(now.crops.crops_VBHWC, before.crops.crops_VBHWC)
            np.testing.assert_array_equal(now.logits_BK, before.logits_BK)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"epochs": 10, "crops_per_decode": 4}, "epochs 10 is not a multiple of crops_per_decode 4"),
        ({"epochs": 8, "crops_per_decode": 4, "num_views": 2}, "crops_per_decode 4 is over num_views 2"),
    ],
)
def test_a_pass_must_be_whole_and_its_crops_different(wrong: dict[str, int], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        validate(DistillSettings, wrong, origin="run.yaml")
