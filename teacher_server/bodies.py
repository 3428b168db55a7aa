"""The bytes of a request, within limits: one body is at most so long, and all bodies held at once are at most so long.

Flow: ASGI messages -> chunks, counted as they come -> one buffer, or the files of a multipart form, in memory and never on disk.
Unit of data: one request body.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager

from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from distill.errors import RequestRefused
from teacher_server.problems import Problem

# It warns of every malformed form, one line a request: a stranger could fill the disk with that. The client is told what is wrong.
logging.getLogger("python_multipart.multipart").setLevel(logging.ERROR)

_MAX_FIELDS = 8  # none is of use; a few may come, so that the refusal can name the first
_MAX_FIELD_BYTES = 4096


class BodyMemory:
    """How many bytes of bodies and of answers that are being sent this process holds."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0

    @contextmanager
    def hold(self) -> Iterator[HeldBody]:
        """The bytes of one request, given back at the end of the block."""
        held = HeldBody(self)
        try:
            yield held
        finally:
            self.used -= held.size


class HeldBody:
    """What one request holds of the memory."""

    def __init__(self, memory: BodyMemory) -> None:
        self._memory = memory
        self.size = 0

    def add(self, num_bytes: int) -> None:
        """Count bytes that came. Raises Problem 503 when all requests together hold too many."""
        memory = self._memory
        if memory.used + num_bytes > memory.limit:
            raise Problem(
                503,
                "overloaded",
                f"bodies and answers of {memory.used} bytes are being worked on (server.max_buffered_bytes {memory.limit})",
            )
        memory.used += num_bytes
        self.size += num_bytes

    def becomes(self, num_bytes: int) -> None:
        """The body has been worked off; its answer of so many bytes is there. Not refused: the next bodies are."""
        self._memory.used += num_bytes - self.size
        self.size = num_bytes


async def read_body(request: Request, limit: int, held: HeldBody, setting: str = "max_body_bytes") -> bytes:
    """The body, refused as soon as it is known to be over `limit` bytes.

    Raises:
        Problem: 413 over `limit`, which is that of `server.SETTING`; 503 too much in memory.
    """
    chunks = [chunk async for chunk in limited_chunks(request, limit, held, setting)]
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)  # one copy; a buffer that grows is moved again and again


async def limited_chunks(request: Request, limit: int, held: HeldBody, setting: str) -> AsyncGenerator[bytes, None]:
    """The chunks of a body. A client's Content-Length is believed only if it is too large. Raises as `read_body` does."""
    too_large = Problem(413, "too_large", f"the body is over {limit} bytes (server.{setting}); send fewer or smaller images at once")
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced[:19]) > limit:
        raise too_large
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit:
            raise too_large
        held.add(len(chunk))
        yield chunk


def too_many_images(max_batch: int) -> Problem:
    """413: a client that sends fewer at once is answered."""
    return Problem(413, "too_large", f"a request holds 1 to {max_batch} images (server.max_batch), here are more; send fewer at once")


async def read_files(request: Request, limit: int, held: HeldBody, max_files: int) -> list[bytes]:
    """The files of a multipart form, in their order.

    Raises:
        Problem: as `read_body`; 413 more than `max_files` files.
        RequestRefused: not multipart, or a field that is no file.
    """
    chunks = limited_chunks(request, limit, held, "max_body_bytes")
    parser = MultiPartParser(request.headers, chunks, max_files=max_files, max_fields=_MAX_FIELDS, max_part_size=_MAX_FIELD_BYTES)
    parser.spool_max_size = limit + 1  # the files stay in memory: no image of a client is written to this machine's disk
    try:
        form = await parser.parse()
    except MultiPartException as error:
        if error.message.startswith("Too many files"):
            raise too_many_images(max_files) from error
        raise RequestRefused(f"the multipart body cannot be used: {error.message} (server.max_batch is {max_files})") from error
    try:
        files = []
        for name, part in form.multi_items():
            if not isinstance(part, UploadFile):
                raise RequestRefused(f"part {name[:100]!r} of the form is no file; temperature, top_k and the like belong into the query")
            files.append(await part.read())
        return files
    finally:
        await form.close()
