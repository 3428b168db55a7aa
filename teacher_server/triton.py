"""The teacher behind Triton, over gRPC (KServe v2 protocol).

Flow: crops -> messages of about 1.2 MB, several in flight -> Triton's dynamic batcher -> soft labels, put together again in order.
Unit of data: one batch of crops, whatever its size. Shapes: B images, H W C pixels, K classes.

All messages of one question are asked of exactly the version that `info()` described. When that version has left the server and another one
serves, the question ends with TeacherChanged: labels of two versions never mix, and whoever may use the new one asks again at once.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any, NoReturn

import numpy as np
from tritonclient.grpc import aio
from tritonclient.utils import InferenceServerException

from distill.errors import DistillError, RequestRefused, TeacherAnswerError, TeacherChanged, TeacherUnavailable
from distill.teacher_info import METADATA_KEY, TeacherInfo
from distill.wire import IMAGES, TEMPERATURE
from teacher_server.backend import CheckedTeacher, Crops, Floats, parse_info
from teacher_server.retries import all_or_none
from teacher_server.trace_context import trace_arguments

MESSAGE_BYTES = 1_200_000
"""gRPC costs a third of the client CPU per image in messages of this size, compared with messages of 5 MB (measured)."""

INFO_AGE_S = 2.0
"""So old may be what a client remembers of its teacher: a change shows even where nobody asks for labels. A question shows it at once."""
_LOOK_TIMEOUT_S = 1.0

_CHANNEL = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # A name that leads to several Tritons (a headless Service of Kubernetes) is all of them in turn, not the first of them for ever.
    ("grpc.lb_policy_name", "round_robin"),
    # The default backs off up to two minutes: a teacher that is back must be found at once.
    ("grpc.initial_reconnect_backoff_ms", 100),
    # No wait, but the time that one attempt may take: a server too busy to shake hands within it would never be reached again.
    ("grpc.min_reconnect_backoff_ms", 5000),
    ("grpc.max_reconnect_backoff_ms", 2000),
    # Finds out that a remote host vanished. Not more often: Triton hangs up on clients that ping without data.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 10_000),
]

logger = logging.getLogger(__name__)


class WorkerLost(TeacherUnavailable):
    """Triton runs, but the process behind the model is dead. Triton does not start it again: only a reload or a restart does."""


class VersionGone(TeacherUnavailable):
    """Triton runs and does not serve this version of the model, or not yet, or not any more."""


class TritonTeacher(CheckedTeacher):
    """TeacherBackend over one gRPC channel. Reconnects by itself; belongs to one event loop."""

    carries_top_outputs = True

    def __init__(self, url: str, model: str, *, request_timeout_s: float = 30.0, max_in_flight: int = 8) -> None:
        """`url` is host:port; every question ends after `request_timeout_s`; one client sends at most `max_in_flight` messages at once."""
        super().__init__()
        self.url = url
        self.model = model
        self._timeout_s = request_timeout_s
        self._slots = asyncio.Semaphore(max_in_flight)
        self._max_batch_size = 1
        self._looked_at = time.monotonic()
        self._client: aio.InferenceServerClient | None = None

    async def info(self) -> TeacherInfo:
        """See TeacherBackend."""
        known, now = self._info, time.monotonic()
        if known is not None and now - self._looked_at > INFO_AGE_S:
            self._looked_at = now  # of many questions at once one looks
            try:
                async with asyncio.timeout(_LOOK_TIMEOUT_S):
                    found = await self._load_info()
            except (DistillError, TimeoutError) as error:
                logger.debug("who %r is could not be looked up: %s", self.model, error)  # the question itself will say so
            else:
                if found != known and self._info is known:
                    self._info = found
        return await super().info()

    async def _load_info(self) -> TeacherInfo:
        try:
            answer = await self._connected().get_model_config(self.model, client_timeout=self._timeout_s)
        except InferenceServerException as error:
            self._translate(error)
        config = answer.config
        self._max_batch_size = max(1, config.max_batch_size)
        if METADATA_KEY not in config.parameters:
            raise RequestRefused(f"model {self.model!r} at {self.url} is no teacher of ours: its configuration has no {METADATA_KEY}")
        return parse_info(config.parameters[METADATA_KEY].string_value, origin=f"model {self.model!r} at {self.url}")

    async def _infer(self, crops_BHWC: Crops, temperature_B1: Floats, names: tuple[str, ...]) -> dict[str, Floats]:
        info = self._info  # what `_ask` has just read: nothing was awaited in between
        assert info is not None
        size = min(self._max_batch_size, max(1, MESSAGE_BYTES // crops_BHWC[0].nbytes))
        num_messages = -(-len(crops_BHWC) // size)
        messages = zip(np.array_split(crops_BHWC, num_messages), np.array_split(temperature_B1, num_messages), strict=True)
        try:
            parts = await all_or_none([self._ask_one(crops, temperature, names, info.version) for crops, temperature in messages])
        except VersionGone as error:
            await self._raise_if_changed(info, error)
            raise
        if len(parts) == 1:
            return parts[0]
        return {name: np.concatenate([part[name] for part in parts]) for name in names}

    async def _raise_if_changed(self, info: TeacherInfo, error: VersionGone) -> None:
        """A version that is gone means a new one in its place, or a server that is starting or stopping: only the model itself tells."""
        now = await self._load_info()
        if (now.version, now.fingerprint) != (info.version, info.fingerprint):
            raise TeacherChanged(
                f"{self.model!r} at {self.url} serves version {now.version} ({now.fingerprint[:12]}) now, not {info.version} any more"
            ) from error

    async def _ask_one(self, crops_BHWC: Crops, temperature_B1: Floats, names: tuple[str, ...], version: int) -> dict[str, Floats]:
        inputs = [_tensor_of(IMAGES, crops_BHWC, "UINT8"), _tensor_of(TEMPERATURE, temperature_B1, "FP32")]
        outputs = [aio.InferRequestedOutput(name) for name in names]
        async with self._slots:
            try:
                result = await self._connected().infer(
                    self.model,
                    inputs,
                    model_version=str(version),
                    outputs=outputs,
                    client_timeout=self._timeout_s,
                    **trace_arguments(),
                )
            except InferenceServerException as error:
                self._translate(error)
        return {name: self._tensor(result, name) for name in names}

    def _tensor(self, result: aio.InferResult, name: str) -> Floats:
        tensor = result.as_numpy(name)
        if tensor is None:
            raise TeacherAnswerError(f"the answer of {self.model!r} at {self.url} has no {name}")
        return tensor

    def _connected(self) -> aio.InferenceServerClient:
        # Made at the first question, because a gRPC channel belongs to the event loop that is running then.
        if self._client is None:
            self._client = aio.InferenceServerClient(self.url, channel_args=_CHANNEL)
        return self._client

    async def close(self) -> None:
        """See TeacherBackend."""
        if self._client is not None:
            await self._client.close()
            self._client = None

    def _translate(self, error: InferenceServerException) -> NoReturn:
        raise translated(error, f"model {self.model!r} at {self.url}") from error


def _tensor_of(name: str, tensor: np.ndarray[Any, Any], datatype: str) -> aio.InferInput:
    """A request tensor."""
    entry = aio.InferInput(name, list(tensor.shape), datatype)
    entry.set_data_from_numpy(np.ascontiguousarray(tensor))
    return entry


def translated(error: InferenceServerException, whom: str) -> DistillError:
    """Our error for one of tritonclient's: may the caller ask again, and what should a person do?"""
    status = error.status() or ""
    message = " ".join((error.message() or "no message").split())
    if "StatusCode.UNAVAILABLE" in status:
        return _unavailable(message, whom)
    if "StatusCode.NOT_FOUND" in status:
        # Also the answer of a server that is shutting down or still loading, so asking again is right.
        return VersionGone(f"{whom} is not loaded (stopping, starting, or another name or version is meant): {message}")
    if "StatusCode.DEADLINE_EXCEEDED" in status:
        return TeacherUnavailable(f"{whom} did not answer in time (triton.request_timeout_s): {message}")
    if "StatusCode.CANCELLED" in status:
        return TeacherUnavailable(f"{whom} gave the request up: {message}")
    if "StatusCode.INTERNAL" in status and "stub process" in message.lower():
        return WorkerLost(f"{whom} lost its worker process and needs a reload: {message}")
    if "StatusCode.INVALID_ARGUMENT" in status:
        return RequestRefused(f"{whom} refuses the request: {message}")
    return TeacherAnswerError(f"{whom} failed: {status} {message}")


def _unavailable(message: str, whom: str) -> DistillError:
    """UNAVAILABLE means four things; only the message tells them apart."""
    text = message.lower()
    if "not at ready state" in text:
        return VersionGone(f"{whom} does not serve this version now: {message}")
    if "restricted" in text:
        return RequestRefused(f"{whom} restricts this call to holders of a key: {message}")
    if "maximum queue size" in text:
        return TeacherUnavailable(f"{whom} has a full queue (teacher.repository.max_queue_size); send less at once: {message}")
    if "timeout expired" in text or "request timeout" in text:
        return TeacherUnavailable(f"{whom} let the request wait too long (teacher.repository.queue_timeout_us): {message}")
    return TeacherUnavailable(f"{whom} does not answer: {message}")
