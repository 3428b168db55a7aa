"""Brings a local Triton back when it died, or when the worker process behind its model did.

Flow: every few seconds a canary label -> nothing, or a restart on the same ports; meanwhile clients see TeacherUnavailable, then go on.
Unit of data: one check. A full queue or a slow answer is no reason to restart: only a dead process is.
"""

from __future__ import annotations

import logging
import threading
from typing import Self

from distill.errors import DistillError, ServerStartError
from teacher_server.triton import WorkerLost
from teacher_server.triton_process import TritonProcess

logger = logging.getLogger(__name__)


class TritonWatch:
    """`with TritonWatch(triton):` watches from a thread of its own. `num_restarts` counts what it had to do."""

    def __init__(self, triton: TritonProcess, *, interval_s: float = 3.0) -> None:
        self._triton = triton
        self._interval_s = interval_s
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="triton-watch", daemon=True)
        self.num_restarts = 0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._closing.set()
        self._triton.stop()  # before joining: a restart in progress gives up at once
        self._thread.join()

    def _watch(self) -> None:
        while not self._closing.wait(self._interval_s):
            reason = self._reason_to_restart()
            if reason is None or self._closing.is_set():
                continue
            logger.warning("Triton is started again: %s", reason)
            try:
                self._triton.restart()
                self.num_restarts += 1
            except ServerStartError as error:
                if not self._closing.is_set():
                    logger.error("Triton did not come back, the next try is in %g s: %s", self._interval_s, error)

    def _reason_to_restart(self) -> str | None:
        if not self._triton.alive():
            return "its process is gone"
        try:
            self._triton.ask_canary()
        except WorkerLost as error:
            return str(error)
        except DistillError as error:
            logger.debug("no canary label, but nothing died: %s", error)
        return None
