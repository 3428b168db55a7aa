"""The asynchronous client of a served teacher: one interface, whichever way the teacher is reached.

Flow: numpy crops, or image files -> AsyncTeacherClient -> RestTeacher, PatientTriton or SharedMemoryTriton -> numpy labels.
Unit of data: one call. Shapes: B images, S the teacher's image size, K classes, R retained classes.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar, overload
from urllib.parse import SplitResult, urlsplit

import numpy as np
from numpy.typing import ArrayLike, NDArray

from distill.errors import DistillError, RequestRefused, TeacherUnavailable
from distill.teacher_info import TeacherInfo
from distill.wire import CropPolicy
from teacher_server.backend import Crops, Floats
from teacher_server.file_labels import FileResult
from teacher_server.rest import RestTeacher
from teacher_server.retries import PatientTeacher, RetryPolicy

T = TypeVar("T")

API_KEY_VARIABLE = "DISTILL_API_KEY"
"""Environment variable with the API key for gateways, where none is given."""


class TopLabels(NamedTuple):
    """The R most probable classes of each crop, most probable first: uint32 `class_ids_BR`, fp32 `probs_BR` (they do not sum to 1)."""

    class_ids_BR: NDArray[np.uint32]
    probs_BR: Floats


class AsyncTeacherClient:
    """Asks one teacher; `open_async_client` makes it. Belongs to one event loop; calls may run concurrently.

    Every call ends within the client's `timeout_s`, with its result or with RequestRefused (crops, temperature, key or URL are wrong),
    TeacherUnavailable (asking again later is right), TeacherAnswerError (an answer that must not be used) or, where `fingerprint` names the
    teacher that is wanted, TeacherChanged. All labels of one call are of one version of the teacher.
    """

    def __init__(self, backend: PatientTeacher) -> None:
        """The client closes the back end."""
        self.backend = backend
        self._calls: set[asyncio.Task[Any]] = set()
        self._closed = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    async def info(self) -> TeacherInfo:
        """Name, version, fingerprint, classes and preprocessing of the teacher."""
        return await self._run(self.backend.info())

    async def logits(self, crops_BHWC: Crops, *, fingerprint: str | None = None) -> Floats:
        """uint8 [B,S,S,3] -> logits fp32 [B,K]."""
        return await self._run(self.backend.logits(_four_dimensional(crops_BHWC), fingerprint=fingerprint))

    @overload
    async def soft_labels(
        self, crops_BHWC: Crops, temperature: ArrayLike | None = None, top_k: None = None, *, fingerprint: str | None = None
    ) -> Floats: ...

    @overload
    async def soft_labels(
        self, crops_BHWC: Crops, temperature: ArrayLike | None = None, *, top_k: int, fingerprint: str | None = None
    ) -> TopLabels: ...

    async def soft_labels(
        self, crops_BHWC: Crops, temperature: ArrayLike | None = None, top_k: int | None = None, *, fingerprint: str | None = None
    ) -> Floats | TopLabels:
        """uint8 [B,S,S,3] -> softmax(logits / temperature) fp32 [B,K], or with top_k the largest R = top_k of each row.

        `temperature` is one number, one for each crop ([B] or [B,1]), or None for the teacher's own. Different temperatures in one call
        cost no more than one; over REST their softmax is computed here, from the logits.
        """
        return await self._run(self._soft_labels(_four_dimensional(crops_BHWC), temperature, top_k, fingerprint))

    async def soft_labels_of(
        self,
        files: Sequence[bytes | Path],
        temperature: float | None = None,
        top_k: int | None = None,
        *,
        crop: CropPolicy = "teacher",
        fingerprint: str | None = None,
    ) -> list[FileResult]:
        """What the teacher says of encoded images (JPEG, PNG, WebP; contents or paths): FileLabels or FileRefused for each, in order.

        The gateway decodes them and cuts the crop of the teacher's own evaluation (or with crop="as-is" takes images of exactly its
        size as crops), so this needs a gateway: http:// or https://.
        """
        backend = self.backend
        if not isinstance(backend, RestTeacher):
            raise RequestRefused(f"{backend.whom} takes crops only; for image files give the gateway's URL, http:// or https://")
        return await self._run(backend.soft_labels_of(files, temperature, top_k, crop=crop, fingerprint=fingerprint))

    async def ready(self) -> bool:
        """Whether a label really comes out now. Asks once."""
        return await self._run(self.backend.ready())

    async def close(self) -> None:
        """End calls under way with TeacherUnavailable and let go of connections and memory. Calling it twice does no harm."""
        if self._closed:
            return
        self._closed = True
        for task in self._calls:
            task.cancel()
        await asyncio.gather(*self._calls, return_exceptions=True)
        await self.backend.close()

    async def _soft_labels(
        self, crops_BHWC: Crops, temperature: ArrayLike | None, top_k: int | None, fingerprint: str | None
    ) -> Floats | TopLabels:
        async def ask() -> Floats:
            info = await self.backend.known(fingerprint)
            if top_k is not None and not 1 <= top_k <= info.num_classes:
                refusal = RequestRefused(f"top_k must be 1 to {info.num_classes}, the classes of {info.name}, got {top_k}")
                await self.backend.look_again(info, refusal)
                raise refusal
            temperature_B1 = _one_each(info.default_temperature if temperature is None else temperature, len(crops_BHWC))
            # Of this teacher, also where the caller takes any: its own temperature and number of classes are not those of the next one.
            return (await self.backend.soft_labels(crops_BHWC, temperature_B1, fingerprint=fingerprint or info.fingerprint))[1]

        probs_BK = await self.backend.of_one_teacher(ask, fingerprint)
        if top_k is None:
            return probs_BK
        ids_BR = np.argsort(-probs_BK, axis=1, kind="stable")[:, :top_k]  # of equal values the smaller id comes first
        return TopLabels(ids_BR.astype(np.uint32), np.take_along_axis(probs_BK, ids_BR, axis=1))

    async def _run(self, call: Coroutine[Any, Any, T]) -> T:
        """The result of a call that `close` can end."""
        if self._closed:
            call.close()
            raise DistillError("this client is closed; open another one")
        task = asyncio.ensure_future(call)
        self._calls.add(task)
        try:
            return await task
        except asyncio.CancelledError:
            asking = asyncio.current_task()
            if self._closed and task.cancelled() and not (asking and asking.cancelling()):
                raise TeacherUnavailable(f"the client of {self.backend.whom} was closed while it waited") from None
            raise
        finally:
            self._calls.discard(task)


def open_async_client(
    url: str,
    *,
    model: str | None = None,
    api_key: str | None = None,
    timeout_s: float = 30.0,
    retry: RetryPolicy | None = None,
    max_in_flight: int = 8,
) -> AsyncTeacherClient:
    """A client for the event loop that first asks it. See `teacher_server.client` for the URLs; connects at the first call.

    Raises:
        RequestRefused: a URL or an option that makes no sense.
    """
    retry = retry or RetryPolicy()
    parts = _split(url)
    if parts.scheme not in ("http", "https", "grpc", "grpc+shm") or not parts.hostname or parts.query or parts.fragment:
        raise RequestRefused(f"{url!r} is not http(s)://HOST[:PORT], grpc://HOST:PORT/MODEL or grpc+shm://HOST:PORT/MODEL")
    if "@" in parts.netloc:
        raise RequestRefused("a teacher's URL holds no user or password; an API key goes into api_key= or $" + API_KEY_VARIABLE)
    if max_in_flight < 1:
        raise RequestRefused(f"max_in_flight must be at least 1, got {max_in_flight}")
    if parts.scheme in ("http", "https"):
        key = api_key if api_key is not None else os.environ.get(API_KEY_VARIABLE)
        return AsyncTeacherClient(RestTeacher(url, model=model, api_key=key, timeout_s=timeout_s, retry=retry, max_in_flight=max_in_flight))
    return AsyncTeacherClient(_triton(url, model, api_key, timeout_s, retry, max_in_flight))


def _triton(url: str, model: str | None, api_key: str | None, timeout_s: float, retry: RetryPolicy, max_in_flight: int) -> PatientTeacher:
    parts = _split(url)
    named = parts.path.strip("/") or model
    if parts.port is None or not named or "/" in named or (model is not None and model != named):
        raise RequestRefused(f"{url!r} with model {model!r} is not {parts.scheme}://HOST:PORT/MODEL")
    if api_key is not None:
        raise RequestRefused("Triton knows no API keys; they are for gateways, http:// or https://")
    # Imported here: who asks a gateway needs no gRPC, and not every system that has gRPC has /dev/shm.
    if parts.scheme == "grpc+shm":
        from teacher_server.triton_shm import SharedMemoryTriton

        return SharedMemoryTriton(parts.netloc, named, timeout_s=timeout_s, retry=retry, max_in_flight=max_in_flight)
    from teacher_server.triton_patient import PatientTriton

    return PatientTriton(parts.netloc, named, timeout_s=timeout_s, retry=retry, max_in_flight=max_in_flight)


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        _ = parts.port  # read here, because it is checked only when it is read
    except ValueError as error:
        raise RequestRefused(f"{url!r} is not a URL: {error}") from error
    return parts


def _four_dimensional(crops_BHWC: Crops) -> Crops:
    crops_BHWC = np.asarray(crops_BHWC)
    if crops_BHWC.ndim != 4:
        raise RequestRefused(f"crops must be uint8 [B,S,S,3], got {crops_BHWC.dtype} {list(crops_BHWC.shape)}")
    return crops_BHWC


def _one_each(temperature: ArrayLike, num_images: int) -> Floats:
    """fp32 [B,1]; its range is checked by the back end."""
    try:
        given = np.asarray(temperature, np.float32)
    except (TypeError, ValueError) as error:
        raise RequestRefused(f"temperature must be a number or one for each crop, got {temperature!r}"[:200]) from error
    if given.ndim == 0:
        return np.full((num_images, 1), given, np.float32)
    if given.shape not in ((num_images,), (num_images, 1)):
        raise RequestRefused(f"temperature must be a number, [{num_images}] or [{num_images},1], got {list(given.shape)}")
    return given.reshape(num_images, 1)
