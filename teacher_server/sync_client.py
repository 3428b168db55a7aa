"""The synchronous client: the asynchronous one on an event loop of its own, in a thread of its own.

Flow: a call from any thread -> the private event loop -> AsyncTeacherClient -> the caller's thread again.
Unit of data: one call. The caller's own event loop, if it has one, plays no part: the client works in a notebook, too (and blocks it).
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Coroutine, Sequence
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any, Self, TypeVar, overload

from numpy.typing import ArrayLike

from distill.errors import DistillError, TeacherUnavailable
from distill.teacher_info import TeacherInfo
from distill.wire import CropPolicy
from teacher_server.async_client import AsyncTeacherClient, TopLabels, open_async_client
from teacher_server.backend import Crops, Floats
from teacher_server.file_labels import FileResult
from teacher_server.retries import RetryPolicy

T = TypeVar("T")


class TeacherClient:
    """Asks one teacher; `open_client` makes it. May be used from several threads; each method is that of AsyncTeacherClient."""

    def __init__(self, client: AsyncTeacherClient) -> None:
        """Closes the asynchronous client at its end; nothing else may use it."""
        self._client = client
        self._owner = os.getpid()
        self._lock = threading.Lock()
        self._closed = False
        self._loop = asyncio.new_event_loop()
        # A daemon: a program that forgets to close the client can still end.
        self._thread = threading.Thread(target=self._loop.run_forever, name="teacher-client", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def info(self) -> TeacherInfo:
        """See AsyncTeacherClient."""
        return self._wait(self._client.info())

    def logits(self, crops_BHWC: Crops, *, fingerprint: str | None = None) -> Floats:
        """See AsyncTeacherClient: uint8 [B,S,S,3] -> logits fp32 [B,K]."""
        return self._wait(self._client.logits(crops_BHWC, fingerprint=fingerprint))

    @overload
    def soft_labels(
        self, crops_BHWC: Crops, temperature: ArrayLike | None = None, top_k: None = None, *, fingerprint: str | None = None
    ) -> Floats: ...

    @overload
    def soft_labels(
        self, crops_BHWC: Crops, temperature: ArrayLike | None = None, *, top_k: int, fingerprint: str | None = None
    ) -> TopLabels: ...

    def soft_labels(
        self, crops_BHWC: Crops, temperature: ArrayLike | None = None, top_k: int | None = None, *, fingerprint: str | None = None
    ) -> Floats | TopLabels:
        """See AsyncTeacherClient: uint8 [B,S,S,3] -> soft labels fp32 [B,K], or TopLabels."""
        if top_k is None:
            return self._wait(self._client.soft_labels(crops_BHWC, temperature, fingerprint=fingerprint))
        return self._wait(self._client.soft_labels(crops_BHWC, temperature, top_k=top_k, fingerprint=fingerprint))

    def soft_labels_of(
        self,
        files: Sequence[bytes | Path],
        temperature: float | None = None,
        top_k: int | None = None,
        *,
        crop: CropPolicy = "teacher",
        fingerprint: str | None = None,
    ) -> list[FileResult]:
        """See AsyncTeacherClient: one FileLabels or FileRefused for each file."""
        return self._wait(self._client.soft_labels_of(files, temperature, top_k, crop=crop, fingerprint=fingerprint))

    def ready(self) -> bool:
        """See AsyncTeacherClient."""
        return self._wait(self._client.ready())

    def close(self) -> None:
        """See AsyncTeacherClient. Calls of other threads end with TeacherUnavailable. Calling it twice does no harm."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        if os.getpid() != self._owner:  # a forked child has neither the thread nor the connections
            return
        try:
            asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    async def _end(self) -> None:
        await self._client.close()
        rest = asyncio.all_tasks() - {asyncio.current_task()}
        if rest:  # the ends of calls that `close` has cut off; whoever waits for one must hear of it
            _, late = await asyncio.wait(rest, timeout=1)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)

    def _wait(self, call: Coroutine[Any, Any, T]) -> T:
        if os.getpid() != self._owner:
            call.close()
            raise DistillError("this client was opened before a fork; each process opens its own")
        with self._lock:  # a call that is accepted reaches the loop before its end does
            if self._closed:
                call.close()
                raise DistillError("this client is closed; open another one")
            future = asyncio.run_coroutine_threadsafe(call, self._loop)
        try:
            return future.result()
        except CancelledError as error:
            raise TeacherUnavailable("the client was closed while this call waited") from error
        except BaseException:  # Ctrl-C in the waiting thread: nobody wants the answer any more
            future.cancel()
            raise


def open_client(
    url: str,
    *,
    model: str | None = None,
    api_key: str | None = None,
    timeout_s: float = 30.0,
    retry: RetryPolicy | None = None,
    max_in_flight: int = 8,
) -> TeacherClient:
    """A client for plain code, threads and notebooks. See `teacher_server.client` for the URLs; connects at the first call.

    Raises:
        RequestRefused: a URL or an option that makes no sense.
    """
    client = open_async_client(url, model=model, api_key=api_key, timeout_s=timeout_s, retry=retry, max_in_flight=max_in_flight)
    return TeacherClient(client)
