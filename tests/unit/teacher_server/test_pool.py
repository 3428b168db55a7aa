"""Several teachers asked as one, in virtual time: the event loop's clock jumps to the next timer, so minutes pass at once and every run is
the same."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import numpy as np
import pytest

from distill.config import validate
from distill.errors import (
    ConfigError,
    DistillError,
    FingerprintMismatch,
    RequestRefused,
    TeacherAnswerError,
    TeacherChanged,
    TeacherUnavailable,
)
from distill.teacher_info import TeacherInfo
from distill.virtual_time import run_in_virtual_time
from teacher_server import pool as pool_module
from teacher_server.address import TeacherAddress, open_teacher
from teacher_server.backend import Crops, Floats
from teacher_server.fake import FakeTeacher, fake_logits
from teacher_server.pool import HasPoolState, PooledTeacher
from teacher_server.pool_member import MemberState
from teacher_server.settings import PoolSettings, ServerSettings

CROPS = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 3), np.uint8)
RIGHT = fake_logits(CROPS, 10)
F, E = "f" * 64, "e" * 64


class Served(FakeTeacher):
    """A teacher with `copies` that each take `service_s` for a batch; more than `queue` waiting batches are refused. What it is may be
    changed while it is asked."""

    def __init__(self, service_s: float = 0.1, copies: int = 1, queue: int = 10_000, fingerprint: str = F, **options: Any) -> None:
        super().__init__(**options)
        self.service_s = service_s
        self.copies = copies
        self.queue = queue
        self.alive = True
        self.error: DistillError | None = None
        self.fingerprint = fingerprint
        self.under_way = self.most_under_way = 0
        self.images = 0
        self.canaries = 0
        self._slots = asyncio.Semaphore(copies)
        self._deaths = 0

    async def _load_info(self) -> TeacherInfo:
        if not self.alive:
            raise TeacherUnavailable("nobody listens")
        return self._served.replace(fingerprint=self.fingerprint)

    async def info(self) -> TeacherInfo:
        self._info = None  # as Triton's client: never old
        return await super().info()

    async def ask_canary(self) -> None:
        self.canaries += 1
        await super().ask_canary()

    def kill(self) -> None:
        self.alive = False
        self._deaths += 1

    async def _infer(self, crops_BHWC: Crops, temperature_B1: Floats, names: tuple[str, ...]) -> dict[str, Floats]:
        if self.under_way >= self.copies + self.queue:
            raise TeacherUnavailable("the queue is full")
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        deaths = self._deaths
        try:
            async with self._slots:
                await asyncio.sleep(self.service_s)
        finally:
            self.under_way -= 1
        if self._deaths > deaths or not self.alive:
            raise TeacherUnavailable("it was killed")
        if self.error is not None and len(crops_BHWC) > 1:  # not the canary
            raise self.error
        self.images += len(crops_BHWC)
        return await super()._infer(crops_BHWC, temperature_B1, names)


def pool_of(*teachers: FakeTeacher, fingerprint: str | None = None, **settings: Any) -> PooledTeacher:
    named = [(f"t{number}", teacher) for number, teacher in enumerate(teachers)]
    return PooledTeacher(named, PoolSettings(**settings), fingerprint=fingerprint, random_share=random.Random(0).random)


async def keep_asking(pool: PooledTeacher, seconds: float, at_once: int, num_crops: int = 16) -> int:
    """`at_once` questions under way all the time; every answer must be right. How many were answered."""
    until = asyncio.get_running_loop().time() + seconds
    answered = 0

    async def ask(first: int) -> None:
        nonlocal answered
        while asyncio.get_running_loop().time() < until:
            first = (first + 7) % (len(CROPS) - num_crops)
            assert (await pool.logits(CROPS[first : first + num_crops]) == RIGHT[first : first + num_crops]).all()
            answered += 1

    await asyncio.gather(*(ask(number) for number in range(at_once)))
    return answered


async def until_it_answers(pool: PooledTeacher) -> None:
    """As the label path does it: away means asking again later."""
    while True:
        try:
            await pool.logits(CROPS)
        except TeacherUnavailable:
            await asyncio.sleep(1)


def member(pool: PooledTeacher, number: int) -> MemberState:
    return pool.state().members[number]


def test_labels_are_those_of_a_single_teacher_whatever_the_size_of_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "PART_BYTES", 5 * CROPS[0].nbytes)

    async def scenario() -> None:
        first, second = Served(), Served()
        pool = pool_of(first, second)
        for size in (1, 5, 6, 64):
            np.testing.assert_array_equal(await pool.logits(CROPS[:size]), fake_logits(CROPS[:size], 10))
        assert (await pool.logits(CROPS[:0])).shape == (0, 10)
        temperature_B1 = np.linspace(0.5, 4, 64, dtype=np.float32)[:, None]
        for ours, theirs in zip(
            await pool.soft_labels(CROPS, temperature_B1, with_logits=True),
            await FakeTeacher().soft_labels(CROPS, temperature_B1, with_logits=True),
            strict=True,
        ):
            assert ours is not None
            assert theirs is not None
            np.testing.assert_array_equal(ours, theirs)
        assert max(first.calls + second.calls) <= 5, "a large batch is cut into messages"
        assert min(first.images, second.images) > 20, "and both work on it"
        await pool.close()
        assert first.closed
        assert second.closed

    run_in_virtual_time(scenario())


@pytest.mark.parametrize(("copies", "expected"), [(1, (2, 3)), (4, (8, 12)), (8, (16, 24))])
def test_the_limit_finds_how_many_copies_a_teacher_has(copies: int, expected: tuple[int, int]) -> None:
    async def scenario() -> tuple[int, int]:
        teacher = Served(service_s=0.2, copies=copies)
        pool = pool_of(teacher)
        answered = await keep_asking(pool, 50, at_once=40)
        await pool.close()
        return member(pool, 0).limit, answered

    limit, answered = run_in_virtual_time(scenario())
    assert expected[0] <= limit <= expected[1]
    assert answered >= 0.9 * 50 / 0.2 * copies, "and keeps all of them busy"


def test_a_fast_teacher_gets_more_than_a_slow_one_and_neither_is_idle() -> None:
    async def scenario() -> tuple[int, int, int]:
        slow, fast = Served(service_s=1.0), Served(service_s=0.1)
        pool = pool_of(slow, fast)
        await keep_asking(pool, 100, at_once=12)
        await pool.close()
        return slow.images, fast.images, slow.most_under_way

    slow, fast, most_at_slow = run_in_virtual_time(scenario())
    assert 7 <= fast / slow <= 12, "in the ratio of their rates"
    assert slow >= 0.9 * 100 * 16
    assert most_at_slow <= 4


def test_batches_taken_in_order_wait_for_no_slow_teacher_because_each_is_spread_over_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trainer has few batches under way: whole ones, at a teacher 8 times slower, would hold up all the others (0.60)."""
    monkeypatch.setattr(pool_module, "PART_BYTES", 4 * CROPS[0].nbytes)

    async def scenario() -> float:
        slow, fast = Served(service_s=0.8), Served(service_s=0.1)  # for 4 crops
        pool = pool_of(slow, fast)
        loop = asyncio.get_running_loop()
        await pool.info()
        under_way = [asyncio.ensure_future(pool.logits(CROPS)) for _ in range(4)]
        until, num_batches = loop.time() + 200, 0
        while loop.time() < until:
            await under_way.pop(0)
            under_way.append(asyncio.ensure_future(pool.logits(CROPS)))
            num_batches += 1
        for batch in under_way:
            batch.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)
        await pool.close()
        return num_batches * len(CROPS) / 200

    assert run_in_virtual_time(scenario()) >= 0.95 * (4 / 0.8 + 4 / 0.1)


def test_little_work_goes_where_it_is_done_soonest() -> None:
    async def scenario() -> tuple[int, int]:
        slow, fast = Served(service_s=1.0), Served(service_s=0.1)
        pool = pool_of(slow, fast)
        await keep_asking(pool, 100, at_once=1)
        await pool.close()
        return slow.images, fast.images

    slow, fast = run_in_virtual_time(scenario())
    assert fast > 50 * slow


def test_a_teacher_that_becomes_slower_gets_less_and_one_that_becomes_faster_more() -> None:
    async def scenario() -> list[float]:
        changing, steady = Served(service_s=0.4, copies=2), Served(service_s=0.4, copies=2)
        pool = pool_of(changing, steady)
        shares = []
        for service_s in (0.4, 4.0, 0.2):
            changing.service_s = service_s
            await keep_asking(pool, 120, at_once=20)  # time to learn
            before = changing.images, steady.images
            await keep_asking(pool, 60, at_once=20)
            now = changing.images - before[0], steady.images - before[1]
            shares.append(now[0] / sum(now))
        await pool.close()
        return shares

    as_fast, slower, faster = run_in_virtual_time(scenario())
    assert 0.4 < as_fast < 0.6
    assert slower < 0.15
    assert faster > 0.6


def test_an_overloaded_teacher_that_refuses_gets_half_and_no_question_fails() -> None:
    async def scenario() -> tuple[int, MemberState, int]:
        small, large = Served(service_s=0.5, queue=0), Served(service_s=0.5, copies=8)
        pool = pool_of(small, large)
        answered = await keep_asking(pool, 100, at_once=30)
        await pool.close()
        return answered, member(pool, 0), small.images

    answered, small, images = run_in_virtual_time(scenario())
    assert answered > 0.8 * 9 * 100 / 0.5
    assert small.failures > 0
    assert small.limit <= 2
    assert images > 0.4 * 16 * 100 / 0.5, "it goes on getting what it can do"


def test_a_dead_teacher_costs_no_question_and_gets_requests_again_when_it_is_back(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        mortal, other = Served(copies=2), Served(copies=2)
        pool = pool_of(mortal, other)
        assert isinstance(pool, HasPoolState)

        async def story() -> None:
            await asyncio.sleep(5)
            assert mortal.under_way > 0
            mortal.kill()
            await asyncio.sleep(1)
            away = member(pool, 0)
            assert away.standing == "away"
            assert away.in_flight == 0
            assert away.failures > 0
            images = mortal.images
            await asyncio.sleep(30)
            assert mortal.images == images
            assert 5 <= mortal.canaries <= 30, "it is asked again and again, with pauses"
            assert member(pool, 0).for_s == pytest.approx(31, abs=1)
            mortal.alive = True
            await asyncio.sleep(10)
            assert member(pool, 0).standing == "in"
            assert mortal.images > images + 16 * 20

        await asyncio.gather(story(), keep_asking(pool, 60, at_once=8))
        await pool.close()

    run_in_virtual_time(scenario())
    said = [record.getMessage() for record in caplog.records]
    assert len([line for line in said if "teacher t0 is away (1 of 2 answer):" in line]) == 1
    assert len([line for line in said if "t0 answers again" in line]) == 1


def test_only_when_all_are_away_is_the_teacher_unavailable_and_the_pool_heals_itself() -> None:
    async def scenario() -> None:
        teachers = [Served(), Served()]
        pool = pool_of(*teachers)
        await pool.info()
        for teacher in teachers:
            teacher.kill()
        with pytest.raises(TeacherUnavailable, match=r"none of 2 .*t0 away for .*t1 away for"):
            await pool.logits(CROPS)
        with pytest.raises(TeacherUnavailable, match="none of 2"):
            await pool.info()
        assert not await pool.ready()
        teachers[1].alive = True
        await asyncio.sleep(6)
        assert await pool.ready()
        np.testing.assert_array_equal(await pool.logits(CROPS), fake_logits(CROPS, 10))
        await pool.close()

    run_in_virtual_time(scenario())


def test_questions_that_wait_for_room_end_when_everybody_is_gone() -> None:
    async def scenario() -> list[Any]:
        teacher = Served()
        pool = pool_of(teacher)
        asked = [asyncio.ensure_future(pool.logits(CROPS)) for _ in range(10)]
        await asyncio.sleep(0.15)
        assert pool.state().waiting > 0
        teacher.kill()
        ends = await asyncio.gather(*asked, return_exceptions=True)
        assert pool.state().waiting == 0
        assert member(pool, 0).in_flight == 0
        await pool.close()
        return ends

    assert {type(end) for end in run_in_virtual_time(scenario())} <= {TeacherUnavailable, np.ndarray}


def test_a_question_given_up_gives_its_place_back() -> None:
    async def scenario() -> None:
        pool = pool_of(Served(service_s=100))
        asked = [asyncio.ensure_future(pool.logits(CROPS)) for _ in range(3)]
        await asyncio.sleep(101)  # the canary first
        for question in asked:
            question.cancel()
        await asyncio.gather(*asked, return_exceptions=True)
        assert (member(pool, 0).in_flight, member(pool, 0).images_in_flight, pool.state().waiting) == (0, 0, 0)
        await pool.close()

    run_in_virtual_time(scenario())


@pytest.mark.parametrize("ticks", range(6))
def test_who_queues_behind_questions_that_are_given_up_has_its_turn(ticks: int) -> None:
    async def scenario() -> None:
        pool = pool_of(Served(service_s=1))
        await pool.info()
        asked = [asyncio.ensure_future(pool.logits(CROPS)) for _ in range(5)]
        await asyncio.sleep(0.5)
        assert pool.state().waiting > 0
        for question in asked:
            question.cancel()
        for _ in range(ticks):
            await asyncio.sleep(0)
        async with asyncio.timeout(10):
            await pool.logits(CROPS)
        await asyncio.gather(*asked, return_exceptions=True)
        await pool.close()

    run_in_virtual_time(scenario())


def test_another_teacher_is_refused_and_named_and_the_others_go_on(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        stranger, right = Served(fingerprint=E), Served(fingerprint=F)
        pool = pool_of(stranger, right, fingerprint=F)
        assert (await pool.info()).fingerprint == F, "also where the stranger answers first"
        await keep_asking(pool, 10, at_once=4)
        assert member(pool, 0).standing == "refused"
        assert "eeeeeeeeeeee" in member(pool, 0).reason
        assert stranger.images == stranger.canaries, "never asked for anything but canaries"
        stranger.fingerprint = F  # somebody mended it
        await keep_asking(pool, 10, at_once=4)
        assert stranger.images > 100
        await pool.close()

    run_in_virtual_time(scenario())
    assert any("teacher t0 is refused" in record.getMessage() for record in caplog.records)


def test_a_teacher_that_changes_under_way_is_left_at_once_and_its_labels_never_mix() -> None:
    async def scenario() -> None:
        changing, steady = Served(), Served()
        pool = pool_of(changing, steady, fingerprint=F)
        await keep_asking(pool, 5, at_once=4)
        images = changing.images
        changing.fingerprint = E
        await keep_asking(pool, 5, at_once=4)
        assert member(pool, 0).standing == "refused"
        assert changing.images - images <= 16 * 4 + changing.canaries, "what was under way was still of the old one"
        steady.fingerprint = E
        with pytest.raises(FingerprintMismatch, match=r"t0 refused .*t1 refused .*labels of ffffffffffff are wanted"):
            await pool.logits(CROPS)
        await pool.close()

    run_in_virtual_time(scenario())


def test_a_pool_that_takes_any_teacher_follows_when_all_have_changed() -> None:
    async def scenario() -> None:
        teachers = [Served(), Served()]
        pool = pool_of(*teachers)
        info = await pool.info()
        for teacher in teachers:
            teacher.fingerprint = E
        with pytest.raises(TeacherChanged):
            await pool.logits(CROPS, fingerprint=info.fingerprint)
        assert (await pool.info()).fingerprint == E
        np.testing.assert_array_equal(await pool.logits(CROPS), fake_logits(CROPS, 10))
        await asyncio.sleep(10)
        assert [state.standing for state in pool.state().members] == ["in", "in"]
        await pool.close()

    run_in_virtual_time(scenario())


@pytest.mark.parametrize("kind", [TeacherAnswerError, RequestRefused])
def test_a_wrong_answer_is_asked_of_another_and_raised_only_when_all_agree(kind: type[DistillError]) -> None:
    async def scenario() -> None:
        broken, right = Served(), Served()
        broken.error = kind("wrong")
        pool = pool_of(broken, right)
        await keep_asking(pool, 5, at_once=6)
        assert member(pool, 0).failures > 0
        right.error = kind("wrong, too")
        with pytest.raises(kind, match="wrong"):
            await until_it_answers(pool)
        await pool.close()

    run_in_virtual_time(scenario())


class Choking(Served):
    """Answers NaN for a white crop, or refuses it."""

    refuses = False

    async def _infer(self, crops_BHWC: Crops, temperature_B1: Floats, names: tuple[str, ...]) -> dict[str, Floats]:
        tensors = await super()._infer(crops_BHWC, temperature_B1, names)
        is_white_B = (crops_BHWC == 255).all(axis=(1, 2, 3))
        if self.refuses and is_white_B.any():
            raise RequestRefused("no white crops")
        for tensor_BK in tensors.values():
            tensor_BK[is_white_B] = np.nan
        return tensors


WHITE = np.full_like(CROPS[:1], 255)


@pytest.mark.parametrize("kind", [TeacherAnswerError, RequestRefused])
def test_one_bad_crop_takes_no_teacher_from_the_others(monkeypatch: pytest.MonkeyPatch, kind: type[DistillError]) -> None:
    monkeypatch.setattr(Choking, "refuses", kind is RequestRefused)

    async def scenario() -> None:
        pool = pool_of(*(Choking(copies=2) for _ in range(3)))
        await keep_asking(pool, 8, at_once=20)
        limits = [state.limit for state in pool.state().members]

        async def ask_bad_ones() -> None:
            for _ in range(10):
                with pytest.raises(kind):
                    await pool.logits(WHITE)

        bad_ones = asyncio.ensure_future(ask_bad_ones())
        await keep_asking(pool, 5, at_once=20)
        await bad_ones
        for state, limit in zip(pool.state().members, limits, strict=True):
            assert (state.standing, state.failures) == ("in", 0)
            assert state.for_s > 12, "all the time"
            assert state.limit >= limit - 1
        await pool.close()

    run_in_virtual_time(scenario())


def test_a_bad_crop_is_told_from_a_bad_teacher_where_the_others_are_away() -> None:
    async def scenario() -> None:
        dead, alive = Choking(), Choking()
        pool = pool_of(dead, alive)
        await pool.info()
        dead.kill()
        await pool.logits(CROPS)
        with pytest.raises(TeacherAnswerError):
            await pool.logits(WHITE)
        assert member(pool, 1).standing == "in"
        await pool.close()
        good, broken = Served(), Served()
        broken.error = TeacherAnswerError("NaN")
        pool = pool_of(good, broken)
        await pool.info()
        good.kill()
        with pytest.raises(TeacherUnavailable):  # perhaps the one that is away could answer
            await pool.logits(CROPS)
        await pool.close()

    run_in_virtual_time(scenario())


def test_a_fault_of_ours_while_asking_who_it_is_leaves_nobody_waiting(caplog: pytest.LogCaptureFixture) -> None:
    class Faulty(Served):
        faulty = True

        async def ask_canary(self) -> None:
            if self.faulty:
                raise KeyError("outputs")
            await super().ask_canary()

    async def scenario() -> None:
        teacher = Faulty()
        pool = pool_of(teacher)
        async with asyncio.timeout(60):
            with pytest.raises(TeacherUnavailable, match=r"t0 away .*KeyError\('outputs'\)"):
                await pool.info()
            teacher.faulty = False
            await asyncio.sleep(10)
            await pool.logits(CROPS)
        await pool.close()

    run_in_virtual_time(scenario())
    assert any(record.exc_info for record in caplog.records)


def test_crops_that_end_every_teacher_are_given_up() -> None:
    class Fragile(Served):
        async def _infer(self, crops_BHWC: Crops, *rest: Any) -> dict[str, Floats]:
            if len(crops_BHWC) == 7:
                raise TeacherUnavailable("died of it")
            return await super()._infer(crops_BHWC, *rest)

    async def scenario() -> None:
        pool = pool_of(Fragile(), Fragile(), Fragile())
        with pytest.raises(TeacherUnavailable, match=r"none of 3|failed at every teacher"):
            await pool.logits(CROPS[:7])
        await asyncio.sleep(10)
        await pool.logits(CROPS[:6])
        await pool.close()

    run_in_virtual_time(scenario())


def test_a_model_that_is_no_teacher_is_refused_and_alone_ends_the_question() -> None:
    class Foreign(FakeTeacher):
        async def _load_info(self) -> TeacherInfo:
            raise RequestRefused("it is no teacher of ours")

    async def scenario() -> None:
        pool = pool_of(Foreign(), Served())
        await pool.logits(CROPS)
        assert member(pool, 0).standing == "refused"
        await pool.close()
        alone = pool_of(Foreign())
        with pytest.raises(RequestRefused, match="no teacher of ours"):
            await alone.info()
        await alone.close()

    run_in_virtual_time(scenario())


def test_a_restarted_machine_that_starts_slowly_is_not_shunned_for_ever() -> None:
    async def scenario() -> None:
        warming, other = Served(service_s=5.0), Served(service_s=0.1)
        pool = pool_of(warming, other)
        await keep_asking(pool, 20, at_once=2)
        warming.service_s = 0.1
        images = warming.images
        await keep_asking(pool, 120, at_once=2)
        assert warming.images - images > 16 * 100
        await pool.close()

    run_in_virtual_time(scenario())


def test_state_is_plain_data_before_during_and_after() -> None:
    async def scenario() -> None:
        pool = pool_of(Served(), Served())
        assert [state.standing for state in pool.state().members] == ["new", "new"]
        await keep_asking(pool, 5, at_once=4)
        plain = pool.state().model_dump(mode="json")
        assert plain["fingerprint"] == F
        for state in plain["members"]:
            assert state["standing"] == "in"
            assert state["images"] == 16 * state["requests"] > 0
            assert state["floor_ms"] == pytest.approx(100, abs=5)
            assert state["images_per_s"] == pytest.approx(160, rel=0.3)
        await pool.close()

    run_in_virtual_time(scenario())


def test_an_address_of_a_pool_travels_as_json_and_opens() -> None:
    async def scenario() -> None:
        urls = ["127.0.0.1:1", "http://127.0.0.1:2", "grpc://127.0.0.1:3"]
        address = TeacherAddress(model="m", pool=PoolSettings(urls=urls), request_timeout_s=2)
        pool = open_teacher(TeacherAddress.model_validate_json(address.model_dump_json()))
        assert isinstance(pool, HasPoolState)
        with pytest.raises(
            TeacherUnavailable, match=r"none of 3.*127\.0\.0\.1:1 away.*http://127\.0\.0\.1:2 away.*grpc://127\.0\.0\.1:3 away"
        ):
            await pool.info()
        await pool.close()

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"pool": {"urls": ["a:1", "a:1"]}}, "named twice"),
        ({"pool": {"urls": ["a:1"]}, "triton": {"url": "b:1"}}, "give one of them"),
        ({"pool": {"urls": ["a:1"]}, "backend": "embedded"}, "give one of them"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(tree: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        validate(ServerSettings, tree, "run.yaml")
    with pytest.raises(ConfigError, match="at least one url"):
        validate(TeacherAddress, {"model": "m", "pool": {}}, "address")
