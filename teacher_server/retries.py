"""How long a client of the teacher waits, and when it asks again: one budget for a whole call, whatever happens inside it.

Flow: `async with patience.budget(whom):` around a call -> `patience.ask(question)` around each of its messages -> an answer, or one error.
Unit of data: one call, which may be many messages. Labels are idempotent, so asking again is safe; it is done only where it can help.

Waits grow exponentially with full jitter (any time between none and the limit, so that clients which failed together do not come back
together); what the server asks for in Retry-After is kept on top of that.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeVar

from distill.errors import DistillError, RequestRefused, TeacherChanged, TeacherUnavailable
from distill.teacher_info import TeacherInfo
from teacher_server.backend import CheckedTeacher, ClassIds, Crops, Floats

T = TypeVar("T")

_MOST_CHANGES = 3
"""So often may another version take the teacher's place within one call; a server that changes more often is not asked on."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RetryPolicy:
    """How often and how eagerly one message is asked again. Raises RequestRefused for values without a meaning."""

    max_attempts: int | None = None
    """Attempts for one message, the first included; None: as many as the budget allows."""
    first_wait_s: float = 0.1
    """Longest wait before the second attempt; it doubles with each further one."""
    longest_wait_s: float = 5.0
    """Where the doubling stops."""

    def __post_init__(self) -> None:
        if (self.max_attempts is not None and self.max_attempts < 1) or not 0 < self.first_wait_s <= self.longest_wait_s:
            raise RequestRefused(f"a retry policy needs max_attempts >= 1 and 0 < first_wait_s <= longest_wait_s, got {self}")

    def longest_wait(self, num_failures: int) -> float:
        """Upper end of the jitter after so many failures, in s."""
        return min(self.longest_wait_s, self.first_wait_s * 2.0 ** min(num_failures - 1, 32))


class Retriable(Exception):
    """A failure after which the same question may be asked again. Never leaves `Patience.ask`, which raises `error` when it gives up."""

    def __init__(self, error: DistillError, *, after_s: float = 0.0, only_once: bool = False) -> None:
        """`after_s`: not before that time is over. `only_once`: a second failure of this kind is final."""
        super().__init__(str(error))
        self.error = error
        self.after_s = after_s
        self.only_once = only_once


@dataclass
class _Budget:
    """What is left for one call; shared by all its tasks."""

    deadline_s: float
    max_attempts: int | None
    last_error: DistillError | None = None


_current: ContextVar[_Budget | None] = ContextVar("teacher_client_budget", default=None)
"""The budget of the call that runs in this context: tasks inherit it, so it reaches every message without being in each signature."""


class Patience:
    """The policy and the time limit of one client. `clock`, `sleep` and `random_share` are there for tests."""

    def __init__(
        self,
        policy: RetryPolicy,
        timeout_s: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
        random_share: Callable[[], float] = random.random,
    ) -> None:
        if not 0 < timeout_s < float("inf"):
            raise RequestRefused(f"timeout_s must be above 0 and finite, got {timeout_s}")
        self.policy = policy
        self.timeout_s = timeout_s
        self._clock = clock
        self._sleep = sleep
        self._random_share = random_share

    @asynccontextmanager
    async def budget(self, whom: str, *, max_attempts: int | None = None) -> AsyncIterator[None]:
        """Everything in this block ends within `timeout_s`; inside another budget it also keeps to that one's limits.

        Raises:
            TeacherUnavailable: the time is over; it names `whom` and the last failure.
        """
        outer = _current.get()
        budget = _Budget(self._clock() + self.timeout_s, max_attempts if max_attempts is not None else self.policy.max_attempts)
        if outer is not None:
            budget.deadline_s = min(budget.deadline_s, outer.deadline_s)
            budget.max_attempts = outer.max_attempts
        token = _current.set(budget)
        try:
            async with asyncio.timeout(self.timeout_s):
                yield
        except TimeoutError as error:
            why = f"; the last failure: {budget.last_error}" if budget.last_error else ""
            raise TeacherUnavailable(f"{whom} gave no answer within {self.timeout_s:g} s (timeout_s){why}") from error
        finally:
            _current.reset(token)

    async def ask(self, question: Callable[[], Awaitable[T]]) -> T:
        """The answer to one message, asked again after a `Retriable` while the budget of the call lasts; every other error is final."""
        budget = _current.get()
        assert budget is not None, "ask() outside of budget()"
        num_failures = num_single = 0
        while True:
            try:
                return await question()
            except Retriable as failure:
                budget.last_error = failure.error
                num_failures += 1
                num_single += failure.only_once
                wait_s = failure.after_s + self._random_share() * self.policy.longest_wait(num_failures)
                too_late = self._clock() + wait_s >= budget.deadline_s
                if num_failures == budget.max_attempts or num_single > 1 or too_late:
                    raise self._given_up(failure, num_failures, too_late=too_late) from failure.__cause__
                logger.debug("asking again in %.2f s: %s", wait_s, failure.error)
            await self._sleep(wait_s)

    def _given_up(self, failure: Retriable, num_attempts: int, *, too_late: bool) -> DistillError:
        told = f", which asks for {failure.after_s:g} s before the next" if failure.after_s else ""
        limit = f" (timeout_s is {self.timeout_s:g}{told})" if too_late else ""
        if num_attempts == 1 and not limit:
            return failure.error
        return type(failure.error)(
            f"{failure.error}; given up after {num_attempts} {'attempt' if num_attempts == 1 else 'attempts'}{limit}"
        )


class PatientTeacher(CheckedTeacher):
    """A back end whose every call has one budget. Subclasses set `patience` and `whom`, and ask each message through `patience.ask`."""

    patience: Patience
    whom: str
    """The teacher, for errors."""

    async def info(self) -> TeacherInfo:
        """See TeacherBackend."""
        async with self.patience.budget(self.whom):
            return await super().info()

    async def ready(self) -> bool:
        """See TeacherBackend. Asks once: whether a label would come out later is another question."""
        try:
            async with self.patience.budget(self.whom, max_attempts=1):
                return await super().ready()
        except TeacherUnavailable as error:  # the time is over
            logger.debug("teacher is not ready: %s", error)
            return False

    async def top_logits(self, crops_BHWC: Crops, *, fingerprint: str | None = None) -> tuple[ClassIds, Floats]:
        """See TeacherBackend."""
        plain_top_logits = super().top_logits

        async def question() -> tuple[ClassIds, Floats]:
            info = await self.known(fingerprint)
            try:  # of this teacher, also where the caller takes any: another one may give another number of them
                return await plain_top_logits(crops_BHWC, fingerprint=info.fingerprint)
            except RequestRefused as refusal:
                if info.top_outputs is None:
                    await self.look_again(info, refusal)
                raise

        return await self.of_one_teacher(question, fingerprint)

    async def _ask(
        self, crops_BHWC: Crops, temperature_B1: Floats, names: tuple[str, ...], fingerprint: str | None = None
    ) -> dict[str, Floats]:
        plain_ask = super()._ask

        async def question() -> dict[str, Floats]:
            info = await self.known(fingerprint)
            try:
                return await plain_ask(crops_BHWC, temperature_B1, names, fingerprint)
            except RequestRefused as refusal:
                await self.look_again(info, refusal)
                raise

        return await self.of_one_teacher(question, fingerprint)

    async def known(self, fingerprint: str | None) -> TeacherInfo:
        """`info()`, looked up anew where the caller means another teacher: it may know more than this client remembers.

        Raises:
            TeacherChanged: the teacher is not the one that is meant.
        """
        info = await self.info()
        if fingerprint is not None and fingerprint != info.fingerprint:
            self._info = info = await self._load_info()
            if fingerprint != info.fingerprint:
                raise TeacherChanged(f"{self.whom} serves {info.fingerprint[:12]} now, not {fingerprint[:12]}")
        return info

    async def look_again(self, info: TeacherInfo, refusal: RequestRefused) -> None:
        """After a refusal, by us or by the server: what `info` cannot take, a teacher that has taken its place may.

        Raises:
            TeacherChanged: another one did.
        """
        now = await self._load_info()
        if now != info:
            self._info = now
            raise TeacherChanged(
                f"{self.whom} serves version {now.version} ({now.fingerprint[:12]}) now, not {info.version} any more ({refusal})"
            ) from refusal

    async def of_one_teacher(self, call: Callable[[], Awaitable[T]], fingerprint: str | None) -> T:
        """A whole call within one budget. Whoever names no teacher takes the labels of a new one, but all of them: it is asked again."""
        async with self.patience.budget(self.whom):
            for _ in range(_MOST_CHANGES):
                try:
                    return await call()
                except TeacherChanged:
                    if fingerprint is not None:
                        raise
            return await call()


async def all_or_none(questions: list[Awaitable[T]]) -> list[T]:
    """The answers in order; at the first failure the other questions are cancelled, their ends awaited, and it is raised alone."""
    tasks = [asyncio.ensure_future(question) for question in questions]
    try:
        return await asyncio.gather(*tasks)
    finally:
        unfinished = [task for task in tasks if not task.done()]
        for task in unfinished:
            task.cancel()
        await asyncio.gather(*unfinished, return_exceptions=True)
