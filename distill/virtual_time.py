"""asyncio in virtual time: whenever nothing is left to do, the clock jumps to the next timer.

For simulations of what is written with asyncio, and for tests of it: minutes pass at once, and every run is the same. Only for code that
waits for timers and for other tasks; whoever waits for a socket, a thread or a process would see the clock jump over the answer.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class _JumpingSelector(selectors.DefaultSelector):
    """Instead of waiting for `timeout` seconds it says that they are over."""

    now_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready and timeout:
            self.now_s += timeout
        return ready


class _VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now_s


def run_in_virtual_time(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end; the loop's `time()` begins at 0 and counts virtual seconds."""
    with asyncio.Runner(loop_factory=_VirtualLoop) as runner:
        return runner.run(work)
