"""Triton as a client sees it: each call within one budget, each message asked again where that helps, and only of the same teacher.

Flow: TritonTeacher (triton.py) splits a batch into messages -> each is asked, and asked again, here -> labels.
Unit of data: one message of a batch. Shapes: B images, H W C pixels, K classes.
"""

from __future__ import annotations

from contextvars import ContextVar

from distill.errors import TeacherChanged, TeacherUnavailable
from distill.teacher_info import TeacherInfo
from teacher_server.backend import Crops, Floats
from teacher_server.retries import Patience, PatientTeacher, Retriable, RetryPolicy
from teacher_server.triton import TritonTeacher

asked_of: ContextVar[TeacherInfo] = ContextVar("asked_of")
"""The teacher that the labels of the call in this context come from; its messages, which are tasks, inherit it."""


class PatientTriton(PatientTeacher, TritonTeacher):
    """TritonTeacher with a budget for each call and retries for each message."""

    def __init__(
        self,
        url: str,
        model: str,
        *,
        timeout_s: float = 30.0,
        retry: RetryPolicy | None = None,
        max_in_flight: int = 8,
        patience: Patience | None = None,
    ) -> None:
        """See TritonTeacher. `patience` is there for tests."""
        super().__init__(url, model, request_timeout_s=timeout_s, max_in_flight=max_in_flight)
        self.patience = patience or Patience(retry or RetryPolicy(), timeout_s)
        self.whom = f"model {model!r} at {url}"

    async def _load_info(self) -> TeacherInfo:
        plain_load = super()._load_info

        async def question() -> TeacherInfo:
            try:
                return await plain_load()
            except TeacherUnavailable as error:
                raise Retriable(error) from error

        return await self.patience.ask(question)

    async def _infer(self, crops_BHWC: Crops, temperature_B1: Floats, names: tuple[str, ...]) -> dict[str, Floats]:
        assert self._info is not None  # `_ask` has just read it
        token = asked_of.set(self._info)
        try:
            return await super()._infer(crops_BHWC, temperature_B1, names)
        finally:
            asked_of.reset(token)

    async def _ask_one(self, crops_BHWC: Crops, temperature_B1: Floats, names: tuple[str, ...], version: int) -> dict[str, Floats]:
        failed = False

        async def question() -> dict[str, Floats]:
            nonlocal failed
            try:
                if failed:  # whoever comes back may be another
                    self._check_same(await super(PatientTriton, self)._load_info())
                return await self._send(crops_BHWC, temperature_B1, names, version)
            except TeacherChanged:
                raise
            except TeacherUnavailable as error:
                failed = True
                raise Retriable(error) from error

        return await self.patience.ask(question)

    async def _send(self, crops_BHWC: Crops, temperature_B1: Floats, names: tuple[str, ...], version: int) -> dict[str, Floats]:
        return await super()._ask_one(crops_BHWC, temperature_B1, names, version)

    def _check_same(self, now: TeacherInfo) -> None:
        asked = asked_of.get()
        if (now.version, now.fingerprint) != (asked.version, asked.fingerprint):
            raise TeacherChanged(f"{self.whom} serves version {now.version} ({now.fingerprint[:12]}) now, not {asked.version} any more")
