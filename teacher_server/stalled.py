"""Hangs up on clients that stand still (half a request head, or an answer that they do not take) and on heads without an end. uvicorn
would wait for ever, and its faster parser takes a head of any length.

Unit of data: one connection. Bodies that trickle are not seen here: they have the deadline of their request (gateway.py).
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

STALL_S = 10.0
"""No progress within this time, and at most twice this time, ends a connection."""
MAX_HEAD_BYTES = 64 * 2**10
"""Request line and headers, as other servers allow; what comes in the same read as the last allowed byte is not counted."""

_TOO_LONG = b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


class ImpatientProtocol(HttpToolsProtocol):
    """uvicorn's HTTP/1.1, with a look at each connection every STALL_S seconds."""

    _looking: asyncio.TimerHandle | None = None
    _head_bytes = 0
    _body_expected = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client is there."""
        super().connection_made(transport)
        self._look(None)

    def connection_lost(self, exc: Exception | None) -> None:
        """It is gone."""
        if self._looking is not None:
            self._looking.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """More of a head or of a body."""
        self._head_bytes += len(data)
        super().data_received(data)
        if self._body_expected:
            self._head_bytes = 0
        elif self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self.transport.write(_TOO_LONG)
            self.transport.close()

    def on_headers_complete(self) -> None:
        """The head is whole."""
        self._body_expected = True
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The body is whole; what comes now is the next head."""
        self._body_expected, self._head_bytes = False, 0
        super().on_message_complete()

    def _look(self, before: tuple[Any, ...] | None) -> None:
        now = self._waited_for()
        if now is not None and now == before:
            self.transport.abort()
            return
        self._looking = self.loop.call_later(STALL_S, self._look, now)

    def _waited_for(self) -> tuple[Any, ...] | None:
        """What the client has to do next, None if nothing. Equal twice: it did nothing of it."""
        unsent = self.transport.get_write_buffer_size()
        if unsent:
            return "take the answer", self.cycle, unsent
        if self.cycle is None or (self.cycle.response_complete and not self._body_expected):
            return "send a head", self.cycle
        return None
