"""Whether a label really comes out, asked of the teacher once a second at most however many probes ask.

Unit of data: one probe of `GET /readyz`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from teacher_server.backend import TeacherBackend

REMEMBER_S = 1.0


class Readiness:
    """The last answer, good for a second. Probes that come while the teacher is being asked wait for that same answer."""

    def __init__(self, teacher: TeacherBackend, timeout_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """A teacher that takes longer than `timeout_s` is not ready."""
        self._teacher = teacher
        self._timeout_s = timeout_s
        self._clock = clock
        self._asking = asyncio.Lock()
        self._known: tuple[float, bool] | None = None

    async def ready(self) -> bool:
        """Whether a label came out within the last second."""
        async with self._asking:
            if self._known is None or self._clock() - self._known[0] >= REMEMBER_S:
                ready = await self._ask()
                self._known = (self._clock(), ready)
            return self._known[1]

    async def _ask(self) -> bool:
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._teacher.ready()
        except TimeoutError:
            return False
