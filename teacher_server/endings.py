"""How a request of the gateway may end before its answer: too late, its client gone, by the teacher's fault; and what is given back then.

Unit of data: one request.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, TypeVar

from fastapi import Request

from distill.errors import BadInput, RequestRefused, TeacherAnswerError
from teacher_server.problems import Problem
from teacher_server.quotas import TenantUsage

T = TypeVar("T")


@contextmanager
def teachers_fault() -> Iterator[None]:
    """The teacher refuses what the gateway has checked, or is none: the client has done nothing wrong and can mend nothing."""
    try:
        yield
    except RequestRefused as error:
        raise TeacherAnswerError(f"the teacher refuses: {error}") from error


@contextmanager
def refunded(tenant: TenantUsage, num_images: int) -> Iterator[None]:
    """Images of which no label was delivered cost nothing, unless that was the client's doing."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, BadInput) and not (isinstance(error, Problem) and error.status < 500):
            tenant.refund(num_images)
        raise


@asynccontextmanager
async def until(deadline: float, problem: Problem) -> AsyncIterator[None]:
    """The block, which ends with `problem` when the event loop's clock is at `deadline`."""
    try:
        async with asyncio.timeout_at(deadline):
            yield
    except TimeoutError as error:
        raise problem from error


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client hangs up first or the deadline passes."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_hung_up(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Problem(499, "client_gone", "the client hung up")
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _hung_up(request: Request) -> None:
    """Returns when the client is gone. The body has been read to its end, so nothing else can come."""
    while (await request.receive())["type"] != "http.disconnect":
        continue
