"""Hangs up on clients that stand still (half a request head, or an answer that they do not take), on heads and trailers without an end,
and on bodies that go on after their answer. uvicorn would wait for ever, and its faster parser takes a head of any length.

Unit of data: one connection. Bodies that trickle are not seen here: they have the deadline of their request (gateway.py).
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from teacher_server.problems import Problem

STALL_S = 10.0
"""No progress within this time, and at most twice this time, ends a connection."""
MAX_HEAD_BYTES = 64 * 2**10
"""Request line and headers, as other servers allow, and all between two pieces of a body (chunk extensions, trailers); what comes in the
same read as the last allowed byte is not counted."""

_MALFORMED = "malformed_request", "this is not HTTP/1.1"
_TOO_LONG = "head_too_large", f"the head or the trailers of the request are over {MAX_HEAD_BYTES} bytes"


class ImpatientProtocol(HttpToolsProtocol):
    """uvicorn's HTTP/1.1, with a look at each connection every STALL_S seconds."""

    _looking: asyncio.TimerHandle | None = None
    _head_bytes = 0
    _body_expected = False
    _received = b""

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
        self._received = data
        super().data_received(data)
        self._received = b""
        if self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self._refuse(431, *_TOO_LONG)

    def send_400_response(self, msg: str) -> None:
        """What the parser did not understand; uvicorn would answer plain text."""
        self._refuse(400, *_MALFORMED)

    def on_headers_complete(self) -> None:
        """The head is whole."""
        if self._wants_upgrade():
            return
        self._body_expected = True
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A piece of the body."""
        self._head_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The body is whole; what comes now is the next head."""
        if self._wants_upgrade():
            return
        self._body_expected, self._head_bytes = False, 0
        super().on_message_complete()

    def _wants_upgrade(self) -> bool:
        return self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT"

    def _should_upgrade(self) -> bool:
        return False

    def _unsupported_upgrade_warning(self) -> None:
        """The parser stopped behind a head with `Upgrade`; going on would lose the body. All is parsed anew without that header."""
        stopped = sys.exception()
        assert isinstance(stopped, httptools.HttpParserUpgrade)
        if not self._wants_upgrade():
            return
        lines = [b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())]
        lines += [b"%b: %b" % pair for pair in self.headers if pair[0] != b"upgrade"]
        rest = self._received[stopped.args[0] :]
        self.parser = httptools.HttpRequestParser(self)
        self._head_bytes = 0
        self.data_received(b"\r\n".join(lines) + b"\r\n\r\n" + rest)

    def _refuse(self, status: int, code: str, message: str) -> None:
        """The same body as every other error (problems.py), unless another answer is being sent; then the end."""
        if not self.pipeline and (self.cycle is None or self.cycle.response_complete or not self.cycle.response_started):
            answer = Problem(status, code, message).answer()
            head = [STATUS_LINE[status], *(b"%b: %b\r\n" % pair for pair in answer.raw_headers), b"connection: close\r\n\r\n"]
            self.transport.write(b"".join([*head, bytes(answer.body)]))
        self.transport.close()

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
        if self.cycle.response_complete:  # refused before its body was read; however much still comes, it has this long to end
            return "end the body", self.cycle
        return None
