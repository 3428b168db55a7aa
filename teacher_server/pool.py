"""Several teachers that serve the same network, asked as one.

Flow: a batch of crops -> parts of one message each -> the member that will answer soonest and has room -> labels, in order again.
Unit of data: one part. Shapes: B images, H W C pixels, K classes.

    new -----> in          a label of the right teacher came out of it
    in ------> away        a request failed
    in ------> new         it said to be another teacher than before: it is asked who it is
    new, away -> refused   another teacher than the one that is wanted, or no teacher at all; it is named
    away, refused -> in    a label of the right teacher came out of it

A part that failed at one member is asked of another at once. Where a member refuses it or answers what must not be used (NaN), the part may
be at fault: only after another one answered it well is the first one away. Where all of them say the same, the question ends so and nobody
is away: one bad image must not take the teachers from everybody else.

A member that is not in is asked for one label of a grey crop again and
again, with growing pauses of random length. Only when no member is in does a question end with TeacherUnavailable. How many parts a member
gets at once is found from its answers (pool_limit.py).

All labels are of one fingerprint: the one that is wanted, or else that of the first member that answered. Each request names it, so a
member that changes is found out by the next request. Where no fingerprint is wanted and every member that answers has become another
teacher, the pool follows, and questions under way end with TeacherChanged.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import suppress

import numpy as np

from distill.errors import DistillError, FingerprintMismatch, RequestRefused, TeacherAnswerError, TeacherChanged, TeacherUnavailable
from distill.teacher_info import TeacherInfo
from teacher_server.backend import CheckedTeacher, Crops, Floats
from teacher_server.pool_member import HasPoolState, Member, PoolState, Standing
from teacher_server.retries import all_or_none
from teacher_server.settings import PoolSettings

__all__ = ["HasPoolState", "PoolState", "PooledTeacher"]

PART_BYTES = 1_200_000
"""One message to Triton (see triton.py): a batch of 256 crops of 224 pixels is 33 parts, one of 28 pixels is one."""
_FIRST_PAUSE_S = 0.2
_MOST_FAILURES = 3
"""So often may one part fail at each member: after that it is rather the part that ends teachers."""

logger = logging.getLogger(__name__)


class PooledTeacher(CheckedTeacher):
    """TeacherBackend over several others, which it closes. Belongs to one event loop.

    A question raises TeacherUnavailable when no member is in, FingerprintMismatch when all are other teachers than the one that is wanted,
    RequestRefused or TeacherAnswerError when every member that can be asked answers so.
    """

    def __init__(
        self,
        members: Sequence[tuple[str, CheckedTeacher]],
        settings: PoolSettings,
        *,
        fingerprint: str | None = None,
        random_share: Callable[[], float] = random.random,
    ) -> None:
        """`members`: url (for people) and back end of each. `fingerprint`: the teacher that is wanted. Asks nobody yet."""
        super().__init__()
        self._settings = settings
        self._wanted = fingerprint
        self._current = fingerprint
        self._random_share = random_share
        self._members = [Member(url, teacher, settings, 0.0) for url, teacher in members]
        self._loop: asyncio.AbstractEventLoop | None = None
        self._probes: dict[str, asyncio.Task[None]] = {}
        self._changed = asyncio.Event()
        self._waiting: deque[asyncio.Future[None]] = deque()

    def state(self) -> PoolState:
        """See HasPoolState."""
        now_s = self._now() if self._loop else 0.0
        states = tuple(member.state(now_s) for member in self._members)
        return PoolState(fingerprint=self._current, waiting=len(self._waiting), members=states)

    async def info(self) -> TeacherInfo:
        """See TeacherBackend: of a member that is in, so it is never older than the last answer."""
        self._info = await self._load_info()
        return self._info

    async def _load_info(self) -> TeacherInfo:
        self._start()
        while True:
            for member in self._members:
                if member.standing == "in" and member.info is not None:
                    return member.info
            if not any(member.standing == "new" for member in self._members):
                raise self._nobody()
            await self._next_change()

    async def _infer(self, crops_BHWC: Crops, temperature_B1: Floats, names: tuple[str, ...]) -> dict[str, Floats]:
        info = self._info  # what `_ask` has just read: nothing was awaited in between
        assert info is not None
        num_parts = -(-len(crops_BHWC) // max(1, PART_BYTES // crops_BHWC[0].nbytes))
        parts = zip(np.array_split(crops_BHWC, num_parts), np.array_split(temperature_B1, num_parts), strict=True)
        answers = await all_or_none([self._ask_part(crops, temperature, names, info) for crops, temperature in parts])
        if len(answers) == 1:
            return answers[0]
        return {name: np.concatenate([answer[name] for answer in answers]) for name in names}

    async def _ask_part(self, crops_BHWC: Crops, temperature_B1: Floats, names: tuple[str, ...], info: TeacherInfo) -> dict[str, Floats]:
        wrong: dict[str, DistillError] = {}
        accused: list[tuple[Member, int, DistillError]] = []
        error: DistillError | None = None
        for _ in range(_MOST_FAILURES * len(self._members)):
            member = await self._place(len(crops_BHWC), wrong, info)
            stay, sent = member.stays, member.send(len(crops_BHWC), self._now())
            try:
                tensors = await member.teacher._ask(crops_BHWC, temperature_B1, names, info.fingerprint)
                member.answered(sent, self._now())
                for other, its_stay, failure in accused:  # so it was not the part
                    self._failed(other, its_stay, failure)
                return tensors
            except (TeacherAnswerError, RequestRefused) as failure:
                error = wrong[member.url] = failure
                accused.append((member, stay, failure))
            except DistillError as failure:
                error = failure
                if not isinstance(failure, TeacherUnavailable):
                    wrong[member.url] = failure
                self._failed(member, stay, failure)
            finally:
                member.done(sent)
                self._tell(everybody=False)
        raise TeacherUnavailable(
            f"a part of {len(crops_BHWC)} crops failed at every teacher of the pool, again and again: {error}"
        ) from error

    def _failed(self, member: Member, stay: int, failure: DistillError) -> None:
        if member.failed(stay):
            self._out(member, "new" if isinstance(failure, TeacherChanged) else "away", failure)

    async def _place(self, num_images: int, wrong: dict[str, DistillError], info: TeacherInfo) -> Member:
        """The member that will answer soonest, as soon as one has room; not one that gave a wrong answer."""
        num_turns = 0
        while True:
            if self._current != info.fingerprint:
                raise TeacherChanged(f"the teachers of the pool are {str(self._current)[:12]} now, not {info.fingerprint[:12]} any more")
            fitting = [member for member in self._members if member.standing != "refused"]
            if wrong and all(member.url in wrong for member in fitting):
                raise next(iter(wrong.values()))
            if not any(member.standing in ("in", "new") and member.url not in wrong for member in fitting):
                # Those that are away cannot be asked. One that answers other questions is believed without them.
                raise next((wrong[member.url] for member in fitting if member.url in wrong and member.is_proven), self._nobody())
            free = [member for member in fitting if member.has_room and member.url not in wrong]
            if free and (num_turns or not self._waiting):
                now_s = self._now()
                return min(free, key=lambda member: (member.expected_delay_s(num_images, now_s), member.images_in_flight))
            await self._turn(first=bool(num_turns), any_change=bool(wrong))
            num_turns += 1

    async def _turn(self, *, first: bool, any_change: bool) -> None:
        """Wait in line for room; with `any_change` until anything changes, because not all room will do."""
        if any_change:
            await self._next_change()
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if first:  # it had its turn, and somebody else was quicker
            self._waiting.appendleft(turn)
        else:
            self._waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            with suppress(ValueError):  # its turn came
                self._waiting.remove(turn)
            self._give_turns()  # to somebody else, who may have queued behind it
            raise

    def _start(self) -> None:
        """Ask every member who it is."""
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            for member in self._members:
                member.since_s = self._now()
                self._probe(member)

    def _probe(self, member: Member) -> None:
        running = self._probes.get(member.url)
        if running is None or running.done():
            self._probes[member.url] = asyncio.ensure_future(self._until_in(member))

    async def _until_in(self, member: Member) -> None:
        """Ask a member for a label until it gives one of the right teacher."""
        longest_s = 0.0 if member.standing == "new" else min(_FIRST_PAUSE_S, self._settings.longest_pause_s)
        while True:
            await asyncio.sleep(longest_s * self._random_share())
            try:
                await member.teacher.ask_canary()
                member.info = await member.teacher.info()
            except DistillError as error:
                self._out(member, "refused" if isinstance(error, RequestRefused) else "away", error)
            except Exception as error:  # nobody awaits a probe: the member would stay new, and who waits for it would wait for ever
                logger.exception("asking teacher %s who it is", member.url)
                self._out(member, "away", TeacherUnavailable(f"asking it who it is went wrong: {error!r}"))
            else:
                self._judge(member, member.info)
            if member.standing == "in":
                return
            longest_s = min(max(_FIRST_PAUSE_S, 2 * longest_s), self._settings.longest_pause_s)

    def _judge(self, member: Member, info: TeacherInfo) -> None:
        """A label came out of it; is it of the right teacher?"""
        self._current = self._current or info.fingerprint
        if info.fingerprint == self._current:
            self._in(member)
        else:
            self._out(member, "refused", TeacherChanged(f"it serves {info.fingerprint[:12]}, wanted is {self._current[:12]}"))
            self._follow()

    def _in(self, member: Member) -> None:
        was, for_s = member.standing, self._now() - member.since_s
        if member.stand("in", self._now()) and was != "new":
            logger.warning("teacher %s answers again after %.0f s", member.url, for_s)
        self._tell()

    def _out(self, member: Member, standing: Standing, error: DistillError) -> None:
        reason = " ".join(str(error).split())
        if member.stand(standing, self._now(), reason) and standing != "new":
            num_in = sum(other.standing == "in" for other in self._members)
            logger.warning("teacher %s is %s (%d of %d answer): %s", member.url, standing, num_in, len(self._members), reason)
        self._probe(member)
        self._tell()

    def _follow(self) -> None:
        """Where any teacher will do, and every member that answers is another one than before: that one it is."""
        if self._wanted is not None or any(member.standing in ("in", "new") for member in self._members):
            return
        known = Counter(
            member.info.fingerprint
            for member in self._members
            if member.standing == "refused" and member.info is not None and member.info.fingerprint != self._current
        )
        if known:
            self._current = known.most_common(1)[0][0]
            logger.warning("the teachers of the pool are %s now", self._current[:12])
            for member in self._members:
                if member.standing == "refused" and member.info is not None and member.info.fingerprint == self._current:
                    self._in(member)

    def _nobody(self) -> DistillError:
        """What a question ends with while no member is in."""
        now_s = self._now()
        text = f"none of {len(self._members)} teachers can be asked: " + "; ".join(member.describe(now_s) for member in self._members)
        if any(member.standing != "refused" for member in self._members):
            return TeacherUnavailable(text)
        if self._wanted is not None and all(member.info and member.info.fingerprint != self._wanted for member in self._members):
            return FingerprintMismatch(f"{text}; labels of {self._wanted[:12]} are wanted")
        return RequestRefused(text)

    def _now(self) -> float:
        assert self._loop is not None
        return self._loop.time()

    def _tell(self, *, everybody: bool = True) -> None:
        """Something changed: whoever waits for a member is woken, of those who wait for room as many as there is room for, or all."""
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
        self._give_turns(everybody=everybody)

    def _give_turns(self, *, everybody: bool = False) -> None:
        room = sum(max(0, member.limit.allowed - member.in_flight) for member in self._members if member.standing == "in")
        while self._waiting and (everybody or room > 0):
            turn = self._waiting.popleft()
            if not turn.done():  # else it was given up
                turn.set_result(None)
                room -= 1

    async def _next_change(self) -> None:
        await self._changed.wait()

    async def close(self) -> None:
        """See TeacherBackend."""
        for probe in self._probes.values():
            probe.cancel()
        await asyncio.gather(*self._probes.values(), return_exceptions=True)
        for member in self._members:
            await member.teacher.close()
